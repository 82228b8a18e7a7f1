"""What is noticed about the data of a run before it starts: label images here, COCO's annotations in dense/coco.py.

The checks are functions over data that return findings, so that they serve a run and a check of all files alike.
"""

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from mmengine.logging import print_log

from dense.transforms import TwinsLoadAnnotations, classes_of_values, read_labels, steps_of, unwrapped
from training.errors import UserError
from training.folders import walk

MOST_LOOKED = 200  # label images that are read before a run
SHOWN = 3  # names or ids in a line
LEVELS = {"note": logging.INFO, "warning": logging.WARNING}


@dataclass(frozen=True)
class Finding:
    """Something noticed about data. kind: a note on what the program decides, a warning, or an error, which ends a run.
    where: the file or folder.
    """

    kind: str
    where: str
    line: str


def report(findings: Iterable[Finding]) -> None:
    """Log findings; raise UserError for the first error."""
    findings = list(findings)
    for each in findings:
        if each.kind != "error":
            print_log(each.line, logger="current", level=LEVELS[each.kind])
    for each in findings:
        if each.kind == "error":
            raise UserError(each.line)


def some(values: Collection) -> str:
    """Return the first values as text, and how many there are besides."""
    shown = ", ".join(str(each) for each in list(values)[:SHOWN])
    return shown if len(values) <= SHOWN else f"{shown} and {len(values) - SHOWN} more"


# ---------------------------------------------------------------- names


def plain_name(name: str) -> str:
    """Return a class name without what people write in two ways: case, spaces and Unicode normalization."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def plain_file(name: str) -> str:
    """Return a file name without what file systems change: the suffix's case and Unicode normalization."""
    stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name))
    return stem + suffix.lower()


class FileNames:
    """Find files whose names differ in the case of the suffix or in Unicode normalization only. Lists a folder once."""

    def __init__(self):
        self.folders, self.found = {}, []

    def find(self, path: str) -> str:
        """Return the path of the file that is there, or `path` if there is none."""
        folder, name = os.path.split(path)
        if folder not in self.folders:
            names = os.listdir(folder) if os.path.isdir(folder) else []
            self.folders[folder] = {plain_file(each): each for each in names} | {each: each for each in names}
        names = self.folders[folder]
        other = names.get(name) or names.get(plain_file(name))
        if other is None or other == name:
            return path
        self.found.append(other)
        return os.path.join(folder, other)

    def findings(self, where: str) -> Iterator[Finding]:
        if self.found:
            what = f"names that differ in the suffix's case or in Unicode normalization ({where})"
            yield Finding("note", where, f"{what}: {len(self.found)} files are used, as {some(self.found)}")


# ---------------------------------------------------------------- label images


def spread(values: Sequence, most: int = MOST_LOOKED) -> list:
    """Return all values up to `most`, else that many spread evenly."""
    indices = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return [values[index] for index in indices]


def pixel_counts(path: str) -> np.ndarray:
    """Return how many pixels of a label file have each value, (256,); raise UserError if it is no label file."""
    return np.bincount(read_labels(path).reshape(-1), minlength=256)


@dataclass(frozen=True)
class Meaning:
    """What a data set makes of label values. classes_of: the class index (256,) of each; reduced: 0 is no class."""

    classes: tuple[str, ...]
    classes_of: np.ndarray
    ignored: int
    reduced: bool

    @classmethod
    def of(cls, dataset) -> "Meaning":
        given = [step.reduce_zero_label for step in steps_of(dataset, TwinsLoadAnnotations)]
        reduced = dataset.reduce_zero_label if not given or given[0] is None else given[0]
        classes_of = classes_of_values(dataset.label_map, reduce_zero_label=reduced)
        return cls(tuple(dataset.metainfo.get("classes") or ()), classes_of, dataset.ignore_index, bool(reduced))

    @property
    def labeled(self) -> np.ndarray:
        """Return which values (256,) are those of a class."""
        return (self.classes_of < len(self.classes)) & (self.classes_of != self.ignored)

    @property
    def wrong(self) -> np.ndarray:
        """Return which values (256,) mean neither a class nor none."""
        return (self.classes_of >= len(self.classes)) & (self.classes_of != self.ignored)

    @property
    def known(self) -> str:
        first = int(self.reduced)
        return f"{len(self.classes)} classes have values {first} to {len(self.classes) - 1 + first}"


def ranges(values: Sequence[int]) -> str:
    """Return sorted integers as text: 0 to 3, 255."""
    parts = np.split(np.asarray(values), np.flatnonzero(np.diff(values) > 1) + 1)
    texts = [str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts if len(part)]
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")


def summary(counts: np.ndarray, meaning: Meaning, of_class: np.ndarray, looked: str) -> str:
    """Return the values found and the share of pixels of each class, of the most frequent ones if they are many."""
    order = np.argsort(-of_class, kind="stable") if len(of_class) > 12 else np.arange(len(of_class))
    shares = [f"{meaning.classes[index]} {of_class[index] / counts.sum():.1%}" for index in order[:12]]
    shares += [f"{len(of_class) - 12} more classes"] if len(of_class) > 12 else []
    none = 1 - of_class.sum() / counts.sum()
    return f"{looked}, values {ranges(np.flatnonzero(counts))}; pixels: {', '.join(shares)}, no class {none:.1%}"


