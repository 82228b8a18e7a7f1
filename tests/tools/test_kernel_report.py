"""python -m tools.kernel_report: counts of the kernels as they are compiled."""

import json

import pytest

from tools import kernel_report as tool


def test_a_report(tmp_path, capsys):
    pytest.importorskip("triton")
    tool.main(["--dtype", "float16", "--output", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["pass"], row["warps"]) for row in rows] == [
        (p, w) for p in ("forward", "backward") for w in (8, 4, 2, 1)
    ]
    for row in rows:
        assert 300 < row["instructions"] < 5000 and 16 < row["registers"] <= 255 and row["shared bytes"] > 0
        assert row["all warps"] == row["instructions"] * row["warps"]
    assert "forward" in capsys.readouterr().out
