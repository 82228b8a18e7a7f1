"""Segmentors and detectors learn: the configs of configs/small."""

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from toys import ROOT, run

from dense import libraries
from tools import scenes

SMALL = [
    path for task in ("segmentation", "detection") for path in sorted((ROOT / task / "configs" / "small").glob("*.py"))
]


def last_scores(work: Path) -> dict:
    lines = [
        json.loads(line) for path in work.glob("*/vis_data/scalars.json") for line in path.read_text().splitlines()
    ]
    return [line for line in lines if "mIoU" in line or "coco/bbox_mAP" in line][-1]


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_small_configs_build(path):
    libraries.load({"segmentation": "mmseg", "detection": "mmdet"}[path.parents[2].name])
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    registry = __import__(f"{cfg.default_scope}.registry", fromlist=["MODELS"]).MODELS
    with libraries.quiet(), torch.device("meta"):
        model = registry.build(cfg.model)
    classes = {
        module.num_classes
        for name, module in model.named_modules()
        if "head" in name and hasattr(module, "num_classes") and "rpn" not in name
    }
    named = cfg.train_dataloader.dataset.get("metainfo", {}).get("classes")
    assert classes == {len(named) if named else 80}
    assert re.search(rf"python train.py configs/small/{path.name}", path.read_text())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    scenes.write(root / "segmentation", root / "detection", counts={"train": 200, "val": 20}, seed=0)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, name, iterations",
    [("segmentation", "fpn_alt_gvt_demo_digits", 400), ("detection", "mask_rcnn_alt_gvt_demo_digits", 200)],
)
def test_the_demo_learns_from_fresh_weights(digits, tmp_path, task, name, iterations):
    data = digits / task
    options = [
        "model.backbone.pretrained=None",
        f"train_cfg.max_iters={iterations}",
        f"train_cfg.val_interval={iterations}",
    ]
    options += [f"{part}_dataloader.dataset.data_root={data}/" for part in ("train", "val")]
    if task == "detection":
        options.append(f"val_evaluator.ann_file={data}/annotations/instances_val2017.json")
    command = [
        sys.executable,
        "train.py",
        f"configs/small/{name}.py",
        "--seed",
        "0",
        "--work-dir",
        tmp_path,
        "--cfg-options",
        *options,
    ]
    result = run(command, ROOT / task, timeout=590)
    assert result.returncode == 0, result.stderr[-2000:]
    found = last_scores(tmp_path)
    if task == "segmentation":
        assert found["mIoU"] > 25  # all background: 9
    else:
        assert found["coco/bbox_mAP_50"] > 0.7 and found["coco/segm_mAP_50"] > 0.7


GOALS = {
    "retinanet_alt_gvt_s_first_8": {"coco/bbox_mAP_50": 0.85, "coco/bbox_mAP": 0.6},
    "mask_rcnn_alt_gvt_s_first_8": {"coco/bbox_mAP_50": 0.85, "coco/segm_mAP_50": 0.7},
}


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", GOALS)
@pytest.mark.skipif(
    not (ROOT / "detection/data/coco-mini").exists(),
    reason="no images of COCO in detection/data/coco-mini: ten minutes each",
)
def test_a_detector_learns_eight_pictures_by_heart(tmp_path, name):
    command = [sys.executable, "train.py", f"configs/small/{name}.py", "--seed", "0", "--work-dir", tmp_path]
    result = run(command, ROOT / "detection", timeout=2300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = last_scores(tmp_path)
    assert all(found[key] >= least for key, least in GOALS[name].items()), found
