"""Check all files of a data set before a training run: python -m tools.check_data --data-path FOLDER | CONFIG.

FOLDER holds train/CLASS/* and val/CLASS/*; CONFIG is one of segmentation or detection. Every image and label file is
decoded. Reported are files that cannot be read, classes and annotations that cannot be right, files that are both in
train and val, and files in two classes. Exit code 1 if there is a finding, 0 if there is none.
"""

import gvt  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import argparse
import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import datasets
from tools.check_files import Finding, Item, decode_image, look_at_all
from training.errors import UserError, exit_code
from training.folders import log_unread, walk
from training.images import MAX_PIXELS
from training.options import Parser, count, path, positive
from training.outputs import check_new, write_rows
from utils import log

SHOWN = 30  # findings on the terminal; --csv has all


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
            items += (Item(file, decode, split, name) for file in files)
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
    out = args.csv and args.csv.absolute()
    if out:
        check_new(out, "--csv", overwrite=True, suffixes=(".csv",))
    if args.config:
        from tools.check_dense_data import dense  # needs the libraries of segmentation and detection

        items = dense(args.config, args.max_pixels, findings)
    else:
        items = classification(Path(args.data_path), args.max_pixels, findings)
    findings += look_at_all(items, args.workers)
    if out:
        write_rows(out, "--csv", ("path", "problem"), map(asdict, findings))
    for each in findings[:SHOWN]:
        print(each.problem if each.path in each.problem else f"{each.path}: {each.problem}")
    if len(findings) > SHOWN:
        log(f"... and {len(findings) - SHOWN} more: see --csv FILE")
    log(f"{len(items)} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(exit_code("check_data.py", main, sys.argv[1:]))
