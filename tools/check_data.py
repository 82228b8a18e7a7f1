"""Check all files of a data set before a training run: python -m tools.check_data --data-path FOLDER | CONFIG.

FOLDER holds train/CLASS/* and val/CLASS/*; CONFIG is one of segmentation or detection. Every image and label file is
decoded. Reported are files that cannot be read, classes and annotations that cannot be right, files that are both in
train and val, and files in two classes. Exit code 1 if there is a finding, 0 if there is none.
"""

import gvt  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import argparse
import contextlib
import csv
import functools
import hashlib
import io
import multiprocessing
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from tqdm import tqdm

import datasets
from training.errors import UserError, exit_code
from training.files import write_text
from training.folders import log_unread, walk
from training.images import MAX_PIXELS, ImageReader, opened
from training.options import Parser, count, path, positive
from utils import log

SHOWN = 30  # findings on the terminal; --csv has all


@dataclass(frozen=True)
class Finding:
    """A problem of a file or folder."""

    path: str
    problem: str


@dataclass(frozen=True)
class Item:
    """A file to decode by `read`, which raises UserError. label: two items of one file must have the same."""

    path: str
    split: str
    label: str
    read: Callable[[str], object]


# ---------------------------------------------------------------- every file


@functools.cache
def reader(max_pixels: int) -> ImageReader:
    return ImageReader(max_pixels=max_pixels)


def decode_image(path: str, max_pixels: int) -> None:
    with opened(path, max_pixels=max_pixels) as file:
        file.verify()  # checksums, which decoding a PNG does not look at
    reader(max_pixels)(path)


def look(item: Item) -> tuple[Item, str, str]:
    """Return an item, a hash of its file, and its problem; each may be empty."""
    try:
        item.read(item.path)
        with open(item.path, "rb") as file:
            return item, hashlib.file_digest(file, "blake2b").hexdigest(), ""
    except UserError as error:
        return item, "", str(error)


def look_at_all(items: list[Item], workers: int) -> Iterator[Finding]:
    """Yield the findings of all files, with a progress bar."""
    same = defaultdict(list)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(multiprocessing.Pool(workers)) if workers else None
        results = pool.imap(look, items, chunksize=16) if pool else map(look, items)
        for item, digest, problem in tqdm(results, total=len(items), unit="file", disable=None):
            if problem:
                yield Finding(item.path, problem)
            else:
                same[digest].append(item)
    for first, *others in same.values():
        for other in others:
            if other.label != first.label:
                yield Finding(other.path, f"the same file has another class ({first.path}): remove one of them")
            elif other.split != first.split:
                yield Finding(other.path, f"the same file is in {first.split} ({first.path}): remove one of them")


# ---------------------------------------------------------------- classification


def classification(root: Path, max_pixels: int, findings: list[Finding]) -> list[Item]:
    """Return the images of train and val; append what is wrong with the folders."""
    items, trained, decode = [], None, functools.partial(decode_image, max_pixels=max_pixels)
    for split in ("train", "val"):
        unread, classes = Counter(), datasets.class_folders(root / split)
        trained = trained or classes
        if split == "train":
            findings += problems_of_classes(root / split, classes)
        for name in classes:
            folder = root / split / name
            if name not in trained:
                findings.append(
                    Finding(str(folder), "a class that training does not know: remove it, or add it to train")
                )
            errors: list[UserError] = []
            files = walk(folder, unread, on_error=errors.append)
            findings += (Finding(str(folder), str(error)) for error in errors)
            items += (Item(file, split, name, decode) for file in files)
            if not files and split == "train":
                findings.append(Finding(str(folder), "a class without images: remove the folder, or fill it"))
        log_unread(unread, root / split)
    return items


def problems_of_classes(root: Path, classes: list[str]) -> Iterator[Finding]:
    try:
        datasets.check_levels(root)
    except UserError as error:
        yield Finding(str(root), str(error))
    if len(classes) == 1:
        yield Finding(str(root / classes[0]), "only one class: expected a folder for each of two or more classes")


# ---------------------------------------------------------------- the tool


def write_csv(path: Path, findings: list[Finding]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("path", "problem"), *map(astuple, findings)])
    try:
        write_text(path, text.getvalue())
    except OSError as error:
        raise UserError(f"cannot write (--csv {path}): {error.strerror}; choose another file") from error


def main(argv: list[str]) -> int:
    parser = Parser(prog="check_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", nargs="?", type=path, metavar="CONFIG", help="of segmentation or detection")
    add("--data-path", type=path, metavar="FOLDER", help="of train/CLASS/* and val/CLASS/*")
    add("--csv", type=Path, metavar="FILE", help="write all findings: path, problem")
    add("--max-pixels", type=positive, default=MAX_PIXELS, metavar="N", help="refuse larger images (%(default)s)")
    add("--workers", type=count, default=os.cpu_count(), metavar="N", help="processes, 0: none but this (%(default)s)")
    args = parser.parse_args(argv)
    if bool(args.config) == bool(args.data_path):
        raise UserError("what to check (command line): pass --data-path FOLDER, or CONFIG")
    findings: list[Finding] = []
    items = classification(Path(args.data_path), args.max_pixels, findings)
    findings += look_at_all(items, args.workers)
    if args.csv:
        write_csv(args.csv, findings)
    for each in findings[:SHOWN]:
        print(each.problem if each.path in each.problem else f"{each.path}: {each.problem}")
    if len(findings) > SHOWN:
        log(f"... and {len(findings) - SHOWN} more: see --csv FILE")
    log(f"{len(items)} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(exit_code("check_data.py", main, sys.argv[1:]))
