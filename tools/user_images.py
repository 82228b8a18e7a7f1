"""The images that a tool is given: their names, options, and batches of them through a model."""

import gvt  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from engine import autocast
from tools.trained import Trained
from training.batches import Sample, Uint8Transform, build_loader
from training.command_line import add_device, add_max_pixels
from training.devices import choose_device
from training.errors import UserError, short_reason
from training.folders import image_files
from training.images import ImageReader
from training.options import ALPHA, Parser, count, path, positive
from training.precision import amp_dtype
from training.processes import loading_error
from training.threads import cores
from utils import keep_freed_memory

FEW = 64  # images that are read without processes of their own


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "images",
        nargs="+",
        type=path,
        metavar="IMAGES",
        help="files, folders with all below, globs; -: a list on stdin",
    )
    add("--weights", required=True, type=path, metavar="FILE", help="a trained classifier")
    add("--model", metavar="NAME", help="(what FILE says, or the shapes of its weights)")
    add("--batch-size", type=positive, default=32, metavar="N", help="(%(default)s)")
    add_device(parser)
    precisions = ("float16", "bfloat16", "float32")
    add("--amp-dtype", choices=precisions, help="precision of the forward pass (CUDA: float16, CPU: float32)")
    add(
        "--num-workers", type=count, metavar="N", help=f"processes that read (4, or fewer cores; up to {FEW} images: 0)"
    )
    add("--alpha", choices=ALPHA, help="under transparent pixels (as FILE was trained with)")
    add("--exif", default="apply", choices=("apply", "ignore"), help="the EXIF orientation of images (%(default)s)")
    add_max_pixels(parser)
    add("--overwrite", action="store_true", help="replace output files that exist")


def choose(name: str | None) -> torch.device:
    """Return the device of --device."""
    keep_freed_memory()
    return choose_device(name or "cuda", given=name is not None, local_rank=None)


def find(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the image files that words name, and what is wrong with links among them.

    Raises UserError for a name of nothing, or if there is no image. Names that come on stdin are not looked up.
    """
    files, problems = [], []
    for word in words:
        if word == "-":
            files += [line for line in map(os.fsdecode, sys.stdin.buffer.read().splitlines()) if line.strip()]
        else:
            files += image_files([word], on_error=lambda error: problems.append(str(error)))
    if not files and not problems:
        raise UserError(f"no images ({', '.join(words)}): give files, folders or globs of JPEG, PNG, WebP or others")
    return list(dict.fromkeys(files)), problems


def printable(text: str) -> str:
    """Return a file's name as one line: what cannot be printed is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def build_reader(trained: Trained, args) -> ImageReader:
    """Return a reader as the options ask for it, else as the model was trained."""
    return ImageReader("images", alpha=args.alpha or trained.alpha, exif=args.exif, max_pixels=args.max_pixels)


class Images(Dataset):
    """Image files as a model is evaluated on them: (image, ""), or (blank, what is wrong with it)."""

    def __init__(self, paths: Sequence[str], trained: Trained, reader: ImageReader):
        self.paths, self.trained, self.reader = paths, trained, reader
        self.transform = Uint8Transform(trained.transform)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Sample, str]:
        path = self.paths[index]
        try:
            image = self.reader(path)
            self.trained.check_sides(*image.size, self.reader.max_pixels)
            return self.transform(image), ""
        except UserError as error:
            line = str(error) if path in str(error) else f"{path}: {error}"
            return self.transform(Image.new("RGB", self.trained.sides[::-1])), line


def outputs(
    paths: Sequence[str], trained: Trained, compute: Callable[[Tensor], Tensor], device: torch.device, args
) -> Iterator[tuple[str, Tensor | None, str]]:
    """Yield (path, output, error) of each image in order, and show progress. compute: (B, 3, H, W) -> (B, ...).

    output is None where the image cannot be read or the output is not finite; error says so. args: of add_options.
    """
    dataset = Images(paths, trained, build_reader(trained, args))
    workers = args.num_workers
    if workers is None:
        workers = min(4, cores()) if len(paths) > FEW else 0
    dtype = amp_dtype(args, device)
    settings = dict(batch_size=args.batch_size, workers=workers, pin_memory=device.type == "cuda", drop_last=False)
    remaining, progress = iter(paths), tqdm(total=len(paths), unit=" images", disable=None)
    with explained(args.batch_size), progress, torch.inference_mode():
        for images, errors in build_loader(dataset, range(len(paths)), **settings):
            with autocast(device, dtype):
                values = compute(images.to(device, non_blocking=True)).float().cpu()
            finite = values.flatten(1).isfinite().all(1).tolist()
            for value, is_finite, error in zip(values, finite, errors):
                name = next(remaining)
                if not error and not is_finite:
                    error = f"an output that is not finite ({name}): try another --amp-dtype than {dtype}"
                yield name, None if error else value, error
            progress.update(len(errors))


@contextlib.contextmanager
def explained(batch_size: int) -> Iterator[None]:
    """Turn a lack of memory, and what ends a process that reads, into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on the device (--batch-size {batch_size}): make it smaller") from None
    except RuntimeError as error:
        if (loading := loading_error(error)) is None:
            raise
        what = f"reading the images failed ({short_reason(loading, 120)})"
        raise UserError(f"{what}: look for lack of memory, or pass --num-workers 0") from error


def new_parser(name: str, description: str) -> Parser:
    parser = Parser(prog=f"{name}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    return parser
