"""The scores that the commands print, counted again from the files that they write: to the last digit, with one process
and with two.
"""

import contextlib
import importlib
import io
import json
import re
import sys

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from toys import DETECTOR, ROOT, SEGMENTOR, ade_toy, coco_toy, run, write

from dense import libraries
from training import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]  # of pycocotools
PROCESSES = (1, 2)


def random_weights(library, config, path):
    """Weights of a config's model, sharp enough that it finds several classes in each image."""
    libraries.load(library)
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    with libraries.quiet(), DefaultScope.overwrite_default_scope(library):
        state = importlib.import_module(f"{library}.registry").MODELS.build(cfg.model).state_dict()
    for name in (
        "decode_head.conv_seg.weight",
        "roi_head.bbox_head.fc_cls.weight",
        "roi_head.mask_head.conv_logits.weight",
    ):
        if name in state:
            state[name] *= 100
    checkpoint.save(path, dict(state_dict=state))
    return path


def scored(task, processes, *words):
    """What test.py, or dist_test.sh, prints."""
    config, file, *others = words
    script = ROOT / task
    start = (
        [sys.executable, script / "test.py", config, file]
        if processes == 1
        else ["bash", script / "dist_test.sh", config, file, processes]
    )
    result = run([*start, *others], config.parent)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentor")
    data = ade_toy(folder / "data")
    for path in (data / "annotations" / "validation").iterdir():
        with Image.open(path) as image:
            labels = np.array(image)
        labels[:5, 20:] = 255  # unlabeled, as 0 is
        Image.fromarray(labels).save(path)
    config = write(folder / "segmentor.py", SEGMENTOR, data=data)
    return config, random_weights("mmseg", config, folder / "random.pth"), data


@pytest.mark.parametrize("processes", PROCESSES)
def test_mean_intersection_over_union(segmentor, processes):
    config, file, data = segmentor
    out = config.parent / f"labels{processes}"
    output = scored("segmentation", processes, config, file, "--eval", "mIoU", "--out", out)
    counts = np.zeros((3, 3), np.int64)  # of pixels, by true and found class
    paths = sorted((data / "annotations" / "validation").iterdir())
    assert [path.name for path in paths] == sorted(path.name for path in out.iterdir())
    for path in paths:
        with Image.open(path) as true, Image.open(out / path.name) as found:
            true, found = np.array(true).astype(int), np.array(found).astype(int)
        assert true.shape == found.shape and found.min() >= 1 and found.max() <= 3
        known = (true != 0) & (true != 255)
        np.add.at(counts, (true[known] - 1, found[known] - 1), 1)
    assert (counts > 0).all() and {0, 255} <= set(np.unique(true))
    right, true, found = counts.diagonal(), counts.sum(1), counts.sum(0)
    expected = dict(
        aAcc=right.sum() / counts.sum(), mIoU=(right / (true + found - right)).mean(), mAcc=(right / true).mean()
    )
    printed = {name: re.findall(rf"\b{name}: ([\d.]+)", output)[-1] for name in expected}
    assert printed == {name: f"{round(value * 100, 2):.4f}" for name, value in expected.items()}
    assert all(5 < float(value) < 95 for value in printed.values())


NAMES = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A toy whose objects are some of what a random model finds, moved a little: there is something to find, and not
    all is found.
    """
    folder = tmp_path_factory.mktemp("detector")
    libraries.load("mmdet")
    data = coco_toy(folder / "data")
    with_low_scores = DETECTOR + 'model["test_cfg"] = dict(rcnn=dict(score_thr=0.0, max_per_img=40))\n'
    config = write(folder / "detector.py", with_low_scores, data=data, setting="mask_rcnn_3x_swin", masks=True)
    file = random_weights("mmdet", config, folder / "random.pth")
    scored("detection", 1, config, file, "--format-only", "--eval-options", f"jsonfile_prefix={folder / 'first'}")
    found = json.loads((folder / "first.segm.json").read_text())
    path = data / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text()) | dict(annotations=[])
    for number, each in enumerate(found[::7]):
        mask = masks.decode(each["segmentation"])
        mask[:, : number % 4] = 0
        if mask.any():
            outline = masks.encode(np.asfortranarray(mask))
            about = dict(
                bbox=[*each["bbox"][:2], each["bbox"][2] * (1 - number % 5 / 20), each["bbox"][3]],
                area=int(mask.sum()),
                iscrowd=int(number % 11 == 0),
            )
            outline["counts"] = outline["counts"].decode()
            content["annotations"].append(
                dict(
                    about,
                    id=number + 1,
                    image_id=each["image_id"],
                    category_id=each["category_id"],
                    segmentation=outline,
                )
            )
    path.write_text(json.dumps(content))
    return config, file, path


@pytest.mark.parametrize("processes", PROCESSES)
def test_average_precision(detector, processes):
    config, file, annotations = detector
    results = config.parent / f"results{processes}"
    output = scored(
        "detection", processes, config, file, "--eval", "bbox", "segm", "--eval-options", f"jsonfile_prefix={results}"
    )
    for kind in ("bbox", "segm"):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(annotations)
            found = json.loads((config.parent / f"results{processes}.{kind}.json").read_text())
            if kind == "segm":
                for each in found:
                    del each["bbox"]  # with it, a mask would be small or large by its box
            count = COCOeval(truth, truth.loadRes(found), kind)
            count.evaluate()
            count.accumulate()
            count.summarize()
        printed = [re.findall(rf"coco/{kind}_{name}: (-?[\d.]+)", output)[-1] for name in NAMES]
        assert printed == [f"{round(value, 3):.4f}" for value in count.stats[:6]]
        assert all(0.02 < float(value) < 0.98 for value in printed[:2]), printed
