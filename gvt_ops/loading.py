"""Load a trained classifier from its file alone: gvt.load."""

from gvt_ops import torchvision_cpu  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import argparse
import contextlib
import functools
import logging
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torch import Tensor, nn
from torchvision.transforms import Compose

from gvt_ops.transforms import eval_transform

# Keys under which files keep the weights, in this order.
WRAPPERS = ("model", "state_dict", "model_state", "model_ema", "state_dict_ema")
SIZE, CROP = 224, 0.875  # of evaluation, if a file does not say
# Options of timm.create_model that have options of their own, or read other files: --model-kwargs must not name them.
NOT_KWARGS = {"in_chans", "num_classes", "drop_rate", "drop_path_rate", "pretrained", "checkpoint_path", "cache_dir"}
NOT_KWARGS |= {"pretrained_cfg", "pretrained_cfg_overlay", "model_name", "scriptable", "exportable", "features_only"}


def load(
    path: str | Path, device: str | torch.device, variants: Mapping[str, object]
) -> tuple[nn.Module, Compose, list[str] | None]:
    """Return model, transform and class names; see gvt.load. variants: gvt.VARIANTS by the names of the models."""
    payload = read(path)
    state = weights(payload, path)
    options = payload.get("args", {})
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    options = options if isinstance(options, dict) else {}
    size, crop = size_and_crop(options, path)
    normal, settings = normalization(options, path), model_settings(options, path)
    name = options.get("model")
    if not (isinstance(name, str) and timm.is_model(name)):
        name = model_name(state, variants, path)
    head = len(state["head.weight"])
    classes = class_names(payload.get("class_names"), head)
    if classes is not None and len(classes) != head:
        raise ValueError(f"{path}: it names {len(classes)} classes, and its classifier has {head}")
    model = timm.create_model(name, num_classes=head, **settings)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: no weights of {name} ({' '.join(str(error).split())[:200]})") from None
    transform = eval_transform(size, crop, *normal)
    return model.eval().to(device), transform, classes


def size_and_crop(options: Mapping, path: str | Path) -> tuple[int | tuple[int, int], float]:
    """Return the size of images, or their height and width, and the share of the resized sides that evaluation keeps,
    by a training's options.
    """
    size, crop = options.get("input_size", SIZE), options.get("eval_crop_ratio", CROP)
    both = tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 else (size,)
    if not (
        all(type(side) is int and 1 <= side <= 16384 for side in both)
        and isinstance(crop, (int, float))
        and 0 < crop <= 1
    ):
        raise ValueError(f"{path}: its image size is {size!r:.40} and its crop {crop!r:.40}")
    return both if len(both) == 2 else size, crop


def normalization(options: Mapping, source: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of each channel of --in-chans, 3 or 1 (gray); by default ImageNet's, of gray their average.

    Raises ValueError for other numbers.
    """
    channels, values = options.get("in_chans", 3), []
    if channels not in (1, 3):
        raise ValueError(f"{source}: {channels!r:.40} channels (in_chans), expected 1 or 3")
    for name, default in dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD).items():
        given = options.get(name)
        if given is None:
            given = default if channels == 3 else (round(sum(default) / 3, 3),)
        numbers = isinstance(given, (list, tuple)) and all(type(value) in (int, float) for value in given)
        if not (numbers and len(given) == channels and all(abs(v) < 1e6 and (v > 0 or name == "mean") for v in given)):
            raise ValueError(f"{source}: {name} is {given!r:.60}, expected a number for each of {channels} channels")
        values.append(tuple(map(float, given)))
    return tuple(values)


def model_settings(options: Mapping, source: str | Path) -> dict:
    """Return what timm.create_model needs beside name and classes, by a training's options; raise ValueError."""
    kwargs = options.get("model_kwargs") or {}
    if not (isinstance(kwargs, dict) and all(isinstance(name, str) and is_plain(v) for name, v in kwargs.items())):
        raise ValueError(f"{source}: its model_kwargs are {kwargs!r:.60}")
    if refused := sorted(NOT_KWARGS & kwargs.keys()):
        raise ValueError(f"{source}: its model_kwargs name {', '.join(refused)}")
    return kwargs | ({"in_chans": options["in_chans"]} if options.get("in_chans", 3) != 3 else {})


def is_plain(value: object) -> bool:
    items = value if isinstance(value, (list, tuple)) else [value]
    return all(each is None or isinstance(each, (bool, int, float, str)) for each in items)


def read(path: str | Path) -> dict:
    """Return what a file of torch.save or safetensors holds; raise OSError or ValueError. Nothing in it is run."""
    with open(path, "rb") as file:  # the system's own error, if it cannot be opened
        start = file.read(9)
    try:
        if start[8:] == b"{":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums that its files carry
                if (record := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {record[:60]} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):
            payload = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(payload, dict):
            return payload
        raise ValueError(f"it holds a {type(payload).__name__}")
    except Exception as error:  # a bad file ends in one of many types of error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: not a readable checkpoint ({lines[0][:160]})") from None


def weights(payload: Mapping, path: str | Path) -> dict[str, Tensor]:
    """Return a classifier's weights from wherever the file keeps them; raise ValueError if it has none."""
    state = next((payload[key] for key in WRAPPERS if isinstance(payload.get(key), dict)), payload)
    state = {str(name).removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if "head.weight" not in state or state["head.weight"].ndim != 2:
        raise ValueError(
            f"{path}: no weights of a classifier (expected head.weight and others by their official names)"
        )
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(f"{path}: {len(broken)} tensors are not finite ({', '.join(broken[:3])})")
    return state


def model_name(state: Mapping[str, Tensor], variants: Mapping[str, object], path: str | Path) -> str:
    """Return which of `variants` has these widths and depths and this kind of attention."""
    embeds = [value for name, value in state.items() if re.fullmatch(r"patch_embeds\.\d+\.proj\.weight", name)]
    blocks = Counter(found[1] for name in state if (found := re.fullmatch(r"blocks\.(\d+)\.\d+\.norm1\.weight", name)))
    shape = tuple(map(len, embeds)), tuple(blocks[key] for key in sorted(blocks)), "blocks.0.0.attn.qkv.weight" in state
    for name, variant in variants.items():
        if shape == (variant.dims, variant.depths, variant.window is not None):
            return name
    raise ValueError(f"{path}: these weights are no Twins")


def class_names(stored: object, number: int) -> list[str] | None:
    """Return the names that a file holds, or those of ImageNet for its number of classes, or None."""
    if isinstance(stored, list) and all(isinstance(name, str) for name in stored):
        return stored
    return imagenet_names() if number == ImageNetInfo().num_classes() else None


@functools.cache
def imagenet_names() -> list[str]:
    """Return ImageNet's names, each once: the two cranes have their WordNet id."""
    info = ImageNetInfo()
    names, ids = info.label_descriptions(), info.label_names()
    number = Counter(names)
    return [name if number[name] == 1 else f"{name} ({key})" for name, key in zip(names, ids)]


@contextlib.contextmanager
def hub_errors(name: str, hub_name: str | None, *, pretrained: bool) -> Iterator[None]:
    """Make a missing network one line about the weights on timm's hub."""
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.ERROR)
    try:
        yield
    except OSError as error:  # what the hub's client raises without a network, whatever the transport
        if not pretrained:
            raise
        hub = f"https://huggingface.co/timm/{hub_name}.in1k ({str(error).splitlines()[0]})"
        raise RuntimeError(f"{name}: no weights from {hub}: connect, or give a file as checkpoint_path=") from None
    finally:
        hub_log.setLevel(level)
