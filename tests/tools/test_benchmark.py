"""tools/benchmark.py: equal outputs before a clock starts, ratios of rounds, floors by hand, records, and refusals in
one line.
"""

import argparse
import csv
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools import benchmark as tool
from tools import contenders, readme_tables, turns
from tools.count import count as count_of
from tools.measurement import run_rounds
from training.errors import exit_code

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TINY = [
    "--models",
    "alt_gvt_demo",
    "--batch-size",
    "2",
    "--size",
    "32",
    "--repeats",
    "3",
    "--warmup",
    "1",
    "--device",
    "cpu",
]
EAGER = [*TINY, "--modes", "eager", "--no-memory"]
COLUMNS = ["model", "task", "dtype", "batch", "size", "library", "mode", "ms", "ms_q1", "ms_q3", "pictures_per_s"]
COLUMNS += ["ours_faster", "share_of_product_rate", "peak_mb", "rest_mb", "failed"]
run = functools.partial(exit_code, "benchmark.py", tool.main)


def case(task="inference", dtype="float32", *, model="alt_gvt_demo", batch=2, size=64) -> tool.Case:
    return tool.Case(model, task, dtype, batch, size)


def run_case(words, capsys) -> dict:
    assert run([*TINY, "--no-memory", "--json", *words]) == 0
    (found,) = json.loads(capsys.readouterr().out)["cases"]
    return found


def modes(found: dict) -> list[tuple[str, str]]:
    return [(row["library"], row["mode"]) for row in found["rows"]]


# ---------------------------------------------------------------- equal outputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", ["inference", "training"])
@pytest.mark.parametrize("size", [64, 96])  # at 96 the windows have padding
def test_outputs_agree(task, dtype, size, tmp_path):
    which, path = case(task, dtype, size=size), tmp_path / "reference.npy"
    of_outputs, of_dtype = contenders.Reference(which, ("reference", ""), CPU).save(path)
    assert 0 < of_dtype < (1e-5 if dtype == "float32" else 0.05) * of_outputs
    for library in ("ours", "timm"):
        assert 0 < contenders.Runner(which, (library, "eager"), CPU).error(path) <= tool.TOLERANCE * of_dtype


@pytest.mark.parametrize("task", ["inference", "training"])
def test_other_weights_are_an_error_of_the_outputs(task, tmp_path):
    which, path = case(task), tmp_path / "reference.npy"
    _, of_dtype = contenders.Reference(which, ("reference", ""), CPU).save(path)
    runner = contenders.Runner(which, ("timm", "eager"), CPU)
    with torch.no_grad():
        runner.module.blocks[2][0].mlp.fc1.bias[3] += 0.01
    assert runner.error(path) > 10 * tool.TOLERANCE * of_dtype


class Fake:
    """A contender that answers by a table."""

    def __init__(self, name, **answers):
        self.name, self.answers, self.failed = name, answers, None

    def ask(self, method, *args):
        return self.answers[method]

    def fail(self, reason):
        self.failed = reason

    def close(self):
        pass


def fakes(mode, error):
    names = (("reference", "float64"), ("ours", "eager"), ("timm", mode), ("pvt_v2_b0", "eager"))
    answers = ({"save": (1.0, 1e-7)}, {"error": 1e-7}, {"error": error}, {"error": None})
    return {name: Fake(name, **each) for name, each in zip(names, answers)}


@pytest.mark.parametrize("error", [1e-6, float("nan"), float("inf")])
def test_other_outputs_are_refused_before_anything_is_timed(error):
    start = r"outputs differ \(timm eager, alt_gvt_demo inference float32 2 x 64 x 64\): off by "
    with pytest.raises(tool.UserError, match=start + ".*; nothing was timed$"):
        tool.check_outputs(case(), fakes("eager", error))


def test_other_outputs_of_another_runtime_are_its_failure():
    good, wrong = fakes("openvino", 1e-7), fakes("openvino", 1e-6)
    assert tool.check_outputs(case(), good)["rms_error"] == {"ours eager": 1e-7, "timm openvino": 1e-7}
    tool.check_outputs(case(), wrong)
    assert good["timm", "openvino"].failed is None
    assert wrong["timm", "openvino"].failed.startswith("outputs differ: off by 1e-06, expected at most 2 x 1e-07")


