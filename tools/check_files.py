"""Decode many files, and report those that cannot be used: what tools.check_data does for each kind of data set."""

import contextlib
import functools
import hashlib
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from training import archives
from training.errors import UserError
from training.images import ImageReader, opened


@dataclass(frozen=True)
class Finding:
    """A problem of a file or folder."""

    path: str
    problem: str


@dataclass(frozen=True)
class Item:
    """A file to decode by `read`, which raises UserError. split: of an image, which must be in no other. label: that
    all images of the same bytes must have. place: of the bytes that `read` takes too, if they are in an archive.
    """

    path: str
    read: Callable[..., object]
    split: str = ""
    label: str = ""
    place: archives.Place | None = None


# ---------------------------------------------------------------- every file


@functools.cache
def reader(max_pixels: int) -> ImageReader:
    return ImageReader(max_pixels=max_pixels)


def decode_image(path: str, data: bytes | None = None, *, max_pixels: int) -> None:
    verify(path, max_pixels, data)
    reader(max_pixels)(path, data)


def verify(path: str, max_pixels: int, data: bytes | None = None) -> None:
    """Look at checksums, which decoding a PNG does not do."""
    with opened(path, data=data, max_pixels=max_pixels) as file:
        file.verify()


def look(item: Item) -> tuple[Item, str, str]:
    """Return an item, a hash of its file, and its problem; each may be empty."""
    try:
        if item.place:
            data = archives.read(item.place, item.path)
            item.read(item.path, data)
            return item, hashlib.blake2b(data).hexdigest(), ""
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
            elif item.split:
                same[digest].append(item)
    for first, *others in same.values():
        for other in others:
            if other.label != first.label:
                yield Finding(other.path, f"the same file has another class ({first.path}): remove one of them")
            elif other.split != first.split:
                yield Finding(other.path, f"the same file is in {first.split} ({first.path}): remove one of them")
