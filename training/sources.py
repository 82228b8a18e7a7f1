"""Find the images of a split and their classes: class folders, tar and zip archives of them, lists, maps and shards.

Which of these a data folder has is found by looking.
"""

import contextlib
import csv
import gc
import glob
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training import archives, files
from training.archives import Archive, Member, Members, Place
from training.errors import UserError
from training.folders import class_folders, log_unread, suffixes, walk
from training.options import Options
from training.outputs import csv_lines
from utils import log, warn

SPLIT = "split.csv"  # in a run's folder: which images --val-fraction held out
FIELDS = ("path", "split")
SHARD = r"-(\d+)(-of-\d+)?\.tar"
LAYOUT = "ImageNet's layout, train/CLASS/* and val/CLASS/*, or an archive or list of docs/data.md"


@dataclass
class Images:
    """The images of a split, sorted by class, then by name.

    where: what holds them, for messages. classes: the classes that it has, in order. samples: (path, class name).
    members: where the bytes of each image are, if they are in archives. names: all classes, if a class map has them.
    """

    where: str
    classes: list[str]
    samples: list[tuple[str, str]]
    members: Members | None = None
    names: list[str] | None = None

    def at(self, name: str) -> str:
        """Return what a class of these images is called in a message."""
        return str(Path(self.where) / name) if os.path.isdir(self.where) else f"{self.where}, class {name}"

    def take(self, numbers: np.ndarray) -> "Images":
        members = self.members and self.members.take(numbers)
        return replace(self, samples=[self.samples[number] for number in numbers], members=members)


class Found(NamedTuple):
    """An image before its class has a number. name: by which it is sorted. place: where it is in an archive."""

    label: str
    name: str
    path: str
    place: Place | None = None

    @classmethod
    def member(cls, label: str, archive: Archive, member: Member) -> "Found":
        place = Place(archive, *member[1:6])
        archives.check_size(place, path := f"{archive.path}!/{member.name}")
        return cls(label, member.name, path, place)


# ---------------------------------------------------------------- which kind


def kinds(root: Path, split: str) -> dict[str, list[Path]]:
    """Return what a data folder has for a split, by kind."""
    if root.is_file():
        return {"zip": [root]}
    named = {kind: [root / f"{split}.{kind}"] for kind in ("tar", "zip", "csv")}
    found = {kind: paths for kind, paths in named.items() if paths[0].is_file()}
    if (root / split).is_dir():
        found["folder"] = [root / split]
    shards = [path for path in root.glob(f"{glob.escape(split)}-*.tar") if re.fullmatch(SHARD, path.name[len(split) :])]
    return found | ({"shards": sorted(shards)} if shards else {})


def exists(root: Path, split: str) -> bool:
    if root.is_file():
        return any(member.name.startswith(f"{split}/") for member in archives.index(root)[1])
    return bool(kinds(root, split))


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Keep Python from looking for garbage among millions of new tuples, which takes as long as to make them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_collection()
def find(root: Path, split: str, *, class_map: str = "", labels: str = "") -> Images:
    """Return the images of a split of a data set. class_map: a file of class names. labels: a file for a flat folder.

    Raises UserError if there is no such split, more than one, or what it is made of cannot be used.
    """
    if root.is_file() and root.suffix.lower() != ".zip":
        raise UserError(f"neither a folder nor a zip archive (--data-path {root}): pass the folder that holds it")
    found = kinds(root, split)
    if len(found) > 1:
        several = ", ".join(str(paths[0]) for paths in found.values())
        raise UserError(f"more than one data set for {split} ({several}): move all but one of them away")
    if not found:
        raise missing(root, split)
    (kind, paths), names = *found.items(), class_names(class_map) if class_map else None
    path, numbered = paths[0], root / f"{split}_map.txt"
    if kind == "folder":
        return from_flat_folder(path, Path(labels), root, names) if labels else from_folder(path, names)
    if labels:
        raise UserError(f"labels for what is no folder (--val-labels, {path}): unpack it, or omit --val-labels")
    if kind in ("tar", "zip") and not (kind == "zip" and root.is_dir() and numbered.is_file()):
        return of(str(path), from_archive(path, split, inside=root.is_file()), names)
    if names is None and (root / "classes.txt").is_file():
        names = class_names(root / "classes.txt")
    if kind == "zip":
        return of(str(numbered), from_map(path, numbered), names, numbers=True)
    if kind == "csv":
        return of(str(path), from_list(path), names, numbers=True)
    return of(str(root / f"{split}-*.tar"), from_shards(paths), names, numbers=True)


