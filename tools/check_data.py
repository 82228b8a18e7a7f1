"""Check all files of a data set before a training run: python -m tools.check_data --data-path FOLDER | CONFIG.

FOLDER holds train/CLASS/* and val/CLASS/*, or archives or lists as for main.py (docs/data.md); CONFIG is one of
segmentation or detection. Every image and label file is decoded. Reported are files that cannot be read, classes and
annotations that cannot be right, files that are both in train and val, and files in two classes. Exit code 1 if there
is a finding, 0 if there is none.
"""

import gvt  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import argparse
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from tools.check_files import Finding, Item, decode_image, look_at_all
from training import sources
from training.command_line import add_max_pixels
from training.errors import UserError, exit_code
from training.folders import check_levels, class_folders, log_unread, walk
from training.options import Parser, count, path, split
from training.outputs import check_new, write_rows
from training.threads import cores
from utils import log

SHOWN = 30  # findings on the terminal; --csv has all


# ---------------------------------------------------------------- classification


def classification(root: Path, args: argparse.Namespace, findings: list[Finding]) -> list[Item]:
    """Return the images of train and val; append what is wrong with the folders."""
    items, trained, decode = [], None, functools.partial(decode_image, max_pixels=args.max_pixels)
    for part, name, labels in (("train", args.train_split, ""), ("val", args.val_split, args.val_labels)):
        if not labels and list(sources.kinds(root, name)) == ["folder"]:
            classes, found = in_folders(root / name, part, decode, findings)
        else:
            images = sources.find(root, name, class_map=args.class_map, labels=labels)
            classes, places = images.classes, images.members or itertools.repeat(None)
            found = [Item(path, decode, part, label, place) for (path, label), place in zip(images.samples, places)]
        items, trained = items + found, trained or classes
        for label in (label for label in classes if label not in trained):
            what = "a class that training does not know: remove it, or add it to train"
            findings.append(Finding(str(root / name / label), what))
    return items


def in_folders(root: Path, part: str, decode: Callable, findings: list[Finding]) -> tuple[list[str], list[Item]]:
    """Return the class folders of a part of the data set, and their images."""
    unread, items, classes = Counter(), [], class_folders(root)
    if part == "train":
        findings += problems_of_classes(root, classes)
    for name in classes:
        errors: list[UserError] = []
        files = walk(root / name, unread, on_error=errors.append)
        findings += (Finding(str(root / name), str(error)) for error in errors)
        items += (Item(file, decode, part, name) for file in files)
        if not files and part == "train":
            findings.append(Finding(str(root / name), "a class without images: remove the folder, or fill it"))
    log_unread(unread, root)
    return classes, items


def problems_of_classes(root: Path, classes: list[str]) -> Iterator[Finding]:
    try:
        check_levels(root)
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
    add("--train-split", type=split, default="train", metavar="NAME", help="of the training images (%(default)s)")
    add("--val-split", type=split, default="val", metavar="NAME", help="of the validation images (%(default)s)")
    add("--val-labels", type=path, default="", metavar="FILE", help="classes of a flat val folder, as for main.py")
    add("--class-map", type=path, default="", metavar="FILE", help="class names, as for main.py")
    add("--csv", type=Path, metavar="FILE", help="write all findings: path, problem")
    add_max_pixels(parser)
    add("--workers", type=count, default=cores(), metavar="N", help="processes, 0: none but this (%(default)s)")
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
        items = classification(Path(args.data_path), args, findings)
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
