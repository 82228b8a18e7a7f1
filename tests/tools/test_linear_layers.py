"""python -m tools.linear_layers: the layers that it times are the model's, and its record."""

import json
from collections import Counter

import pytest
import timm
from torch import nn

from gvt_ops import onednn
from tools import linear_layers as tool


@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
def test_the_layers_are_those_of_the_model(name):
    timed = Counter()
    for layers in tool.layers_of(name, 2).values():
        for rows, inputs, outputs, often in layers:
            assert rows in (2 * 56 * 56, 2 * 28 * 28, 2 * 14 * 14, 2 * 7 * 7)
            timed[inputs, outputs] += often
    found = Counter()
    for path, module in timm.create_model(name).named_modules():
        if isinstance(module, nn.Linear) and path.startswith("blocks") and not path.endswith((".q", ".kv")):
            found[module.in_features, module.out_features] += 1
        elif path.endswith(".kv"):  # with its q, as one layer
            found[module.in_features, module.out_features * 3 // 2] += 1
    assert timed == found


@pytest.mark.skipif(not onednn.AVAILABLE, reason="no oneDNN with AVX-512 on this machine")
def test_a_record(tmp_path, capsys):
    words = ["--models", "alt_gvt_small", "--dtype", "float32", "--batch-size", "1", "--repeats", "1"]
    tool.main([*words, "--output", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "linear_layers.json").read_text())["rows"]
    assert list(row) == ["Model", "dtype", "Batch", *tool.KINDS, "Cost"] and float(row["qkv"]) > 0
    assert "alt_gvt_small" in capsys.readouterr().out
