"""tools/count.py against the published parameters and FLOPs, and against products counted by hand."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import count as tool
import pytest

import gvt

ROOT = Path(__file__).resolve().parents[2]
counted = functools.cache(tool.count)

# Parameters of the published logs; G of the paper's Table 1 (with attention's products) and of the published README (without).
PUBLISHED = {
    "pcpvt_small_v0": (24_106_216, "3.8", "3.7"),
    "pcpvt_base_v0": (43_828_456, "6.7", "6.4"),
    "pcpvt_large_v0": (60_989_672, "9.8", "9.5"),
    "alt_gvt_small": (24_060_776, "2.9", "2.8"),
    "alt_gvt_base": (56_070_952, "8.6", "8.3"),
    "alt_gvt_large": (99_271_400, "15.1", "14.8"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    params, with_products, without = PUBLISHED[name]
    found = counted(name, 224)
    assert found["params"] == params
    assert f"{found['gmacs']:.1f}" == with_products
    assert f"{found['gmacs_without_attention']:.1f}" == without


def products_by_hand(variant: gvt.Variant, size: int) -> int:
    """Multiply-adds of q k^T and of attention x v: queries * keys * channels, twice, for each block."""
    total, side = 0, size
    for stage, depth in enumerate(variant.depths):
        side //= gvt.PATCHES[stage]
        for block in range(depth):
            if variant.window and block % 2 == 0:
                windows = -(-side // variant.window)
                queries, keys = (windows * variant.window) ** 2, variant.window**2
            else:
                queries, keys = side**2, (side // variant.sr_ratios[stage]) ** 2
            total += 2 * queries * keys * variant.dims[stage]
    return total


# At 250 pixels the maps are no multiples of a window, nor of a sub-sampling.
@pytest.mark.parametrize("name, size", [("pcpvt_small_v0", 224), ("pcpvt_small_v0", 250), ("alt_gvt_small", 224), ("alt_gvt_small", 250)])
def test_the_difference_is_attentions_products(name, size):
    found = counted(name, size)
    by_hand = products_by_hand(gvt.VARIANTS[gvt.MODEL_NAMES[name]], size)
    assert found["gmacs"] - found["gmacs_without_attention"] == pytest.approx(by_hand / 1e9, rel=1e-9)


def test_table(capsys):
    tool.main(["--model", "alt_gvt_small", "alt_gvt_demo"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["alt_gvt_small", "24,060,776", "2.927", "2.809"]
    assert lines[2].startswith("alt_gvt_demo")
    assert "224 x 224" in lines[3]
    assert "The paper counts" in lines[4]
    assert len(lines) == 5


@pytest.mark.parametrize("argv, part", [(["--model", "alt_gvt_smal"], "alt_gvt_smal"), (["--input-size", "31"], "31 is below 32")])
def test_a_wrong_option_is_one_line(argv, part, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert part in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_json_as_a_script_from_elsewhere(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "count.py"), "--model", "alt_gvt_demo", "--input-size", "32", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found == {"alt_gvt_demo": counted("alt_gvt_demo", 32)}
    assert found["alt_gvt_demo"]["params"] == 2_736_040
