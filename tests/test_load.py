"""gvt.load: a classifier from its file alone, with the transform of its evaluation and its class names."""

import argparse
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import datasets
import gvt
from gvt_ops import loading
from tools import trained
from training import checkpoint, options
from training.errors import UserError

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("alt_gvt_demo", num_classes=3).eval()


def ours(state):
    args = dict(model="alt_gvt_demo", input_size=48, eval_crop_ratio=0.9, alpha="black")
    return {"model": state, "args": args, "class_names": NAMES}


def official(state):
    return {"model": state, "args": argparse.Namespace(model="alt_gvt_demo", input_size=96), "epoch": 3}


KINDS = {
    "ours": (ours, 48, 0.9, NAMES),
    "official": (official, 96, 0.875, None),
    "official weights": (lambda state: {"model": state}, 224, 0.875, None),
    "bare": (dict, 224, 0.875, None),
    "parallel": (lambda state: {f"module.{name}": value for name, value in state.items()}, 224, 0.875, None),
    "a model that nobody knows": (lambda s: {"state_dict": s, "args": {"model": "x"}}, 224, 0.875, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(kind, model, tmp_path):
    payload, size, crop, names = KINDS[kind]
    torch.save(payload(model.state_dict()), tmp_path / "x.pth")
    found, transform, classes = gvt.load(tmp_path / "x.pth")
    args = options.parse_args(["--input-size", str(size), "--eval-crop-ratio", str(crop)])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3)).astype(np.uint8))
    expected = datasets.build_transform(False, args)(image)
    assert torch.equal(transform(image), expected) and expected.shape == (3, size, size)
    assert classes == names and not found.training and type(found) is gvt.Twins
    with torch.no_grad():
        assert torch.equal(found(expected[None]), model(expected[None]))
    same = trained.load(str(tmp_path / "x.pth"))  # the tools' own reader
    assert (same.name, same.size, torch.equal(same.transform(image), expected)) == ("alt_gvt_demo", size, True)
    assert same.crop == crop
    assert same.classes == (names or ["class 0", "class 1", "class 2"])
    assert same.alpha == ("black" if kind == "ours" else "white")


def test_safetensors(model, tmp_path):
    safetensors.torch.save_file(model.state_dict(), tmp_path / "x.safetensors")
    found, _, classes = gvt.load(str(tmp_path / "x.safetensors"))
    assert torch.equal(found.head.weight, model.head.weight) and classes is None


@pytest.mark.parametrize("name", gvt.MODEL_NAMES)
def test_every_model_is_known_by_its_shapes(name):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    variants = {name: gvt.VARIANTS[key] for name, key in gvt.MODEL_NAMES.items()}
    assert loading.model_name(state, variants, "x") == name


def test_imagenets_names(tmp_path):
    torch.save(timm.create_model("alt_gvt_demo").state_dict(), tmp_path / "x.pth")
    classes = gvt.load(tmp_path / "x.pth")[2]
    assert (classes[0], classes[999], len(classes)) == (
        "tench, Tinca tinca",
        "toilet tissue, toilet paper, bathroom tissue",
        1000,
    )
    assert [name for name in classes if name.startswith("crane")] == ["crane (n02012849)", "crane (n03126707)"]
    assert len(set(classes)) == 1000 and trained.load(str(tmp_path / "x.pth")).classes == classes


def broken(kind, model, path):
    """Write a file that cannot be loaded."""
    state = model.state_dict()
    if kind == "text":
        path.write_text("not weights")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "a flipped bit":
        torch.save(state, path)
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            record = max(archive.infolist(), key=lambda record: record.file_size)
        content[record.header_offset + 200 + record.file_size // 2] ^= 1
        path.write_bytes(content)
    else:
        changed = {
            "cut": state,
            "a list": [1],
            "no classifier": {name: value for name, value in state.items() if not name.startswith("head.")},
            "other shapes": {"head.weight": torch.ones(3, 8)},
            "a tensor missing": {name: value for name, value in state.items() if name != "norm.bias"},
            "not finite": state | {"norm.bias": state["norm.bias"] * float("nan")},
            "another model's": official(state) | {"args": {"model": "pcpvt_small_v0"}},
            "a strange size": ours(state) | {"args": {"input_size": "large"}},
            "names of other classes": ours(state) | {"class_names": ["ant"]},
        }[kind]
        torch.save(changed, path)
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:-5000])


BROKEN = {
    **{"text": "not a readable checkpoint", "empty": "not a readable checkpoint", "cut": "not a readable checkpoint"},
    **{"a flipped bit": "the checksum of .* is wrong", "a list": "it holds a list"},
    **{"no classifier": "no weights of a classifier", "other shapes": "no Twins"},
    **{"a tensor missing": "no weights of alt_gvt_demo .*norm.bias", "not finite": "1 tensors are not finite"},
    **{"another model's": "no weights of pcpvt_small_v0", "a strange size": "its image size is 'large'"},
    **{"names of other classes": "it names 1 classes, and its classifier has 3"},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_file_is_one_line(kind, model, tmp_path):
    path = tmp_path / "x.pth"
    broken(kind, model, path)
    with pytest.raises(ValueError, match=BROKEN[kind]) as caught:
        gvt.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        trained.load(str(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        gvt.load(tmp_path / "x.pth")
    with pytest.raises(UserError, match="no such file"):
        trained.load(str(tmp_path / "x.pth"))


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_nothing_in_a_file_is_run(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write({"model": {"head.weight": torch.ones(3, 8)}, "args": Harm()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        gvt.load(tmp_path / "x.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_namespaces_are_allowed_only_while_a_file_is_read(model, tmp_path):
    torch.save(official(model.state_dict()), tmp_path / "x.pth")
    gvt.load(tmp_path / "x.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_the_model_can_be_named(model, tmp_path):
    checkpoint.save(tmp_path / "x.pth", official(model.state_dict()) | {"args": {"model": "alt_gvt_small"}})
    with pytest.raises(UserError, match="the weights do not fit the model"):
        trained.load(str(tmp_path / "x.pth"))
    assert trained.load(str(tmp_path / "x.pth"), "alt_gvt_demo").name == "alt_gvt_demo"
    with pytest.raises(UserError, match="unknown model .--model alt_gvt_dem.: use one of pcpvt_small_v0"):
        trained.load(str(tmp_path / "x.pth"), "alt_gvt_dem")


def test_fast_is_as_right_and_off_by_default(model, tmp_path):
    checkpoint.save(tmp_path / "x.pth", ours(model.state_dict()))
    plain, fast = (trained.load(str(tmp_path / "x.pth"), fast=fast).model for fast in (False, True))
    assert type(plain.head) is torch.nn.Linear and type(fast.head) is not torch.nn.Linear
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert (plain(images) - fast(images)).abs().max() < 1e-5
