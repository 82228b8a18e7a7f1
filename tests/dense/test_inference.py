"""The configs in scripts of one's own: the libraries' inference functions and inferencers take them."""

import json
import sys

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image
from toys import ROOT, noise, run

from dense import libraries
from training import checkpoint

CONFIGS = [
    path for folder in ("segmentation", "detection") for path in sorted((ROOT / folder / "configs").glob("*.py"))
]
CONFIGS += [path for folder in ("segmentation", "detection") for path in (ROOT / folder / "configs/small").glob("*.py")]
SMALL = {
    "mmseg": ROOT / "segmentation/configs/small/fpn_alt_gvt_demo_digits.py",
    "mmdet": ROOT / "detection/configs/small/mask_rcnn_alt_gvt_demo_digits.py",
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_test_pipeline(path):
    """It is the pipeline of the scores, under the names by which the libraries find what to replace in it."""
    libraries.load("mmseg" if "segmentation" in path.parts else "mmdet")
    cfg = Config.fromfile(path)
    assert cfg.test_pipeline == cfg.test_dataloader.dataset.pipeline
    assert {"LoadImageFromFile", "LoadAnnotations"} < {step["type"] for step in cfg.test_pipeline}
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        Compose(cfg.test_pipeline)


SCRIPTS = {
    "mmseg": """
import gvt, json, numpy, sys
from mmseg.apis import MMSegInferencer, inference_model, init_model
config, weights, image = sys.argv[1:]
found = [inference_model(init_model(config, file, device="cpu"), image) for file in (None, weights)]
found.append(MMSegInferencer(config, weights, device="cpu")(image, return_datasamples=True))
print(json.dumps([sample.pred_sem_seg.data.tolist() for sample in found]))
""",
    "mmdet": """
import gvt, json, sys
from mmdet.apis import DetInferencer, inference_detector, init_detector
config, weights, image = sys.argv[1:]
found = [inference_detector(init_detector(config, file, device="cpu"), image) for file in (None, weights)]
found += DetInferencer(config, weights, device="cpu")(image, return_datasamples=True)["predictions"]
print(json.dumps([sample.pred_instances.bboxes.tolist() for sample in found]))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("library", SCRIPTS)
def test_inference_in_a_script(library, tmp_path):
    """With weights, the function and the inferencer find the same."""
    libraries.load(library)
    cfg = Config.fromfile(SMALL[library])
    from mmengine.registry import MODELS

    with DefaultScope.overwrite_default_scope(library), libraries.quiet():
        model = MODELS.build(cfg.model)
    classes = tuple(cfg.test_dataloader.dataset.metainfo.classes)
    meta = dict(dataset_meta=dict(classes=list(classes), palette=[[9 * k, 0, 0] for k in range(len(classes))]))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    checkpoint.save(tmp_path / "weights.pth", dict(meta=meta, state_dict=model.state_dict()))
    Image.fromarray(noise(48, 80)).save(tmp_path / "image.png")
    (tmp_path / "script.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})" + SCRIPTS[library])
    result = run([sys.executable, "script.py", SMALL[library], "weights.pth", "image.png"], tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    fresh, function, inferencer = json.loads(result.stdout.splitlines()[-1])
    assert function == inferencer != fresh
    if library == "mmseg":
        assert torch.tensor(function).shape == (1, 48, 80)