def missing(root: Path, split: str) -> UserError:
    packed = sorted(root.glob(f"{glob.escape(split)}.t*gz")) + sorted(root.glob(f"{glob.escape(split)}.tar.*"))
    if packed:
        return UserError(f"a compressed archive ({packed[0]}): decompress it to {split}.tar, or make a zip")
    return UserError(f"no such data folder ({root / split}): expected {LAYOUT}, in --data-path")


def of(where: str, found: list[Found], names: list[str] | None, *, numbers: bool = False) -> Images:
    """Return images in order. numbers: labels that are all numbers are class numbers, of `names` if there are any."""
    labels = {each.label for each in found}
    if numbers and all(label.isascii() and label.isdecimal() and len(label) < 19 for label in labels):
        spelled = {label: str(int(label)) for label in labels}
        order = sorted(set(spelled.values()), key=int)
        if names is not None:
            if beyond := [number for number in order if int(number) >= len(names)]:
                has = f"{where}: {beyond[0]}; the class map has {len(names)}, from 0 up"
                raise UserError(f"a class number without a name ({has}): add its line")
            spelled = {label: names[int(label)] for label in labels}
            order = [names[int(number)] for number in order]
    else:
        spelled = {label: label for label in labels}
        order = sorted(labels)
    position = {name: number for number, name in enumerate(order)}
    found.sort(key=lambda each: (position[spelled[each.label]], os.path.split(each.name), each.path))
    members = Members([each.place for each in found]) if found and found[0].place else None
    return Images(where, order, [(each.path, spelled[each.label]) for each in found], members, names)


