"""Small data sets in ADE20K's and COCO's formats, small configs on them, and the commands as a user runs them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("ant", "bee", "cat")


def blocks(random, height, width):
    """An image of gray noise with three colored blocks, and their boxes."""
    pixels = random.integers(90, 160, (height, width, 3)).astype(np.uint8)
    boxes = []
    for number in range(3):
        y, x = random.integers(0, height // 2), random.integers(0, width // 2)
        h, w = random.integers(height // 4, height // 2), random.integers(width // 4, width // 2)
        pixels[y : y + h, x : x + w, number] = 240
        boxes.append((int(x), int(y), int(w), int(h)))
    return pixels, boxes


def ade_toy(root: Path) -> Path:
    """ADEChallengeData2016's folders: labels from 1, 0 is unlabeled."""
    random = np.random.default_rng(0)
    for part, count in dict(training=9, validation=5).items():
        (root / "images" / part).mkdir(parents=True)
        (root / "annotations" / part).mkdir(parents=True)
        for number in range(count):
            pixels, boxes = blocks(random, 48 + 8 * (number % 3), 80)
            labels = np.zeros(pixels.shape[:2], np.uint8)
            for label, (x, y, w, h) in enumerate(boxes, start=1):
                labels[y : y + h, x : x + w] = label
            Image.fromarray(pixels).save(root / "images" / part / f"{part}_{number}.jpg")
            Image.fromarray(labels).save(root / "annotations" / part / f"{part}_{number}.png")
    return root


def coco_toy(root: Path) -> Path:
    """COCO's folders and classes, of which three are in the images."""
    from mmdet.datasets import CocoDataset

    random = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for part, count in dict(train2017=7, val2017=3).items():
        (root / part).mkdir()
        images, annotations = [], []
        for number in range(count):
            height, width = ((48, 64), (64, 48))[number % 2]
            pixels, boxes = blocks(random, height, width)
            Image.fromarray(pixels).save(root / part / f"{number:012}.jpg")
            images.append(dict(id=number, file_name=f"{number:012}.jpg", height=height, width=width))
            for category, (x, y, w, h) in enumerate(boxes, start=1):
                outline = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(
                    dict(
                        id=len(annotations),
                        image_id=number,
                        category_id=category,
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=0,
                        segmentation=[outline],
                    )
                )
        categories = [dict(id=key, name=name) for key, name in enumerate(CocoDataset.METAINFO["classes"], start=1)]
        (root / "annotations" / f"instances_{part}.json").write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories))
        )
    return root


SEGMENTOR = """
_base_ = "{root}/segmentation/configs/_base_/fpn_80k_ade20k.py"
from dense.models import with_fpn

part = with_fpn("alt_gvt_demo")
part["backbone"]["pretrained"] = None
model = dict(**part, data_preprocessor=dict(size=(32, 32)), decode_head=dict(num_classes=3))
facts = dict(
    type="BaseSegDataset",
    metainfo=dict(classes={classes}, palette=[[250, 0, 0], [0, 250, 0], [0, 0, 250]]),
    data_root="{data}",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=True,
)
train = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(80, 48), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(32, 32), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
small = [dict(type="Resize", scale=(40, 24), keep_ratio=True), dict(type="Resize", scale=(80, 48), keep_ratio=True)]
test = [dict(type="LoadImageFromFile"), small[1], dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
flips = [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)]
tta_pipeline = [test[0], dict(type="TestTimeAug", transforms=[small, flips, [test[2]], [test[3]]])]
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(**facts, pipeline=train))
val_dataloader = dict(num_workers=0, dataset=dict(**facts, pipeline=test))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
"""

DETECTOR = """
_base_ = "{root}/detection/configs/_base_/{setting}.py"
from dense.models import with_fpn

model = with_fpn("alt_gvt_demo")
model["backbone"]["pretrained"] = None
resize = dict(type="Resize", scale=(64, 64), keep_ratio=True)
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True, with_mask={masks})]
train = [*load, resize, dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")]
test = [load[0], resize, load[1], dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"))]
train_dataloader = dict(num_workers=0, dataset=dict(data_root="{data}/", pipeline=train))
val_dataloader = dict(num_workers=0, dataset=dict(data_root="{data}/", pipeline=test))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="{data}/annotations/instances_val2017.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1))
"""


def write(path: Path, text: str, **values) -> Path:
    path.write_text(text.format(root=ROOT, classes=CLASSES, **values))
    return path


def run(command: list, folder: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """A command in a folder, one thread a process, with this Python."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PORT": str(free_port())}
    return subprocess.run(
        [str(word) for word in command], cwd=folder, env=settings, capture_output=True, text=True, timeout=timeout
    )


def forget_visualizers() -> None:
    """Forget those of earlier runs in this process, which mmengine would use again."""
    from mmengine.visualization import Visualizer

    for kind in (Visualizer, *Visualizer.__subclasses__()):
        kind._instance_dict.clear()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ---------------------------------------------------------------- what people have


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels)).astype(np.uint8)


# Each is an image that can be used, as PNG.
STRANGE = {
    "one pixel": lambda: Image.fromarray(noise(1, 1)),
    "one row": lambda: Image.fromarray(noise(1, 4000)),
    "one column": lambda: Image.fromarray(noise(4000, 1)),
    "odd sides": lambda: Image.fromarray(noise(37, 53)),
    "gray": lambda: Image.fromarray(noise(48, 80)[..., 0]),
    "transparent": lambda: Image.fromarray(noise(48, 80, 4)),
    "16 bits": lambda: Image.fromarray(noise(48, 80)[..., 0].astype(np.uint16) * 257),
    "palette": lambda: Image.fromarray(noise(48, 80)).quantize(16),
    "black and white": lambda: Image.fromarray(noise(48, 80)).convert("1"),
}


def give_image(root: Path, number: int, image: Image.Image) -> None:
    """Replace a training and a validation image of a toy and its annotations: a label of each class, a box of all of
    it.
    """
    width, height = image.size
    if (root / "images").is_dir():
        for part in ("training", "validation"):
            image.save(root / "images" / part / f"{part}_{number}.jpg", "PNG")  # readers look at the content
            labels = np.arange(height * width).reshape(height, width) % 4
            Image.fromarray(labels.astype(np.uint8)).save(root / "annotations" / part / f"{part}_{number}.png")
        return
    for part in ("train2017", "val2017"):
        name = f"{number:012}.jpg"
        image.save(root / part / name, "PNG")
        with annotations(root, part) as content:
            content["images"] = [each for each in content["images"] if each["id"] != number]
            content["images"].append(dict(id=number, file_name=name, height=height, width=width))
            content["annotations"] = [each for each in content["annotations"] if each["image_id"] != number]
            outline = [0, 0, width, 0, width, height, 0, height]
            about = dict(bbox=[0, 0, width, height], area=width * height, iscrowd=0, segmentation=[outline])
            content["annotations"].append(dict(id=1000 + number, image_id=number, category_id=1, **about))


@contextlib.contextmanager
def annotations(root: Path, part: str) -> Iterator[dict]:
    """The content of a COCO file, to change it in place."""
    path = root / "annotations" / f"instances_{part}.json"
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))
