"""The measurement of what feeds a training: every step is there, ratios follow from them, and unequal ways are not
timed.
"""

import copy
import json

import pytest
import timm
import torch

from tools import feeding  # first: it lets torchvision be imported


def test_a_run(toy, tmp_path, capsys):
    words = [
        "--data-path",
        toy,
        "--pictures",
        8,
        "--size",
        64,
        "--batch-size",
        4,
        "--repeats",
        2,
        "--warmup",
        0,
        "--processes",
        0,
    ]
    assert feeding.run([*map(str, words), "--gpu-rate", "500", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "feeding.json").read_text())
    assert [case["pictures"] for case in results["cases"]] == ["as they are", "enlarged to 375"] and results[
        "environment"
    ]["timm"]
    for case in results["cases"]:
        totals = {row["way"]: row["cpu_ms"]["median"] for row in case["rows"] if row["step"] == feeding.LOADING}
        assert (
            list(totals)
            == [feeding.PUBLISHED, feeding.BYTES, feeding.FAST]
            == [each["way"] for each in case["feeding"]]
        )
        for each in case["feeding"]:
            assert each["cores_a_gpu"] == pytest.approx(500 * totals[each["way"]] / 1000)
    rows = (tmp_path / "feeding.csv").read_text().splitlines()
    assert len(rows) == 1 + sum(len(case["rows"]) for case in results["cases"])
    assert "cores feed a GPU that trains at 500 pictures/s (given, not measured here)" in capsys.readouterr().out


def test_ways_that_differ_are_not_timed(toy, monkeypatch, capsys):
    monkeypatch.setattr(feeding, "FEW", -1.0)
    assert feeding.run(["--data-path", str(toy), "--pictures", "4", "--size", "64", "--batch-size", "4"]) == 2
    assert "nothing was timed" in capsys.readouterr().err


def test_bytes_that_differ_are_not_timed(toy, monkeypatch, capsys):
    own = feeding.transforms_of
    monkeypatch.setattr(feeding, "transforms_of", lambda size: own(size) | {feeding.BYTES: own(size)[feeding.FAST]})
    monkeypatch.setattr(feeding, "FEW", 1.0)
    assert feeding.run(["--data-path", str(toy), "--pictures", "4", "--size", "64", "--batch-size", "4"]) == 2
    assert "nothing was timed" in capsys.readouterr().err


def test_no_pictures_is_one_line(tmp_path, capsys):
    assert feeding.run(["--data-path", str(tmp_path)]) == 2 and feeding.run([]) == 2
    assert capsys.readouterr().err.count("feeding.py: error: no pictures (--data-path") == 2


def test_the_loop_and_the_bare_step_do_the_same():
    torch.manual_seed(0)
    model = timm.create_model("alt_gvt_demo", num_classes=3)
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 2])) for _ in range(2)]
    ends = []
    for way in (lambda *given: feeding.bare(*given, clip=True), feeding.looped):
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
    assert feeding.run([*words, "--output", str(tmp_path)]) == 0
    loop = json.loads((tmp_path / "feeding.json").read_text())["loop"]
    assert (tmp_path / "table.txt").read_text() == feeding.loop_table(loop) + "\n"
    assert [row["kind"] for row in loop["rows"]] == ["bare step", "bare step, clipped", "loop"]
    assert set(loop["loop_above_percent"]) == {"bare step", "bare step, clipped"}
    assert "% above the bare step, clipped (" in capsys.readouterr().out
    assert (
        feeding.run(["--loop", "--model", "no_such"]) == 2
        and "unknown model (--model no_such)" in capsys.readouterr().err
    )
