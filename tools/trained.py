"""What the tools that use a trained classifier share: the model and how its images are prepared, from one file."""

import gvt

# isort: split
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from gvt_ops import accelerate
from gvt_ops.loading import class_names, model_settings, normalization, size_and_crop
from gvt_ops.transforms import SMALL, eval_transform, resized_sides, sides
from training import formats
from training.checkpoint import Checkpoint, load_into, number_of_classes
from training.errors import UserError
from training.options import ALPHA
from utils import log


@dataclass(frozen=True)
class Trained:
    """A classifier in evaluation mode. transform: RGB image -> (channels, height, width), as in its evaluation.

    classes: a name for each output, numbers if the file has none. name: of the model. crop: share of the resized side.
    alpha: what its transparent pixels were laid on, for ImageReader.
    """

    model: nn.Module
    transform: Callable[..., Tensor]
    classes: list[str]
    name: str
    size: int | tuple[int, int]
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    alpha: str

    @property
    def sides(self) -> tuple[int, int]:
        return sides(self.size)

    def require_twins(self) -> None:
        """Raise UserError for a model of another library."""
        if not isinstance(self.model, gvt.Twins):
            raise UserError(f"not a Twins ({self.name}): use one of {', '.join(gvt.MODEL_NAMES)}")

    def check_sides(self, width: int, height: int, max_pixels: int) -> None:
        """Raise UserError for an image so narrow that its resize for evaluation would make more than max_pixels."""
        tall, wide = resized_sides(self.size, self.crop)
        scale = max(tall / height, wide / width)
        pair = sorted((int(scale * height), int(scale * width)))
        if max(self.sides) > SMALL and pair[0] * pair[1] > max_pixels:
            what = f"too narrow an image ({width} x {height} pixels, {pair[0]} x {pair[1]} once resized)"
            raise UserError(f"{what}: crop it, or raise --max-pixels")


def load(weights: str, model: str | None = None, device: torch.device | str = "cpu", *, fast: bool = False) -> Trained:
    """Return a classifier from any file that main.py reads. model: its name, if not the one that the file says or that
    the weights' shapes tell. fast: accelerate it.

    Raises UserError for a file without a classifier, or with the weights of another model.
    """
    file = Checkpoint.open(weights)
    state, stored = file.weights(), file.options
    number = number_of_classes(state, file.source)
    name = model_name(model or stored.get("model"), state, file.source, given=model is not None)
    try:
        size, crop = size_and_crop(stored, file.source)
        normal, settings = normalization(stored, file.source), model_settings(stored, file.source)
    except ValueError as error:
        raise UserError(f"{error}: use another checkpoint") from None
    classes = class_names(file.class_names, number)
    if classes is None:
        classes = [f"class {index}" for index in range(number)]
        log(f"no class names in the weights ({file.source}): its {number} classes are numbered from 0")
    if len(classes) != number:
        raise UserError(f"{len(classes)} class names for {number} outputs ({file.source}): use another checkpoint")
    network = timm.create_model(name, num_classes=number, **settings)
    load_into(network, state, source=file.source, lists_all="TWINS_DEBUG=1")
    network = accelerate(network) if fast and isinstance(network, gvt.Twins) else network
    alpha = stored.get("alpha") if stored.get("alpha") in ALPHA else "white"
    return Trained(
        network.eval().to(device), eval_transform(size, crop, *normal), classes, name, size, crop, *normal, alpha
    )


def model_name(wanted: object, state: dict[str, Tensor], source: str, *, given: bool) -> str:
    """Return the name of the model: what is wanted if timm knows it, else by the shapes of the weights."""
    if isinstance(wanted, str) and timm.is_model(wanted):
        return wanted
    if given:
        raise UserError(f"unknown model (--model {wanted}): use one of {', '.join(gvt.MODEL_NAMES)}, or omit --model")
    variant = formats.variant_of(state, source=source)
    return next(name for name, key in gvt.MODEL_NAMES.items() if key == variant)
