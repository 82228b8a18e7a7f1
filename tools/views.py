"""What the tools that look inside a model share: images as the model sees them, and figures in a folder."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gvt

# isort: split
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision import transforms

from gvt_ops.transforms import resized_sides, sides
from tools import trained
from tools.trained import Trained
from tools.user_images import choose
from training import options
from training.command_line import MAX_PIXELS, add_device, add_max_pixels
from training.errors import UserError, print_error
from training.folders import image_files, numbered_names
from training.images import ImageReader
from training.outputs import make_folder, write_file


@dataclass(frozen=True)
class View:
    """An image as the model sees it.

    x: (1, 3, H, W), normalized. pixels: (H, W, 3), 0 to 1. box: the part of the original image that it shows, as left,
    top, right, bottom in the original's pixels.
    """

    x: Tensor
    pixels: np.ndarray
    box: tuple[float, float, float, float]

    @property
    def size(self) -> tuple[int, int]:
        """Return the width and height that the model sees."""
        return self.x.shape[3], self.x.shape[2]

    def to_view(self, point: tuple[float, float]) -> tuple[float, float]:
        """Return a point (x, y) of the original in pixels of the view; raise UserError if the model does not see it."""
        left, top, right, bottom = self.box
        if not (left <= point[0] < right and top <= point[1] < bottom):
            seen = f"x from {left:.0f} to {right:.0f}, y from {top:.0f} to {bottom:.0f}"
            raise UserError(f"outside of what the model sees ({point[0]:g},{point[1]:g}): choose {seen}, or --whole")
        width, height = self.size
        return (point[0] - left) / (right - left) * width, (point[1] - top) / (bottom - top) * height

    def to_original(self, point: tuple[float, float]) -> tuple[float, float]:
        """Return a point (x, y) of the view in pixels of the original."""
        left, top, right, bottom = self.box
        width, height = self.size
        return left + point[0] / width * (right - left), top + point[1] / height * (bottom - top)


def view(made: Trained, image: Image.Image, *, whole: bool = False, max_pixels: int = MAX_PIXELS) -> View:
    """Return an image as it is evaluated, or, whole, all of it at its own size.

    Raise UserError if it is too small, or so narrow that the evaluation's resize would make more than max_pixels.
    """
    if whole:
        if min(image.size) < gvt.SMALLEST:
            size, least = f"{image.width} x {image.height}", f"{gvt.SMALLEST} x {gvt.SMALLEST}"
            raise UserError(f"an image that is too small for --whole ({size}): at least {least} pixels, or omit it")
        normalize, box = transforms.Normalize(made.mean, made.std), (0.0, 0.0, *map(float, image.size))
        x = normalize(transforms.functional.to_tensor(image.convert("L") if len(made.mean) == 1 else image))
    else:
        made.check_sides(*image.size, max_pixels)
        x, box = made.transform(image), seen_box(image.width, image.height, made.size, made.crop)
    mean, std = (torch.tensor(values)[:, None, None] for values in (made.mean, made.std))
    pixels = (x * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return View(x[None].to(next(made.model.parameters()).device), pixels, box)


def seen_box(width: int, height: int, size: int | tuple[int, int], crop: float) -> tuple[float, float, float, float]:
    """Return the part of an image that the evaluation's resize and center crop keep, in the image's pixels."""
    tall, wide = resized_sides(size, crop)
    short, across = (tall, height) if tall * width >= wide * height else (wide, width)  # the side that is just covered
    spans = []
    for side, kept in zip((width, height), sides(size)[::-1]):
        resized = int(short * side / across)
        start = round((resized - kept) / 2) * side / resized
        spans.append((start, start + kept * side / resized))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


# ---------------------------------------------------------------- images in, figures out


def load(args: argparse.Namespace) -> Trained:
    """Return the classifier of add_options; raise UserError if it is another library's."""
    made = trained.load(args.weights, args.model, choose(args.device))
    made.require_twins()
    return made


class Views:
    """Iterate over (path, name, view) of add_options' images. One that cannot be used is an error in one line, counted.

    check: raises UserError for a view that cannot be used. names: of the images' figures, see `numbered_names`.
    """

    def __init__(self, args: argparse.Namespace, made: Trained, check: Callable[[View], object], *, program: str):
        self.args, self.made, self.check, self.program, self.failed = args, made, check, program, 0
        self.paths = image_files(args.images, on_error=self.fail)
        if not self.paths:
            raise UserError(f"no images ({', '.join(args.images)}): give files, folders or globs")
        self.names = numbered_names(self.paths)

    def __iter__(self) -> Iterator[tuple[str, str, View]]:
        args = self.args
        reader = ImageReader(alpha=self.made.alpha, exif="apply", max_pixels=args.max_pixels)
        for path, name in zip(self.paths, self.names):
            try:
                seen = view(self.made, reader(path), whole=args.whole, max_pixels=args.max_pixels)
                self.check(seen)
            except UserError as error:
                self.fail(error if path in str(error) else UserError(f"{path}: {error}"))
                continue
            yield path, name, seen

    def fail(self, error: UserError) -> None:
        self.failed += 1
        print_error(str(error), program=self.program)


def new_files(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Make the folder; raise UserError if that fails, or if it has one of the files and they may not be overwritten."""
    existing = [name for name in names if (folder / name).exists()]
    if existing and not overwrite:
        count = f"{len(existing)} of {len(names)} figures exist already, {existing[0]} the first"
        raise UserError(f"{count} (--output {folder}): choose another folder, or pass --overwrite")
    make_folder(folder, "--output")


def overlay(axis: Axes, view: View, column: int, heat: Tensor | None, patch: int = 1) -> float:
    """Draw the image, and heat over it if given, in a column of an axis; return its left side in pixels.

    heat: (H, W), each value a square of patch x patch pixels.
    """
    width, height = view.size
    left = column * width * 1.06
    if heat is None:
        axis.imshow(view.pixels, extent=(left, left + width, height, 0), interpolation="nearest")
        return left
    gray = view.pixels.mean(2)
    axis.imshow(gray, cmap="gray", vmin=0, vmax=1, extent=(left, left + width, height, 0), interpolation="nearest")
    extent = (left, left + heat.shape[1] * patch, heat.shape[0] * patch, 0)
    options = dict(cmap="inferno", vmin=0, vmax=max(float(heat.max()), 1e-30), alpha=0.7, interpolation="nearest")
    axis.imshow(heat.cpu().numpy(), extent=extent, **options)
    return left


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG; raise UserError if it cannot be written, no part of it is there then."""
    write_file(path, "--output", lambda file: figure.savefig(file, format="png", dpi=110))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what all tools of this kind are asked: images, weights, output."""
    add = parser.add_argument
    add("images", nargs="+", type=options.path, metavar="IMAGE", help="files, folders with all below, globs")
    add("--weights", required=True, type=options.path, metavar="FILE", help="a checkpoint of a classifier")
    add("--model", metavar="NAME", help="a model of gvt.py, if the checkpoint does not name it")
    add("--output", required=True, type=Path, metavar="DIR", help="a folder for the figures")
    add("--whole", action="store_true", help="the whole image at its own size, not the evaluation's resize and crop")
    add_device(parser)
    add_max_pixels(parser)
    add("--overwrite", action="store_true", help="replace figures that exist")