def test_the_reference_of_a_large_batch_is_made_in_parts(monkeypatch):
    for task in ("inference", "training"):
        reference, found = contenders.Reference(case(task, batch=3), ("reference", ""), CPU), []
        for chunk in (2, 8):
            monkeypatch.setattr(contenders, "REFERENCE_CHUNK", chunk)
            found.append(reference.outputs("float64"))
        assert found[0].dtype == torch.float64 and (found[0] - found[1]).abs().max() < 1e-12


def test_a_training_step_trains():
    which = case("training")
    runner = contenders.Runner(which, ("ours", "eager"), CPU)
    before = runner.module.head.weight.clone()
    runner.step()
    assert not torch.equal(runner.module.head.weight, before) and runner.module.head.weight.grad is None


# ---------------------------------------------------------------- ratios and floors


def test_ratios_are_medians_of_the_rounds_ratios():
    times = {
        ("ours", "eager"): [1.0, 2.0, 4.0],
        ("timm", "eager"): [3.0, 4.0, 4.0],
        ("ours", "compiled"): [1.0, 1.0, 1.0],
        ("timm", "compiled"): [2.0, 0.5, 1.0],
    }
    found = {(each["ours"], each["library"], each["mode"]): each["median"] for each in tool.ratios(times)}
    # 3/1, 4/2, 4/4; compiled 2, 0.5, 1; ours at its best, compiled, against timm eager 3, 4, 4
    assert found == {
        ("eager", "timm", "eager"): 2.0,
        ("compiled", "timm", "compiled"): 1.0,
        ("compiled", "timm", "eager"): 4.0,
    }


def test_every_step_runs_in_every_round():
    calls = []
    steps = {(name, ""): lambda _, name=name: calls.append(name) for name in "abc"}
    times = run_rounds(steps, repeats=5, warmup=2)
    assert [len(spent) for spent in times.values()] == [5, 5, 5]
    rounds = [calls[at : at + 3] for at in range(0, len(calls), 3)]
    assert len(rounds) == 7 and all(set(each) == set("abc") for each in rounds)
    assert len(set(map(tuple, rounds))) > 1  # not always in the same order


def test_floors_are_those_of_count_and_grow():
    one, more, larger = (tool.count_step(case(batch=batch, size=size)) for batch, size in ((1, 64), (4, 64), (4, 128)))
    assert one["operations"] == pytest.approx(2e9 * count_of("alt_gvt_demo", 64)["gmacs"])
    assert one["operations"] < more["operations"] < larger["operations"]
    assert more["operations"] == 4 * one["operations"]


