"""Walk folders of images: which files are read, which are not, and where links lead."""

import functools
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from training.errors import UserError
from training.images import dangling, formats
from utils import log

IGNORED = (".DS_Store", "__MACOSX", ".ipynb_checkpoints", "Thumbs.db", "desktop.ini")  # left by other programs


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of files that are read, in lower case."""
    known = (*formats(), "MPO")
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in known)


def is_ignored(name: str) -> bool:
    """Return True for files and folders that other programs leave beside images."""
    return name.startswith("._") or name in IGNORED


def fail(error: UserError) -> None:
    raise error


def walk(
    folder: str | Path,
    unread: Counter,
    above: tuple[Path, ...] = (),
    *,
    on_error: Callable[[UserError], None] = fail,
) -> list[str]:
    """Return the image files in a folder and those below, sorted by folder and name; links are followed.

    unread: counts the other files by suffix. above: the real paths of the folders that led here. on_error: called for
    a link that leads back above itself, or to nothing.
    """
    chain, files = (*above, Path(os.path.realpath(folder))), []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_ignored(entry.name):
            continue
        if entry.is_dir():
            if entry.is_symlink():
                target = Path(os.path.realpath(entry.path))
                if any(target == path or target in path.parents for path in chain):
                    on_error(UserError(f"a link that leads back above itself ({entry.path} -> {target}): remove it"))
                    continue
            files += walk(entry.path, unread, chain, on_error=on_error)
        elif os.path.splitext(entry.name)[1].lower() not in suffixes():
            unread[os.path.splitext(entry.name)[1].lower() or "without a suffix"] += 1
        elif entry.is_symlink() and not os.path.exists(entry.path):
            on_error(dangling(entry.path))
        else:
            files.append(entry.path)
    return files if above else sorted(files, key=os.path.split)


def class_folders(root: Path) -> list[str]:
    """Return the names of the class folders in root, sorted."""
    if not root.is_dir():
        layout = "ImageNet's layout, train/CLASS/* and val/CLASS/*"
        raise UserError(f"no such data folder ({root}): expected {layout}, in --data-path")
    entries = list(root.iterdir())
    folders = [entry for entry in entries if entry.is_dir()]
    found = sorted(entry.name for entry in folders if not entry.name.startswith(".") and not is_ignored(entry.name))
    if not found:
        flat = any(entry.suffix.lower() in suffixes() for entry in entries)
        advice = ", or --val-labels FILE for a val folder without them" if flat else ""
        raise UserError(f"no images ({root}): expected a folder for each class in it{advice}")
    return found


def check_levels(root: Path) -> None:
    """Raise UserError if a class folder holds only folders."""
    for name in class_folders(root):
        entries = [entry for entry in sorted((root / name).iterdir()) if not is_ignored(entry.name)]
        if entries and all(entry.is_dir() for entry in entries):
            inside = ", ".join(entry.name for entry in entries[:3])
            what = f"a class folder that holds only folders ({root / name}: {inside})"
            raise UserError(f"{what}: one level too many, move them up into {root}")


def log_unread(unread: Counter, where: str | Path, write: Callable[[str], None] = log) -> None:
    """Log how many files are not read, by suffix."""
    if unread:
        counts = ", ".join(f"{number} {suffix}" for suffix, number in unread.most_common(8))
        write(f"files that are not read ({where}): {counts}")


def image_files(words: list[str], on_error: Callable[[UserError], None] = fail) -> list[str]:
    """Return the image files that are named: files, folders with all below them, and globs; each once, in order.

    Raises UserError for a name of nothing.
    """
    files, unread = [], Counter()
    for word in words:
        if os.path.isdir(word):
            files += walk(word, unread, on_error=on_error)
        elif os.path.lexists(word):
            files.append(word)
        elif found := sorted(glob.glob(word, recursive=True)):
            files += [path for path in found if os.path.splitext(path)[1].lower() in suffixes()]
        else:
            raise UserError(f"no such image or folder ({word}): check the name")
    log_unread(unread, ", ".join(words))
    return list(dict.fromkeys(files))


def numbered_names(paths: Iterable[str]) -> list[str]:
    """Return the files' names without suffix, each once: those that are alike, in any case, are numbered."""
    names, used = [], set()
    for path in paths:
        stem, number = Path(path).stem, 1
        name = stem
        while name.casefold() in used:  # some file systems take both cases for one
            number += 1
            name = f"{stem}_{number}"
        used.add(name.casefold())
        names.append(name)
    return names
