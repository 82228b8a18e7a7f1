"""tools/count.py --dense: the file of counts is what it finds, and the paper's table of parameters is the one that the
configs are held against.
"""

import json

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

from conftest import ROOT
from test_configs import PARAMETERS, TABLE

from tools import count as tool
from tools.readme_tables import by_config

COUNTS = {line.split(",")[0]: line for line in (ROOT / "logs" / "dense_counts.csv").read_text().splitlines()}
EVERYDAY = {"fpn_pcpvt_s", "upernet_alt_gvt_s", "retinanet_alt_gvt_s", "mask_rcnn_pcpvt_s"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in EVERYDAY else pytest.mark.slow) for name in tool.DENSE]
)
def test_the_file_is_what_the_tool_finds(name):
    found = tool.count_dense(name)
    assert tool.as_csv({name: found}).splitlines() == [COUNTS["model"], COUNTS[name]]
    config = next(config for config in TABLE if tool.dense_model(config) == name)
    assert found["params"] == PARAMETERS[config.split("_")[0], TABLE[config][1]][0]


def test_the_papers_parameters():
    """The rows of 36 epochs have none: it is the same model."""
    for row, _ in by_config(("",)):
        config = row["config"]
        assert row["params_m"] == ("" if "_3x_" in config else PARAMETERS[config.split("_")[0], TABLE[config][1]][2]), (
            config
        )


def test_command(tmp_path, capsys):
    file = tmp_path / "counts.csv"
    tool.main(["--dense", "fpn_alt_gvt_s", "retinanet_alt_gvt_b", "--csv", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("paper")
    assert lines[1].split() == ["fpn_alt_gvt_s", "27,798,934", "38.628", "36.648", "37"]
    assert lines[2].split() == ["retinanet_alt_gvt_b", "66,241,396", "163.044", "151.803"]
    assert "512 x 512" in lines[3] and "800 x 600" in lines[3] and "Semantic FPN" in lines[4]
    assert file.read_text().splitlines() == [COUNTS[name] for name in ("model", "fpn_alt_gvt_s", "retinanet_alt_gvt_b")]
    tool.main(["--dense", "fpn_alt_gvt_s", "--json"])
    assert json.loads(capsys.readouterr().out) == {"fpn_alt_gvt_s": tool.count_dense("fpn_alt_gvt_s")}
