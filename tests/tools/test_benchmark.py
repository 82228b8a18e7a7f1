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
from pathlib import Path

import pytest
import torch

from tools import benchmark as tool
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
    "64",
    "--repeats",
    "3",
    "--warmup",
    "1",
    "--device",
    "cpu",
]
EAGER = [*TINY, "--modes", "eager", "--no-memory"]
COLUMNS = ["model", "task", "dtype", "batch", "size", "library", "mode", "ms", "ms_q1", "ms_q3", "pictures_per_s"]
COLUMNS += ["ours_faster", "share_of_product_rate", "peak_mb", "rest_mb"]
run = functools.partial(exit_code, "benchmark.py", tool.main)


def case(task="inference", dtype="float32", *, model="alt_gvt_demo", batch=2, size=64) -> tool.Case:
    return tool.Case(model, task, dtype, batch, size)


def runners(which: tool.Case) -> dict:
    libraries = ("ours", tool.SAME_WEIGHTS[which.task])
    return {
        (library, "eager"): tool.Runner(which, tool.build(which, library, CPU), "eager", CPU) for library in libraries
    }


# ---------------------------------------------------------------- equal outputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", ["inference", "training"])
@pytest.mark.parametrize("size", [64, 96])  # at 96 the windows have padding
def test_outputs_agree(task, dtype, size):
    which = case(task, dtype, size=size)
    found = tool.check_outputs(which, runners(which), CPU)
    assert set(found["rms_error"]) == {"ours eager", "timm eager"}
    assert 0 < found["rms_error_of_dtype"] < (1e-5 if dtype == "float32" else 0.05) * found["rms_of_outputs"]


@pytest.mark.parametrize("task", ["inference", "training"])
@pytest.mark.parametrize("library", ["ours", "timm"])
def test_other_outputs_are_refused_before_anything_is_timed(task, library, monkeypatch, capsys):
    def changed(case, which, device, build=tool.build):
        model = build(case, which, device)
        if which == library and case.dtype == "float32" and not made.append(which) and len(made) == 1:
            with torch.no_grad():
                model.blocks[2][0].mlp.fc1.bias[3] += 0.01
        return model

    made = []
    monkeypatch.setattr(tool, "build", changed)
    monkeypatch.setattr(tool, "run_rounds", lambda *args, **kwargs: pytest.fail("timed"))
    assert run([*EAGER, "--tasks", task]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"benchmark.py: error: outputs differ ({library} eager, alt_gvt_demo {task} float32 2 x 64 x 64): off by "
    )
    assert error.endswith("nothing was timed")


def test_the_reference_of_a_large_batch_is_made_in_parts(monkeypatch):
    monkeypatch.setattr(tool, "REFERENCE_CHUNK", 2)
    for task in ("inference", "training"):
        which = case(task, batch=3)
        exact, _ = tool.reference(which, CPU)
        monkeypatch.setattr(tool, "REFERENCE_CHUNK", 8)
        whole, _ = tool.reference(which, CPU)
        assert exact.dtype == torch.float64 and (exact - whole).abs().max() < 1e-12
        monkeypatch.setattr(tool, "REFERENCE_CHUNK", 2)


def test_a_training_step_trains():
    which = case("training")
    runner = tool.Runner(which, tool.build(which, "ours", CPU), "eager", CPU)
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


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setitem(tool.GEMM_SIDE, "cpu", 64)


@pytest.mark.slow
def test_results(tmp_path, capsys, small_limits):
    words = ["--tasks", "inference", "training", "--peers", "pvt_v2_b0", "--output", str(tmp_path / "out")]
    assert run([*EAGER, *words, "--batch-size", "1", "2"]) == 0
    out, error = capsys.readouterr()
    assert "case 4 of 4: alt_gvt_demo training float32 2 x 64 x 64" in error and "round 3 of 3" in error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"command", "commit", "torch", "timm", "threads", "hardware", "started"} <= set(results["environment"])
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


def test_json_and_a_bound(capsys, small_limits):
    assert run([*EAGER, "--json", "--least", "1000"]) == 1
    out, error = capsys.readouterr()
    assert json.loads(out)["cases"][0]["model"] == "alt_gvt_demo"
    assert error.splitlines()[-1].startswith(
        "benchmark.py: too slow (--least 1000): alt_gvt_demo inference float32 eager: "
    )
    assert run([*EAGER, "--json", "--least", "0.001"]) == 0


def test_a_profile(capsys, small_limits):
    assert run([*EAGER, "--profile"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("timm eager: ")]
    shares = dict(part.rsplit(" ", 2)[:2] for part in line.removeprefix("timm eager: ").split(", "))
    assert {"addmm", "native_layer_norm"} <= set(shares)
    assert 50 < sum(map(int, shares.values())) <= 105


def test_recomputing_is_measured_beside_ours(capsys, small_limits):
    assert run([*EAGER, "--tasks", "training", "--recompute", "--batch-size", "1", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["cases"]
    assert [each["library"] for each in found["rows"]] == ["ours", "timm", "MLP recomputed"]
    assert set(found["outputs"]["rms_error"]) == {"ours eager", "timm eager", "MLP recomputed eager"}
    assert [each["library"] for each in found["ratios"]] == ["timm", "MLP recomputed"]
    assert all("share_of_product_rate" in each for each in found["rows"])


@pytest.mark.slow
def test_a_dense_backbone(capsys, small_limits):
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
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled(capsys, small_limits):
    assert run([*TINY, "--no-memory", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["cases"]
    names = [(row["library"], row["mode"]) for row in found["rows"]]
    assert names == [(library, mode) for mode in ("eager", "compiled") for library in ("ours", "timm")]
    assert {("eager", "eager"), ("compiled", "compiled")} <= {
        (ratio["ours"], ratio["mode"]) for ratio in found["ratios"]
    }


@pytest.mark.slow
def test_memory(capsys, small_limits):
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


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys, small_limits):
    (tmp_path / "file").write_text("")
    assert run([*EAGER, "--output", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("benchmark.py: error: cannot write (--output ")


def test_the_networks_of_others_take_other_sizes():
    model = tool.build(case(size=64), "deit_tiny_patch16_224", CPU)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_every_option_is_read():
    assert isinstance(tool.parse_args([]), argparse.Namespace)
    source = (ROOT / "tools" / "benchmark.py").read_text()
    for name in vars(tool.parse_args([])):
        assert f"args.{name}" in source, name