def is_image(name: str, unread: Counter) -> bool:
    """Return True if the suffix is one that is read; else count it."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in suffixes():
        unread[suffix or "without a suffix"] += 1
    return suffix in suffixes()


# ---------------------------------------------------------------- each kind


def from_folder(root: Path, names: list[str] | None = None) -> Images:
    unread, classes = Counter(), class_folders(root)
    samples = [(path, name) for name in classes for path in walk(root / name, unread)]
    log_unread(unread, root)
    return Images(str(root), classes, samples, names=names)


def from_archive(path: Path, split: str, *, inside: bool) -> list[Found]:
    """Return the images of CLASS/* in an archive. inside: those of split/CLASS/*, else that folder may be there too."""
    archive, members = archives.index(path)
    start = f"{split}/"
    here = [member for member in members if member.name.startswith(start)]
    if not inside and len(here) < len(members):
        start, here = "", members
    if not here:
        top = ", ".join(sorted({member.name.split("/")[0] for member in members})[:4]) or "nothing"
        raise UserError(f"no images ({path}!/{start}): expected {start}CLASS/*, found {top}")
    unread, found, deeper = Counter(), [], {}
    for member in here:
        label, *below = member.name.removeprefix(start).split("/")
        if label.startswith(".") or not below:
            unread["hidden or outside a class folder"] += 1
            continue
        deeper[label] = deeper.get(label, True) and len(below) > 1
        if is_image(member.name, unread):
            found.append(Found.member(label, archive, member))
    for label in (label for label, only in deeper.items() if only):
        what = f"a class folder that holds only folders ({path}!/{start}{label})"
        raise UserError(f"{what}: one level too many, make the archive from the folder below")
    log_unread(unread, path)
    return found


def from_map(path: Path, numbers: Path) -> list[Found]:
    """Return the images of a zip archive that Swin's map lists: path, tab, class number."""
    archive, members = archives.index(path)
    known, found = {member.name: member for member in members}, []
    for number, line in enumerate(text_of(numbers).splitlines(), start=1):
        name, tab, label = line.partition("\t")
        if not tab or not label.strip().isdecimal():
            raise UserError(f"not a line of a map ({numbers}, line {number}): expected path, tab, class number")
        if name not in known:
            raise UserError(f"an image that is not there, or listed twice ({path}!/{name}): see {numbers.name}")
        found.append(Found.member(label.strip(), archive, known.pop(name)))
    unread = Counter()
    if unlisted := sum(is_image(name, unread) for name in known):
        warn(f"{unlisted} images of {path} are not in {numbers.name}: not used")
    return found


def from_list(path: Path) -> list[Found]:
    """Return the images of a CSV file with the header path,label; paths are relative to its folder."""
    found, seen = [], set()
    for number, row in enumerate(rows_of(path), start=1):
        if number == 1:
            if not {"path", "label"} <= set(row):
                raise UserError(f"a list without its header ({path}): expected path,label in the first line")
            at = row.index("path"), row.index("label")
            continue
        name, label = (row[column] if column < len(row) else "" for column in at)
        if not name or not label:
            raise UserError(f"a row without path or label ({path}, row {number}): fill or remove it")
        if name in seen:
            raise UserError(f"an image that is listed twice ({path}: {name}): remove one of the rows")
        seen.add(name)
        found.append(Found(label, name, os.path.join(path.parent, name)))
    if gone := [each.path for each in found if not os.path.isfile(each.path)]:
        raise UserError(f"{len(gone)} images of a list are not there ({path}): {gone[0]} is one; fix their paths")
    return found


def from_shards(paths: Sequence[Path]) -> list[Found]:
    """Return the images of WebDataset's shards: KEY.jpg, with KEY.cls or a label in KEY.json."""
    found, unread = [], Counter()
    numbers = [int(re.search(SHARD, path.name)[1]) for path in paths]
    if absent := sorted(set(range(min(numbers), max(numbers))) - set(numbers)):
        warn(f"{len(absent)} shards are missing beside {paths[0]}, the first is number {absent[0]}")
    for path in paths:
        archive, members = archives.index(path)
        labels, images = {}, {}
        for member in members:
            folder, name = os.path.split(member.name)
            stem, _, kind = name.partition(".")  # as webdataset: a key ends at the first dot of the name
            key = os.path.join(folder, stem)
            if kind == "cls" or (kind == "json" and key not in labels):
                labels[key] = member.text
            elif kind != "json" and is_image(name, unread):
                if key in images:
                    raise UserError(f"two images of one key ({path}!/{key}): remove one of them")
                images[key] = member
        for key, member in images.items():
            if not labels.get(key):
                what = f"an image without a label ({path}!/{member.name})"
                raise UserError(f"{what}: expected {key}.cls, or a label in {key}.json")
            found.append(Found.member(labels[key], archive, member))
    log_unread(unread, f"{paths[0].parent}, {len(paths)} shards")
    return found


def from_flat_folder(folder: Path, labels: Path, root: Path, names: list[str] | None) -> Images:
    """Return the images of a folder without class folders. labels: a class a line, in the order of the file names, or
    file name and class.
    """
    unread, rows = Counter(), list(rows_of(labels))
    paths = {os.path.relpath(path, folder): path for path in walk(folder, unread)}
    log_unread(unread, folder)
    if rows and len(rows[0]) > 1:
        if rows[0][0] not in paths and not is_image(rows[0][0], Counter()):
            rows = rows[1:]  # a header
        classes = {row[0]: row[1] for row in rows if len(row) > 1}
        if len(classes) != len(rows):
            raise UserError(f"a row without a class, or a file that is listed twice (--val-labels {labels}): fix it")
        if lacking := [name for name in sorted(paths) if name not in classes]:
            raise UserError(f"{len(lacking)} images without a label (--val-labels {labels}): {lacking[0]} is one")
        if extra := len(classes) - len(paths):
            warn(f"{extra} of {len(classes)} labels in {labels} are of images that {folder} does not have")
    elif len(rows) != len(paths):
        counts = f"{len(rows)} lines, {len(paths)} images"
        raise UserError(f"other labels than images (--val-labels {labels}): {counts} in {folder}")
    else:
        classes = dict(zip(sorted(paths), (row[0] for row in rows)))
    if names is None and (root / "classes.txt").is_file():
        names = class_names(root / "classes.txt")
    found = [Found(classes[name], name, path) for name, path in paths.items()]
    return of(str(labels), found, names, numbers=True)


# ---------------------------------------------------------------- text files


def text_of(path: Path | str, errors: str = "strict") -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig", errors)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read a text file ({path}): {getattr(error, 'strerror', '') or 'no UTF-8'}") from None


def rows_of(path: Path) -> Iterator[list[str]]:
    """Yield the rows of a CSV file without empty ones, cells without blanks around them."""
    for row in csv_rows(path):
        if cells := [cell.strip() for cell in row]:
            yield cells


def csv_rows(path: Path, errors: str = "strict") -> Iterator[list[str]]:
    try:
        yield from csv.reader(io.StringIO(text_of(path, errors), newline=""))
    except csv.Error as error:
        raise UserError(f"not a CSV file ({path}): {error}") from None


def class_names(path: Path | str) -> list[str]:
    """Return the names of a class map: a line each, the first is class 0."""
    names = [line.strip() for line in text_of(path).rstrip().splitlines()]
    if not names or not all(names) or len(set(names)) < len(names):
        raise UserError(f"not a class map ({path}): expected a name in each line, each once")
    log(f"names of {len(names)} classes: {path}")
    return names


# ---------------------------------------------------------------- the splits of a run


def images(split: str, args: Options) -> Images:
    """Return the "train" or "val" images that the options ask for."""
    root = Path(args.data_path)
    if args.val_fraction and not (given := "val_fraction" in args.given) and exists(root, args.val_split):
        log(f"val: {root / args.val_split}, not what the run held out of train")
    elif args.val_fraction:
        return held_out(args, must_be_stored=args.eval and not given)[split == "val"]
    if split == "train":
        return find(root, args.train_split, class_map=args.class_map)
    return find(root, args.val_split, class_map=args.class_map, labels=args.val_labels)


def held_out(args: Options, *, must_be_stored: bool = False) -> tuple[Images, Images]:
    """Return the train images as --val-fraction divides them in two: as the run of --resume did, else by the seed.

    must_be_stored: raise UserError if that run's folder does not hold the division.
    """
    root = Path(args.data_path)
    if exists(root, args.val_split):
        what = f"--val-fraction, {root / args.val_split}"
        raise UserError(f"two sets to validate on ({what}): omit --val-fraction, or move the other away")
    whole, stored = find(root, args.train_split, class_map=args.class_map), split_file(args)
    if stored and stored.is_file():
        held, by = read_split(stored, whole, root), f"as in {stored}"
    elif must_be_stored:
        where = f"{stored or args.resume}, --val-fraction of the checkpoint"
        raise UserError(f"no record of the images held out ({where}): copy the run's {SPLIT}, or pass --val-fraction")
    else:
        held, by = draw(whole, args.val_fraction, args.seed), f"by --val-fraction {args.val_fraction:g}"
    if not held.any():
        raise UserError(f"no image is held out (--val-fraction {args.val_fraction:g}, {whole.where}): raise it")
    train, val = whole.take(np.flatnonzero(~held)), whole.take(np.flatnonzero(held))
    log(f"val: {len(val.samples)} of {len(held)} images of {whole.where} held out, {by}")
    return train, val


def draw(whole: Images, fraction: float, seed: int) -> np.ndarray:
    """Return True for the images held out: the fraction of each class, rounded, but never all of it."""
    held, classes = np.zeros(len(whole.samples), bool), np.array([name for _, name in whole.samples])
    for number, name in enumerate(whole.classes):
        members = np.flatnonzero(classes == name)
        count = min(int(fraction * len(members) + 0.5), max(len(members) - 1, 0))
        held[np.random.default_rng([seed % 2**64, number]).permutation(members)[:count]] = True
    return held


def split_file(args: Options) -> Path | None:
    """Return where the run of --resume has its division, if it was given one."""
    if not args.resume:
        return None
    path = args.run_folder if args.resume == "auto" else Path(args.resume)
    if args.resume == "auto" or path.is_dir():
        return path / SPLIT if files.candidates(path) else None
    return path.parent / SPLIT


def read_split(path: Path, whole: Images, root: Path) -> np.ndarray:
    rows = csv_rows(path, "surrogateescape")  # names of files may be any bytes
    stored = {row[0]: row[1] for row in rows if len(row) == 2}
    names = [name.removeprefix(str(root)) for name, _ in whole.samples]
    if stored.pop("path", "") != "split" or stored.keys() != set(names) or {*stored.values()} != {"train", "val"}:
        raise UserError(f"other images than the run divided ({path}, {whole.where}): restore them, or start a new run")
    return np.array([stored[name] == "val" for name in names])


def split_text(root: str, **parts: Iterable[tuple[str, int]]) -> str:
    """Return the content of SPLIT. parts: the samples of train and val."""
    start = str(Path(root))
    rows = (dict(path=path.removeprefix(start), split=name) for name, part in parts.items() for path, _ in part)
    return "".join(csv_lines(FIELDS, rows))
