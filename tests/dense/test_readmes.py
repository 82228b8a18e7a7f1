"""The configs that segmentation/README.md and detection/README.md show build."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from toys import ROOT

from dense import libraries


def shown(folder: str) -> list[str]:
    return re.findall(r"```python\n(_base_ = .*?)```", (ROOT / folder / "README.md").read_text(), re.S)


def build(text: str, base: Path, library: str, tmp_path: Path):
    """Return the config of a README's text, whose _base_ is in the folder `base`, and its model."""
    libraries.load(library)
    (tmp_path / "mine.py").write_text(re.sub(r'_base_ = "(\./)?', f'_base_ = "{base}/', text))
    cfg = Config.fromfile(tmp_path / "mine.py")
    init_default_scope(library)
    cfg.model.backbone.pretrained = None
    registry = __import__(f"{library}.registry", fromlist=["MODELS"]).MODELS
    with libraries.quiet(), torch.device("meta"):
        return cfg, registry.build(cfg.model)


def test_the_backbone_in_another_config(tmp_path):
    (text,) = [text for text in shown("segmentation") if "custom_imports" in text]
    upernet = Path(importlib.util.find_spec("mmseg").submodule_search_locations[0]) / ".mim" / "configs" / "upernet"
    _, model = build(text, upernet, "mmseg", tmp_path)
    assert type(model.backbone).__name__ == "TwinsBackbone" and model.backbone.variant == "alt_gvt_small"
    assert list(model.decode_head.in_channels) == [64, 128, 256, 512] and model.auxiliary_head.in_channels == 256


@pytest.mark.parametrize("folder, library", [("segmentation", "mmseg"), ("detection", "mmdet")])
def test_your_own_data_set(folder, library, tmp_path):
    """Data and heads have the same classes, and every path is the data set's."""
    (text,) = [text for text in shown(folder) if "mine" in text]
    assert len(text.splitlines()) <= 12
    cfg, model = build(text, ROOT / folder / "configs", library, tmp_path)
    for part in ("train", "val", "test"):
        dataset = cfg[f"{part}_dataloader"].dataset
        classes = dataset.metainfo.classes
        assert dataset.data_root.rstrip("/") == "data/mine" and dataset.type in ("BaseSegDataset", "CocoDataset")
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.get("ann_file", "data/mine").startswith("data/mine")
    heads = [module for name, module in model.named_modules() if "head" in name and "rpn" not in name]
    assert {head.num_classes for head in heads if hasattr(head, "num_classes")} == {len(classes)}