def label_findings(
    pixels: np.ndarray, meaning: Meaning, where: str, total: int, *, known_good: bool = False
) -> Iterator[Finding]:
    """Yield what is noticed about label files. pixels: pixel_counts of each of them, (N, 256), of `total` files.

    known_good: the training labels have shown that reduce_zero_label is right.
    """
    counts, number = pixels.sum(0), len(meaning.classes)
    of_class = np.array([counts[meaning.labeled & (meaning.classes_of == index)].sum() for index in range(number)])
    looked = f"{len(pixels)} of {total} files"
    yield Finding("note", where, f"labels ({where}): {summary(counts, meaning, of_class, looked)}")
    problem = wrong_values(counts, pixels, meaning, where)
    if problem:
        yield Finding("error", where, problem)
        return
    if meaning.reduced and number > 1 and counts[:number].all() and not counts[number]:
        what = f"reduce_zero_label=True removes a class ({where}): values 0 to {number - 1} are as many as the classes"
        advice = f"value {number} of {meaning.classes[-1]!r} is missing; set reduce_zero_label=False, or fix the labels"
        yield Finding("warning" if known_good else "error", where, f"{what}, {advice}")
    absent = [name for name, found in zip(meaning.classes, of_class) if not found]
    if absent:
        what = f"classes without a pixel ({where}, {looked}): {len(absent)} of {number}, {some(absent)}"
        yield Finding("warning", where, f"{what}; a class without a pixel in any file has no score")


def wrong_values(counts: np.ndarray, pixels: np.ndarray, meaning: Meaning, where: str) -> str | None:
    """Return an error for labels that cannot be what the config says; None if they can be."""
    found, number, known = np.flatnonzero(counts), len(meaning.classes), meaning.known
    wrong = meaning.wrong & (counts > 0)
    if wrong.any():
        files = int(pixels[:, wrong].any(1).sum())
        what = f"labels of no class ({where}): values {ranges(np.flatnonzero(wrong))} in {files} of {len(pixels)} files"
        one_more = not meaning.reduced and np.flatnonzero(wrong).tolist() == [number]
        advice = (
            "set reduce_zero_label=True if 0 is no class" if one_more else "write class indices, or 255 for no class"
        )
        return f"{what}, but {known}; {advice}"
    if number > 1 and found.tolist() == [0, 255] and meaning.ignored == 255:
        return f"masks of 0 and 255 ({where}): 255 means no class, {known}; write class indices in place of 255"
    if not (meaning.labeled & (counts > 0)).any():
        what = f"no pixel of any class ({where}): values {ranges(found)} mean none, {known}"
        return f"{what}; fix the labels, or reduce_zero_label={meaning.reduced}"
    return None


def stems(folder: str, suffix: str, unread: Counter) -> dict[str, str]:
    """Return the files below a folder that end with a suffix in any case, by their names in the folder without it.

    unread: counts the others by suffix.
    """
    found = {}
    for path in walk(folder, unread) if os.path.isdir(folder) else ():
        if path.lower().endswith(suffix.lower()):
            found[unicodedata.normalize("NFC", os.path.relpath(path, folder)[: -len(suffix)])] = path
        else:
            unread[os.path.splitext(path)[1].lower()] += 1
    return found


def pair_findings(
    labels: list[str], label_files: dict[str, str], image_files: dict[str, str], where: str
) -> Iterator[Finding]:
    """Yield images without label files, and label files without images. labels: the label file of each image that is
    used, there or not; the others: all files, see stems.
    """
    there = {os.path.normpath(path) for path in label_files.values()}
    missing = [path for path in labels if os.path.normpath(path) not in there and not os.path.exists(path)]
    if missing:
        what = f"images without label files ({where}): {len(missing)} of {len(labels)}, as {some(missing)}"
        yield Finding("error", where, f"{what}; add the files, or remove the images")
    alone = [path for stem, path in label_files.items() if stem not in image_files]
    if alone:
        what = f"label files without images ({where}): {len(alone)} of {len(label_files)}, as {some(alone)}"
        yield Finding("warning", where, f"{what}; they are not used")


def segmentation_findings(dataset, *, most: int = MOST_LOOKED, known_good: bool = False) -> Iterator[Finding]:
    """Yield what is noticed about the label files of an mmsegmentation data set, of which `most` are read."""
    infos = (dataset.get_data_info(index) for index in range(len(dataset)))
    labels = [info["seg_map_path"] for info in infos if info.get("seg_map_path")]
    if not labels or not hasattr(dataset, "seg_map_suffix"):
        return
    images, folder = dataset.data_prefix["img_path"], dataset.data_prefix["seg_map_path"]
    files = (stems(folder, dataset.seg_map_suffix, Counter()), stems(images, dataset.img_suffix, Counter()))
    pairs = list(pair_findings(labels, *files, folder))
    yield from pairs
    if not any(each.kind == "error" for each in pairs):
        pixels = np.stack([pixel_counts(path) for path in spread(labels, most)])
        yield from label_findings(pixels, Meaning.of(dataset), folder, len(labels), known_good=known_good)


def check_labels(dataset, *, known_good: bool = False) -> None:
    """Log what is noticed about the label files of a data set; raise UserError if they cannot be used."""
    for part in unwrapped(dataset):
        report(segmentation_findings(part, known_good=known_good))