@pytest.mark.parametrize("size", [64, 128])
def test_shares_of_attention_by_hand(size):
    """Twice the multiply-adds of projections, sub-sampling and the products q k^T and softmax(...) v, block by
    block.
    """
    v, found = tool.gvt.VARIANTS["alt_gvt_demo"], {"LSA": 0, "GSA": 0}
    for k, (C, r, depth) in enumerate(zip(v.dims, v.sr_ratios, v.depths)):
        side = size // 4 // 2**k
        padded, keys = (-(-side // v.window) * v.window) ** 2, (side // r) ** 2
        masked = min(side, v.window) ** 2 if side < v.window else padded  # a window shrinks to a smaller map
        N = masked if side < v.window else padded
        lsa = N * 3 * C * C + 2 * N * min(side, v.window) ** 2 * C + side**2 * C * C
        gsa = 2 * side**2 * C * C + keys * (2 * C * C + (r * r * C * C if r > 1 else 0)) + 2 * side**2 * keys * C
        found["LSA"] += depth // 2 * lsa
        found["GSA"] += depth // 2 * gsa
    floor = tool.count_step(case(batch=1, size=size))
    for name, macs in found.items():
        assert floor["shares_of_operations"][name] == pytest.approx(2 * macs / floor["operations"])
    assert (
        tool.count_step(case("training", batch=1, size=size))["shares_of_operations"] == floor["shares_of_operations"]
    )


def test_the_floor_of_training():
    inference, training = (tool.count_step(case(task)) for task in ("inference", "training"))
    assert 2.8 < training["operations"] / inference["operations"] < 3  # the images need no gradient


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_results(tmp_path, capsys):
    words = ["--tasks", "inference", "training", "--peers", "pvt_v2_b0", "--output", str(tmp_path / "out")]
    words += ["--size", "64"]
    assert run([*EAGER, *words, "--batch-size", "1", "2"]) == 0
    out, error = capsys.readouterr()
    assert "case 4 of 4: alt_gvt_demo training float32 2 x 64 x 64" in error and "round 3 of 3" in error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"command", "commit", "torch", "timm", "threads", "hardware", "started"} <= set(results["environment"])
    assert set(results["environment"]["processor"]) == {"name", "flags"}
    assert results["environment"]["thread_policy"]["OMP_WAIT_POLICY"] == os.environ["OMP_WAIT_POLICY"]
    assert results["settings"]["repeats"] == 3
    assert [(each["task"], each["batch"]) for each in results["cases"]] == [
        ("inference", 1),
        ("inference", 2),
        ("training", 1),
        ("training", 2),
    ]
    for each in results["cases"]:
        rounds = {row["library"]: row["rounds_s"] for row in each["rows"]}
        assert list(rounds) == ["ours", "timm", "pvt_v2_b0"] and all(len(spent) == 3 for spent in rounds.values())
        for ratio in each["ratios"]:
            by_hand = statistics.median(b / a for a, b in zip(rounds["ours"], rounds[ratio["library"]]))
            assert ratio["median"] == pytest.approx(by_hand, rel=1e-3)
        ours = each["rows"][0]
        assert ours["pictures_per_s"] == pytest.approx(each["batch"] / ours["seconds"]["median"])
        assert ours["seconds"]["q1"] <= ours["seconds"]["median"] <= ours["seconds"]["q3"]
        assert ours["share_of_product_rate"] == pytest.approx(each["floor"]["operations_s"] / ours["seconds"]["median"])
        assert "share_of_product_rate" not in each["rows"][2]  # another network, whose operations were not counted
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 and list(rows[0]) == COLUMNS
    assert rows[0]["ours_faster"] == "" and float(rows[1]["ours_faster"]) > 0
    assert out.count("timm eager") == 4


def test_json_and_a_bound(capsys, monkeypatch):
    monkeypatch.setenv("TWINS_WINDOW_KERNEL", "0")
    assert run([*EAGER, "--json", "--least", "1000"]) == 1
    out, error = capsys.readouterr()
    assert json.loads(out)["settings"]["switches"] == {"TWINS_WINDOW_KERNEL": "0"}
    cases = json.loads(out)["cases"]
    assert cases[0]["model"] == "alt_gvt_demo"
    assert error.splitlines()[-1].startswith(
        "benchmark.py: too slow (--least 1000): alt_gvt_demo inference float32 eager: "
    )
    assert tool.too_slow(cases, 0.001) == []


def test_a_profile(capsys):
    assert run([*EAGER, "--profile"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("timm eager: ")]
    shares = dict(part.rsplit(" ", 2)[:2] for part in line.removeprefix("timm eager: ").split(", "))
    assert "addmm" in shares and {"gelu", "native_layer_norm"} & set(shares)  # small shares come and go
    assert 50 < sum(map(int, shares.values())) <= 105


@pytest.mark.slow
def test_recomputing_is_measured_beside_ours(capsys):
    assert run([*EAGER, "--tasks", "training", "--recompute", "--batch-size", "1", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["cases"]
    assert [each["library"] for each in found["rows"]] == ["ours", "timm", "MLP recomputed"]
    assert set(found["outputs"]["rms_error"]) == {"ours eager", "timm eager", "MLP recomputed eager"}
    assert [each["library"] for each in found["ratios"]] == ["timm", "MLP recomputed"]
    assert all("share_of_product_rate" in each for each in found["rows"])


@pytest.mark.slow
def test_a_dense_backbone(capsys):
    pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")
    words = [
        "--models",
        "pcpvt_small_v0",
        "--tasks",
        "features",
        "--batch-size",
        "1",
        "--size",
        "64",
        "--repeats",
        "1",
        "--warmup",
        "0",
    ]
    assert run([*words, "--modes", "eager", "--no-memory", "--json", "--device", "cpu"]) == 0
    assert [row["library"] for row in json.loads(capsys.readouterr().out)["cases"][0]["rows"]] == ["ours", "mmseg"]


@pytest.mark.slow
def test_modes_of_pytorch(capsys):
    found = run_case(["--modes", "eager", "compiled", "freezing"], capsys)
    names = [(library, mode) for mode in ("eager", "compiled", "freezing") for library in ("ours", "timm")]
    assert modes(found) == names and set(found["outputs"]["rms_error"]) == {" ".join(name) for name in names}
    assert {("eager", "eager"), ("compiled", "compiled"), ("freezing", "freezing")} <= {
        (ratio["ours"], ratio["mode"]) for ratio in found["ratios"]
    }
    options = [row.get("compile_options") for row in found["rows"]]
    assert options[2:] == [
        {"layout_optimization": False},
        {},
        {"freezing": True, "layout_optimization": False},
        {"freezing": True},
    ]
    assert all(row["attention"] for row in found["rows"])
    (best,) = found["comparisons"]
    assert best["of"] == "PyTorch" and (best["ours"], best["mode"]) == tuple(found["fastest"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "dtype"), [("onnxruntime", "float32"), ("openvino", "float32"), ("openvino", "bfloat16")]
)
def test_other_runtimes(mode, dtype, capsys):
    pytest.importorskip(mode, reason="make extra installs it")
    found = run_case(["--modes", "eager", mode, "--dtype", dtype, "--size", "64"], capsys)
    assert modes(found)[2:] == [("ours", mode), ("timm", mode)]
    assert not any("failed" in row for row in found["rows"])
    assert len(found["outputs"]["rms_error"]) == 4  # of outputs that were compared
    assert [each["of"] for each in found["comparisons"]] == (["all"] if mode == "openvino" else [])


def test_what_cannot_run_is_a_row(capsys, tmp_path):
    words = ["--modes", "eager", "onnxruntime", "--dtype", "bfloat16", "--output", str(tmp_path)]
    assert run([*TINY, "--no-memory", *words, "--least", "0.001"]) == 1
    out, error = capsys.readouterr()
    assert "\ntimm onnxruntime failed: " in out
    assert error.splitlines()[-1].endswith("alt_gvt_demo inference bfloat16 onnxruntime: failed")
    (found,) = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert modes(found) == [(library, mode) for mode in ("eager", "onnxruntime") for library in ("ours", "timm")]
    assert ["failed" in row for row in found["rows"]] == [False, False, True, True]
    assert [ratio["mode"] for ratio in found["ratios"]] == ["eager"]
    cells = readme_tables.speeds([found])[-1].split(" | ")
    assert "failed / failed" in cells and cells[2] == "bfloat16"


def test_a_mode_that_was_faster_wins():
    times = {
        ("ours", "eager"): [2.0, 2.0],
        ("ours", "freezing"): [1.0, 1.0],
        ("ours", "openvino"): [0.5, 0.5],
        ("timm", "compiled"): [3.0, 4.0],
        ("timm", "openvino"): [2.0, 2.0],
    }
    found = [(each["of"], each["ours"], each["mode"], each["median"]) for each in tool.comparisons(times, "timm")]
    assert found == [("PyTorch", "freezing", "compiled", 3.5), ("all", "openvino", "openvino", 4.0)]
    assert tool.comparisons({name: times[name] for name in [("ours", "eager"), ("timm", "openvino")]}, "timm") == [
        {"of": "all", "ours": "eager", "library": "timm", "mode": "openvino", "median": 1.0, "q1": 1.0, "q3": 1.0}
    ]
    assert tool.comparisons({("timm", "eager"): [1.0]}, "timm") == tool.ratios({("timm", "eager"): [1.0]}) == []


# ---------------------------------------------------------------- processes


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_contender_sleeps_while_another_is_timed():
    names = ("ours", "eager"), ("timm", "eager")
    with turns.Contender(case(), names[0], CPU) as ours, turns.Contender(case(), names[1], CPU) as timm:
        assert ours.ask("time", 2) > 0 and timm.ask("time", 2) > 0
        before = [cpu_seconds(each.process.pid) for each in (ours, timm)]
        started, steps = time.monotonic(), 0
        while time.monotonic() < started + 1 or steps < 5:
            timm.ask("time", 1)
            steps += 1
        spent = [cpu_seconds(each.process.pid) - start for each, start in zip((ours, timm), before)]
        assert spent[0] <= 0.02 and spent[1] > 0.1
    assert not ours.process.is_alive() and not timm.process.is_alive()


def test_a_contender_without_enough_memory_says_so_and_ends():
    with turns.Contender(case(batch=10**9), ("ours", "eager"), CPU) as contender:
        assert contender.ask("time", 1) is None and "memory" in contender.failed
        assert not contender.process.is_alive() and contender.ask("time", 1) is None


def test_a_contender_that_is_killed_says_so():
    with turns.Contender(case(), ("ours", "eager"), CPU) as contender:
        contender.process.kill()
        assert contender.ask("time", 1) is None
    assert contender.failed == "its process ended with exit code -9 (out of memory?)"


@pytest.mark.slow
def test_memory(capsys):
    assert run([*TINY, "--modes", "eager", "--tasks", "training", "--json"]) == 0
    for row in json.loads(capsys.readouterr().out)["cases"][0]["rows"]:
        assert 100 < row["rest_mb"] <= row["peak_mb"] < 10_000


@pytest.mark.slow
def test_as_a_module_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "tools.benchmark", *EAGER, "--threads", "1", "--json"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=env)
    assert json.loads(done.stdout)["environment"]["threads"] == 1


WRONG = {
    "unknown model": (["--models", "alt_gvt_tiny"], "alt_gvt_tiny"),
    "unknown peer": (["--peers", "no_such_net"], "unknown model (--peers no_such_net)"),
    "float16 on a CPU": (
        ["--device", "cpu", "--dtype", "float16"],
        "float16 is for GPUs (--dtype float16, --device cpu): use bfloat16",
    ),
    "nothing to recompute": (["--recompute"], "nothing to recompute without a backward pass (--recompute)"),
    "graphs on a CPU": (["--device", "cpu", "--modes", "graphs"], "CUDA graphs without CUDA"),
    "training with constants": (
        ["--modes", "freezing", "--tasks", "training"],
        "weights that are constants do not train",
    ),
    "training elsewhere": (["--modes", "openvino", "--tasks", "training"], "for inference only (--modes openvino)"),
    "small": (["--size", "31"], "31 is below 32"),
    "no repeats": (["--repeats", "0"], "'0' is not a number from 1 up"),
    "not in mmsegmentation": (["--models", "alt_gvt_demo", "--tasks", "features"], "not in mmsegmentation"),
}


@pytest.mark.parametrize(("words", "part"), WRONG.values(), ids=WRONG)
def test_a_wrong_option_is_one_line(words, part, capsys):
    try:
        code = run(words)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and part in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_one_line(capsys):
    assert run(["--device", "cuda"]) == 2
    assert "no CUDA device (--device cuda" in capsys.readouterr().err


def test_no_bfloat16_on_a_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **named: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old GPU")
    with pytest.raises(tool.UserError, match=r"no bfloat16 \(--dtype bfloat16, an old GPU\): use float16"):
        tool.parse_args(["--device", "cuda", "--dtype", "bfloat16"])


def test_without_mmsegmentation_features_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("dense.libraries.importlib.util.find_spec", lambda name: None)
    assert run(["--tasks", "features"]) == 2
    assert (
        capsys.readouterr().err
        == "benchmark.py: error: segmentation needs mmcv, which is not installed: run make dense\n"
    )


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run([*EAGER, "--output", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("benchmark.py: error: cannot write (--output ")


def test_the_networks_of_others_take_other_sizes():
    model = contenders.build(case(size=64), "deit_tiny_patch16_224", CPU)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_every_option_is_read():
    assert isinstance(tool.parse_args([]), argparse.Namespace)
    source = (ROOT / "tools" / "benchmark.py").read_text()
    for name in vars(tool.parse_args([])):
        assert f"args.{name}" in source, name
