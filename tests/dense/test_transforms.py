"""Our transforms stand beside those of the libraries, and do what these do except for a single row or column."""

import importlib

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import mmcv
import numpy as np
from mmengine.registry import TRANSFORMS, DefaultScope

from dense import libraries
from dense.transforms import CHECKED, with_checks
from training.errors import library_reason

SIZES = [(1, 1), (1, 4000), (4000, 1), (37, 53)]


@pytest.fixture(params=libraries.TASKS)
def library(request):
    libraries.load(request.param)
    with DefaultScope.overwrite_default_scope(request.param):
        yield request.param


def test_the_libraries_are_as_they_were(library):
    """Their names mean their classes, and their functions are their own."""
    importlib.import_module("dense.runner")
    for name in ("segmentor", "label_files") if library == "mmseg" else ("coco_files",):
        importlib.import_module(f"dense.{name}")
    registry = importlib.import_module(f"{library}.registry")
    for name in CHECKED[library]:
        for title, module in ((name, f"{library}."), (f"Twins{name}", "dense.")):
            kinds = (registry.TRANSFORMS, registry.METRICS, registry.DATASETS)
            (found,) = filter(None, (each.get(title) for each in kinds))
            assert found.__module__.startswith(module)
    for function in (mmcv.imflip, mmcv.rescale_size, mmcv.image.geometric._scale_size):
        assert function.__module__ == "mmcv.image.geometric"


def test_names_in_a_config():
    """At any depth, in a copy; a RandomResize names the default of its inner type; tuples stay tuples."""
    flip, size = dict(type="RandomFlip", prob=0.5), dict(scale=(80, 48), keep_ratio=True)
    load = dict(type="LoadAnnotations")
    config = dict(dataset=dict(pipeline=[load, dict(type="RandomChoice", transforms=[[flip]])]), scope=("Resize",))
    assert with_checks(config, "mmseg") == dict(
        dataset=dict(
            pipeline=[
                dict(type="TwinsLoadAnnotations"),
                dict(type="RandomChoice", transforms=[[dict(type="TwinsRandomFlip", prob=0.5)]]),
            ]
        ),
        scope=("Resize",),
    )
    assert config["dataset"]["pipeline"][0] == dict(type="LoadAnnotations") and flip["type"] == "RandomFlip"
    assert with_checks(load, "mmdet") == dict(type="TwinsLoadAnnotations")
    resized = dict(type="RandomResize", **size)
    assert with_checks(resized, "mmdet") == dict(resized, resize_type="TwinsResize")
    own = dict(type="RandomResize", resize_type="FixScaleResize", **size)
    assert with_checks(own, "mmdet") == own


def results_of(size, library):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    labels = image[..., 0].copy()
    return dict(img=image, img_shape=size, ori_shape=size, gt_seg_map=labels, seg_fields=["gt_seg_map"])


@pytest.mark.parametrize("size", SIZES)
def test_resize_and_flip(library, size):
    """The libraries' own results, where they have one; no side is 0, and torch takes the pixels."""
    resize, flip = dict(scale=(80, 48), keep_ratio=True), dict(prob=1.0)
    ours = [
        TRANSFORMS.build(dict(type=f"Twins{name}", **options))
        for name, options in (("Resize", resize), ("RandomFlip", flip))
    ]
    theirs = [
        TRANSFORMS.build(dict(type=name, **options)) for name, options in (("Resize", resize), ("RandomFlip", flip))
    ]
    found = results_of(size, library)
    for transform in ours:
        found = transform(found)
    height, width = found["img"].shape[:2]
    assert min(height, width) >= 1 and found["img_shape"] == (height, width) == found["gt_seg_map"].shape
    assert found["scale_factor"] == (width / size[1], height / size[0]) and found["flip"]
    pack = TRANSFORMS.build(dict(type=f"Pack{library.removeprefix('mm').capitalize()}Inputs", meta_keys=()))
    assert pack.transform(found)["inputs"].shape == (3, height, width)
    if 4000 in size:
        assert (height, width) == tuple(80 if side == 4000 else 1 for side in size)
        return
    expected = results_of(size, library)
    for transform in theirs:
        expected = transform(expected)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in ("img", "gt_seg_map", "scale_factor", "keep_ratio"))


# ---------------------------------------------------------------- private names of the libraries


def test_private_names_that_are_used_exist():
    """Each stands in one file of dense/, and has no public equivalent."""
    from mmengine.dataset import BaseDataset
    from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

    libraries.load("mmdet")
    from mmdet.evaluation import CocoMetric

    for loop in (EpochBasedTrainLoop, IterBasedTrainLoop):  # dense/runner.py sets them to resume
        progress = loop.__new__(loop)
        progress._epoch, progress._iter = 3, 70
        assert (progress.epoch, progress.iter) == (3, 70)
    assert callable(BaseDataset._rand_another)  # dense/randomness.py seeds it
    assert CocoMetric(metric="bbox")._coco_api is None  # dense/checks.py looks into it


# ---------------------------------------------------------------- errors of the libraries


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("bbox"), "'bbox' is missing"),
        (KeyError("X is not in the registry"), "KeyError: X is not in the registry"),
        (FileNotFoundError(2, "No such file", "a.png"), "No such file: a.png"),
        (ValueError("  two   words\nand a second line"), "ValueError: two words"),
        (RuntimeError(), "RuntimeError: "),
        (ValueError("x" * 300), "ValueError: " + "x" * 200),
    ],
)
def test_library_reason(error, reason):
    assert library_reason(error) == reason
