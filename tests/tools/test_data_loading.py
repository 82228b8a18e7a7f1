"""tools/data_loading.py: every step is there, ratios follow from them, and unequal ways are not
timed.
"""

import copy
import functools
import json

import pytest
import timm
import torch

from tools import data_loading as tool  # first: it lets torchvision be imported
from training.errors import exit_code

run = functools.partial(exit_code, "data_loading.py", tool.main)


def test_a_run(toy, tmp_path, capsys):
    words = [
        "--data-path",
        toy,
        "--images",
        8,
        "--size",
        64,
        "--batch-size",
        4,
        "--repeats",
        2,
        "--warmup",
        0,
    ]
    assert run([*map(str, words), "--gpu-rate", "500", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "data_loading.json").read_text())
    assert results["environment"]["timm"]
    case = results["loading"]
    totals = {row["way"]: row["cpu_ms"]["median"] for row in case["rows"] if row["step"] == tool.LOADING}
    ways = [tool.OFFICIAL, tool.UINT8, tool.FAST, tool.TIMM, tool.V2]
    assert list(totals) == ways == [each["way"] for each in case["cores"]]
    assert [(each["way"], each["than"]) for each in case["ratios"]] == [
        *((way, tool.OFFICIAL) for way in ways[1:4]),
        *((way, tool.TIMM) for way in ways[1:3]),
        (tool.V2, tool.OFFICIAL),
        *((way, tool.V2) for way in ways[1:3]),
    ]
    for each in case["cores"]:
        assert each["cores_per_gpu"] == pytest.approx(500 * totals[each["way"]] / 1000)
    rows = (tmp_path / "data_loading.csv").read_text().splitlines()
    assert len(rows) == 1 + len(case["rows"])
    assert "cores feed a GPU that trains at 500 images/s (given, not measured here)" in capsys.readouterr().out


def test_ways_that_differ_are_not_timed(toy, monkeypatch, capsys):
    monkeypatch.setattr(tool, "MOST_DIFFERENT", -1.0)
    assert run(["--data-path", str(toy), "--images", "4", "--size", "64", "--batch-size", "4"]) == 2
    assert "nothing was timed" in capsys.readouterr().err


def test_uint8_batches_that_differ_are_not_timed(toy, monkeypatch, capsys):
    own = tool.build_ways
    monkeypatch.setattr(tool, "build_ways", lambda size: own(size) | {tool.UINT8: own(size)[tool.FAST]})
    monkeypatch.setattr(tool, "MOST_DIFFERENT", 1.0)
    assert run(["--data-path", str(toy), "--images", "4", "--size", "64", "--batch-size", "4"]) == 2
    assert "nothing was timed" in capsys.readouterr().err


def test_no_images_is_one_line(tmp_path, capsys):
    assert run(["--data-path", str(tmp_path)]) == 2 and run([]) == 2
    assert capsys.readouterr().err.count("data_loading.py: error: no images (--data-path") == 2


def test_the_loop_and_the_bare_step_do_the_same():
    torch.manual_seed(0)
    model = timm.create_model("alt_gvt_demo", num_classes=3)
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 2])) for _ in range(2)]
    ends = []
    for way in (lambda *given: tool.run_bare(*given, tool.CLIP), lambda *given: tool.run_loop(*given, tool.CLIP)):
        own = copy.deepcopy(model)
        way(own, batches, torch.optim.AdamW(own.parameters(), lr=1e-3, fused=True))
        ends.append(torch.cat([parameter.detach().flatten() for parameter in own.parameters()]))
    assert torch.equal(*ends) and not torch.equal(
        ends[0], torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    )


def test_a_run_of_the_loop(tmp_path, capsys):
    words = [
        "--loop",
        "--model",
        "alt_gvt_demo",
        "--size",
        "32",
        "--batch-size",
        "1",
        "--steps",
        "1",
        "--repeats",
        "3",
        "--warmup",
        "0",
    ]
    assert run([*words, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "data_loading.json").read_text())
    loop = results["loop"]
    assert (tmp_path / "table.txt").read_text() == tool.as_text(results) + "\n"
    assert [row["kind"] for row in loop["rows"]] == ["bare step", "bare step, clipped", "loop"]
    assert set(loop["loop_above_percent"]) == {"bare step", "bare step, clipped"}
    assert "% above the bare step, clipped (" in capsys.readouterr().out
    assert run(["--loop", "--model", "no_such"]) == 2 and "unknown model (--model no_such)" in capsys.readouterr().err
