"""tools/count.py against the reported parameters and FLOPs, and against products counted by hand."""

import csv
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gvt
from tools import count as tool
from training.errors import exit_code

ROOT = Path(__file__).resolve().parents[2]
counted = functools.cache(tool.count)

# Parameters of the official logs; G of the paper's Table 1 (with attention's products) and of the official README
# (without).
REPORTED = {
    "pcpvt_small_v0": (24_106_216, "3.8", "3.7"),
    "pcpvt_base_v0": (43_828_456, "6.7", "6.4"),
    "pcpvt_large_v0": (60_989_672, "9.8", "9.5"),
    "alt_gvt_small": (24_060_776, "2.9", "2.8"),
    "alt_gvt_base": (56_070_952, "8.6", "8.3"),
    "alt_gvt_large": (99_271_400, "15.1", "14.8"),
}


@pytest.mark.parametrize("name", REPORTED)
def test_reported_figures(name):
    params, with_products, without = REPORTED[name]
    found = counted(name, 224)
    assert found["params"] == params
    assert f"{found['gmacs']:.1f}" == with_products
    assert f"{found['gmacs_without_attention']:.1f}" == without


def products_by_hand(variant: gvt.Variant, height: int, width: int) -> int:
    """Multiply-adds of q k^T and of attention x v: queries * keys * channels, twice, for each block."""
    total = 0
    for stage, depth in enumerate(variant.depths):
        height, width = height // gvt.PATCHES[stage], width // gvt.PATCHES[stage]
        for block in range(depth):
            if variant.window and block % 2 == 0:
                windows = -(-height // variant.window) * -(-width // variant.window)
                queries, keys = windows * variant.window**2, variant.window**2
            else:
                queries, keys = (
                    height * width,
                    (height // variant.sr_ratios[stage]) * (width // variant.sr_ratios[stage]),
                )
            total += 2 * queries * keys * variant.dims[stage]
    return total


# At 250 pixels the maps are no multiples of a window, nor of a sub-sampling.
@pytest.mark.parametrize(
    "name, size", [("pcpvt_small_v0", 224), ("pcpvt_small_v0", 250), ("alt_gvt_small", 224), ("alt_gvt_small", 250)]
)
def test_the_difference_is_attentions_products(name, size):
    found = counted(name, size)
    by_hand = products_by_hand(gvt.VARIANTS[gvt.MODEL_NAMES[name]], size, size)
    assert found["gmacs"] - found["gmacs_without_attention"] == pytest.approx(by_hand / 1e9, rel=1e-9)


def test_table(capsys):
    tool.main(["--model", "alt_gvt_small", "alt_gvt_demo"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["alt_gvt_small", "24,060,776", "2.927", "2.809"]
    assert lines[2].startswith("alt_gvt_demo")
    assert "224 x 224" in lines[3]
    assert "The paper counts" in lines[4]
    assert len(lines) == 5


WRONG_DENSE = [
    (["--dense", "fpn_alt_gvt_x"], "fpn_alt_gvt_x"),
    (["--dense", "--model", "alt_gvt_small"], "--dense goes without --model"),
    (["--dense", "--input-size", "224"], "--dense goes without --model and --input-size"),
    (["--csv", "x.csv"], "--csv is for --dense"),
]


@pytest.mark.parametrize(
    "argv, part",
    [(["--model", "alt_gvt_smal"], "alt_gvt_smal"), (["--input-size", "31"], "31 is below 32"), *WRONG_DENSE],
)
def test_a_wrong_option_is_one_line(argv, part, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert part in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------- segmentors and detectors, as counted before: tests/dense counts them


@functools.cache
def dense_counts() -> dict[str, dict[str, float]]:
    with open(ROOT / "logs" / "dense_counts.csv", newline="") as file:
        return {row.pop("model"): {key: float(value) for key, value in row.items()} for row in csv.DictReader(file)}


def test_all_are_counted():
    assert list(dense_counts()) == tool.DENSE
    assert len(tool.DENSE) == 24


@pytest.mark.parametrize("name", [name for name, reported in tool.reported_flops().items() if reported])
def test_reported_flops_of_segmentors_and_detectors(name):
    """Within 0.6 %, attention's products counted; those of Semantic FPN, which are rounded to 1 G of 37 to 102, within
    2 %, without them.
    """
    reported, found = tool.reported_flops()[name], dense_counts()[name]
    if name.startswith("fpn"):
        assert found["gmacs_without_attention"] == pytest.approx(float(reported), rel=0.02)
        assert found["gmacs"] > 1.04 * float(reported)
    else:
        assert found["gmacs"] == pytest.approx(float(reported), rel=0.006)


def test_which_reported_flops_are_known():
    unknown = {name for name, reported in tool.reported_flops().items() if not reported}
    assert unknown == {f"retinanet_{model}" for model in ("alt_gvt_b", "pcpvt_l", "alt_gvt_l")} | {
        "mask_rcnn_pcpvt_l",
        "mask_rcnn_alt_gvt_l",
    }


@pytest.mark.parametrize("name", tool.DENSE)
def test_the_difference_of_segmentors_and_detectors_is_attentions_products(name):
    size = (512, 512) if name.startswith(("fpn", "upernet")) else (600, 800)
    family, letter = name.split("_")[-2:]
    variant = gvt.VARIANTS[
        {"pcpvt": "pcpvt", "gvt": "alt_gvt"}[family] + {"s": "_small", "b": "_base", "l": "_large"}[letter]
    ]
    found = dense_counts()[name]
    assert found["gmacs"] - found["gmacs_without_attention"] == pytest.approx(
        products_by_hand(variant, *size) / 1e9, abs=1.1e-3
    )


def test_the_deconvolution_counts_as_a_convolution():
    """Its real products are a quarter: with a stride of 2 each pixel of the output sees one of the four weights."""
    operations = tool.at_output_size(
        (100, 256, 14, 14), (256, 256, 2, 2), None, 2, 0, 1, True, out_shape=(100, 256, 28, 28)
    )
    assert operations == 2 * 100 * 28 * 28 * 256 * 256 * 4


def test_without_the_libraries_dense_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(tool.libraries.importlib.util, "find_spec", lambda name: None)
    assert exit_code("count.py", tool.main, ["--dense", "fpn_alt_gvt_s"]) == 2
    assert (
        capsys.readouterr().err == "count.py: error: segmentation needs mmcv, which is not installed: run make dense\n"
    )


@pytest.mark.slow
def test_json_as_a_module_from_elsewhere(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tools.count",
        "--model",
        "alt_gvt_demo",
        "--input-size",
        "32",
        "--json",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=env)
    found = json.loads(done.stdout)
    assert found == {"alt_gvt_demo": counted("alt_gvt_demo", 32)}
    assert found["alt_gvt_demo"]["params"] == 2_736_040
