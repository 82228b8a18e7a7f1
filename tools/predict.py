"""Name what is in images: python -m tools.predict IMAGES... --weights FILE.

Model, image size, crop and class names are those of the checkpoint; for 1000 classes without names they are ImageNet's.
Images are read as in evaluation, but turned upright by their EXIF orientation. An image that cannot be read is a row
that says so, and the exit code is 1.
"""

import gvt  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from tools import sheets, trained, user_images
from tools.sheets import Cell
from tools.trained import Trained
from tools.user_images import printable
from training.errors import UserError, exit_code
from training.images import ImageReader
from training.options import positive
from training.outputs import TABLES, check_folder, check_new, make_folder, write_file, write_rows
from training.reports import ranked

FIELDS = ("path", "label", "probability", "top", "error")
PATH_WIDTH, SHOWN = 50, 5  # characters of a path, and predictions, on the terminal
PAGE = 48  # images of a contact sheet


def rows(paths: list[str], problems: list[str], model: Trained, device, args) -> Iterator[dict]:
    """Yield a row of FIELDS for each image."""
    for problem in problems:
        yield dict(path="", label="", probability=None, top=[], error=problem)
    most = min(args.topk, len(model.classes))
    for path, logits, error in user_images.outputs(paths, model, model.model, device, args):
        if logits is None:
            yield dict(path=path, label="", probability=None, top=[], error=error)
            continue
        values, classes = logits.softmax(0).topk(most)
        top = ranked(model.classes, classes.tolist(), values.tolist())
        yield dict(path=path, label=top[0][0], probability=top[0][1], top=top, error="")


def shown(found: Iterable[dict], width: int, tally: dict[str, int]) -> Iterator[dict]:
    """Print a line for each row, and count those with an error."""
    for row in found:
        name = printable(row["path"])
        name = name if len(name) <= width else f"...{name[3 - width :]}"
        best = "  ".join(f"{printable(label)} {100 * value:.1f} %" for label, value in row["top"][:SHOWN])
        error = printable(row["error"].replace(f" ({row['path']})", ""))
        tqdm.write(f"{name:<{width}}  {best or f'error: {error}'}")
        tally["errors" if row["error"] else "read"] += 1
        yield row


class Drawer:
    """Write an annotated copy of each image that was read, and contact sheets of PAGE images."""

    def __init__(self, folder: Path, reader: ImageReader):
        self.folder, self.reader, self.cells, self.pages, self.names = folder, reader, [], 0, {}

    def watch(self, found: Iterable[dict]) -> Iterator[dict]:
        for row in found:
            self.add(row)
            yield row
        if self.cells:
            self.write_page()

    def add(self, row: dict) -> None:
        stem = printable(Path(row["path"]).stem)
        name, image = self.new_name(Path(row["path"]).stem), None
        lines, is_error = (stem, "cannot be read"), bool(row["error"])
        if not is_error:
            image = self.reader(row["path"])
            self.save(sheets.annotated(image, row["top"]), f"{name}.jpg", format="JPEG", quality=92)
            image = sheets.thumbnail(image)
            lines = stem, f"{printable(row['label'])} {100 * row['probability']:.1f} %"
        self.cells.append(Cell(image, lines, is_error))
        if len(self.cells) == PAGE:
            self.write_page()

    def new_name(self, stem: str) -> str:
        """Return a name for a copy: the first 50 characters; images of one name are numbered."""
        stem = stem[:50] or "image"
        self.names[stem] = self.names.get(stem, 0) + 1
        return stem if self.names[stem] == 1 else self.new_name(f"{stem[:40]}_{self.names[stem]}")

    def write_page(self) -> None:
        self.pages += 1
        name = "contact_sheet.png" if self.pages == 1 else f"contact_sheet.{self.pages}.png"
        self.save(sheets.contact_sheet(self.cells), name, format="PNG")
        self.cells = []

    def save(self, image, name: str, **how) -> None:
        write_file(self.folder / name, "--output", lambda file: image.save(file, **how))


def check_outputs(args) -> None:
    if args.output:
        check_folder(args.output, "--output", overwrite=args.overwrite)
    if args.results:
        made = args.output if args.output and not args.output.exists() else None
        check_new(args.results, "--results", overwrite=args.overwrite, suffixes=TABLES, made=made)


def run(args) -> int:
    """Predict all images; return 1 if one could not be read, else 0."""
    check_outputs(args)
    paths, problems = user_images.find(args.images)
    device = user_images.choose(args.device)
    model = trained.load(args.weights, args.model, device, fast=True)
    pixels = f"{' x '.join(map(str, model.sides))} pixels"
    print(f"{model.name}, {len(model.classes)} classes, {pixels}, {device}: {args.weights}")
    tally, start = dict(read=0, errors=0), time.perf_counter()
    width = min(PATH_WIDTH, max(len(printable(path)) for path in [*paths, ""]))
    found = shown(rows(paths, problems, model, device, args), width, tally)
    if args.output:
        make_folder(args.output, "--output")
        found = Drawer(args.output, user_images.build_reader(model, args)).watch(found)
    if args.results:
        write_rows(args.results, "--results", FIELDS, found)
    else:
        for _ in found:
            pass
    seconds = time.perf_counter() - start
    unread = f", {tally['errors']} could not be read" if tally["errors"] else ""
    print(f"{tally['read']} images{unread}: {seconds:.1f} s, {tally['read'] / seconds:.1f} images/s")
    for what in (args.output, args.results):
        if what:
            print(what)
    return 1 if tally["errors"] else 0


def main(argv: list[str]) -> int:
    parser = user_images.new_parser("predict", __doc__)
    add = parser.add_argument
    add("--topk", type=positive, default=5, metavar="K", help="classes of each image in the results (%(default)s)")
    add("--output", type=Path, metavar="DIR", help="a new folder for a contact sheet and annotated copies")
    add("--results", type=Path, metavar="FILE", help="a new file: .csv, .json, or .jsonl for JSON lines")
    try:
        return run(parser.parse_args(argv))
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError("nobody reads the output (stdout): stopped") from None


if __name__ == "__main__":
    sys.exit(exit_code("predict.py", main, sys.argv[1:]))
