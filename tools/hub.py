"""A folder for the hub: model.safetensors, config.json and a model card, opened by timm and by transformers."""

import gvt

# isort: split
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

from gvt_ops.loading import class_names, normalization, size_and_crop
from gvt_ops.transforms import SMALL, sides
from training.checkpoint import Checkpoint
from training.errors import UserError
from training.files import LOG, write_text
from training.run_folder import log_lines


def write(path: Path, state: Mapping[str, Tensor], file: Checkpoint, *, variant: str, ema: bool = False) -> str:
    """Write the folder and return the name of its model. It appears whole, or not at all."""
    try:
        size, crop = size_and_crop(file.options, file.source)
        mean, std = normalization(file.options, file.source)
    except ValueError as error:
        raise UserError(f"{error}: use another checkpoint") from None
    classes = len(state["head.weight"]) if "head.weight" in state else 0
    names = class_names(file.class_names, classes) if classes else None
    channels = state["patch_embeds.0.proj.weight"].shape[1]
    if file.options.get("model_kwargs"):
        raise UserError(f"timm's file has no place for them ({file.source}, --model-kwargs): use another checkpoint")
    both = sides(size)
    data = dict(input_size=(channels, *both), interpolation="bicubic", crop_pct=1.0 if max(both) <= SMALL else crop)
    if channels == len(mean):
        data |= dict(mean=mean, std=std)
    # Neither the tag nor the license of the official weights, as these may be others.
    settings = dict(num_classes=classes, in_chans=channels, img_size=size)
    settings |= dict(pretrained_cfg_overlay=dict(tag=None, license=None))
    name = architecture(variant, size)
    # Without values: the weights take their places, whatever their type.
    with torch.device("meta"):
        model = timm.create_model(name, **settings)
    model.load_state_dict(dict(state), strict=True, assign=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        labels = {"label_names": names} if names else {}
        save_for_hf(model, str(unfinished), model_config=labels, safe_serialization=True, data_config=data)
        remove_arguments(unfinished / "config.json")
        write_text(unfinished / "README.md", card(path.name, name, model, size, names, file, ema=ema))
        for part in unfinished.iterdir():
            with open(part, "rb") as written:
                os.fsync(written.fileno())
        os.rename(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return name


def architecture(variant: str, size: int | tuple[int, int]) -> str:
    """Return timm's name for the model, or ours where timm has none or computes something else: it pads windows with
    zeros, which become keys.
    """
    model = gvt.VARIANTS[variant]
    maps = [side // reduction for side in sides(size) for reduction in (4, 8, 16, 32)]
    pads = model.window is not None and any(side % model.window for side in maps)
    if model.timm and not pads:
        return model.timm
    return next(name for name, key in gvt.MODEL_NAMES.items() if key == variant)


def remove_arguments(config: Path) -> None:
    """Remove timm's model_args, which transformers would give to timm a second time: the rest of the file says the
    same.
    """
    content = json.loads(config.read_text())
    content.pop("model_args", None)
    write_text(config, json.dumps(content, indent=1) + "\n")


# ---------------------------------------------------------------- the model card

CARD = """---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- transformers
---

# {title}

`{name}`, a Twins ([arXiv:2104.13840](https://arxiv.org/abs/2104.13840)) with {parameters:,} parameters, for images of
{height} x {width} pixels. {classes}

## Use

```python
{first}import timm

model = timm.create_model("local-dir:{title}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

```python
{first}from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{title}")
```

## Results

{results}

## Training

{training}
"""
FIRST = "import gvt  # first: it registers the model with timm\n"


def card(
    title: str,
    name: str,
    model: torch.nn.Module,
    size: int | tuple[int, int],
    names: list[str] | None,
    file: Checkpoint,
    *,
    ema: bool,
) -> str:
    count = f"{model.num_classes} classes" if model.num_classes else "No classifier"
    shown = f": {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}" if names else ""
    return CARD.format(
        title=title,
        name=name,
        parameters=sum(value.numel() for value in model.parameters()),
        height=sides(size)[0],
        width=sides(size)[1],
        classes=f"{count}{shown}.",
        first=FIRST if name in gvt.MODEL_NAMES else "",
        results=results(file, ema=ema),
        training=training(file),
    )


def results(file: Checkpoint, *, ema: bool) -> str:
    """Return a table of what log.txt beside the checkpoint says about its epoch."""
    lines, front = log_lines(Path(file.source).with_name(LOG)), "ema_test_" if ema else "test_"
    line = next((each for each in lines if each["epoch"] == file.payload.get("epoch")), {})
    scores = {key: line.get(f"{front}{key}") for key in ("acc1", "acc5", "loss")}
    if not all(isinstance(value, (int, float)) for value in scores.values()):
        return "Unknown: no log of the training run was beside the weights."
    row = f"| {line['epoch'] + 1} | {scores['acc1']:.2f} % | {scores['acc5']:.2f} % | {scores['loss']:.4f} |"
    return f"| epochs | top-1 on val | top-5 on val | loss on val |\n| --- | --- | --- | --- |\n{row}"


def training(file: Checkpoint) -> str:
    """Return the command of the run, from environment.json beside the checkpoint."""
    try:
        record = json.loads(Path(file.source).with_name("environment.json").read_text())
        command, versions = record["command"], ", ".join(f"{key} {record[key]}" for key in ("torch", "timm"))
    except (OSError, ValueError, KeyError, TypeError):
        return "Unknown: no record of the training run was beside the weights."
    return f"```bash\n{command}\n```\n\nwith {versions}."
