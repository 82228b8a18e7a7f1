"""Files and folders that a command is asked to write: new ones unless it may overwrite, each whole or not at all."""

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from training.errors import UserError, short_reason
from training.files import atomic_write

TABLES = (".csv", ".json", ".jsonl")


def check_new(
    path: Path, option: str, *, overwrite: bool, suffixes: Sequence[str] = (), made: Path | None = None
) -> None:
    """Raise UserError if a file cannot be written there: another suffix, no such folder, or it exists.

    made: a folder that will be made before the file is written.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"no such format ({option} {path}): give a name that ends in {' or '.join(suffixes)}")
    folder = path.absolute().parent
    if not folder.is_dir() and (made is None or folder != made.absolute()):
        raise UserError(f"no such folder ({option} {path}): make it first")
    if path.is_dir() or (not overwrite and (path.exists() or path.is_symlink())):
        raise UserError(f"it exists already ({option} {path}): give another name, or pass --overwrite for a file")


def check_folder(folder: Path, option: str, *, overwrite: bool) -> None:
    """Raise UserError if results cannot go into a folder: a file, or it holds files already."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"not a folder ({option} {folder}): give another name")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"the folder holds files ({option} {folder}): choose another, or pass --overwrite")


def make_folder(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder ({option} {folder}): {error.strerror or error}") from error


def write_file(path: Path, option: str, write: Callable) -> None:
    """Write a file atomically; raise UserError if that fails."""
    try:
        atomic_write(path, write)
    except OSError as error:
        advice = "is there room, and the right to write?"
        raise UserError(f"cannot write ({option} {path}): {error.strerror or error}; {advice}") from error


@contextlib.contextmanager
def writing(name: object) -> Iterator[None]:
    """Turn whatever ends the writing of a file into a UserError: a full disk ends in one of many types of errors, and
    torch's hides the system's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = short_reason(error.__context__ or error)[:120]
        raise UserError(f"cannot write ({name}): {reason}; is there room, and the right to write?") from error


def write_rows(path: Path, option: str, fields: Sequence[str], rows: Iterable[Mapping]) -> None:
    """Write rows as they come, as CSV, JSON or JSON lines by the suffix. A list in a cell of CSV is JSON."""
    kind = path.suffix.lower()
    lines = csv_lines(fields, rows) if kind == ".csv" else json_array(rows) if kind == ".json" else json_lines(rows)

    def write(file) -> None:
        for line in lines:
            file.write(line.encode("utf-8", "surrogateescape"))  # names of files may be any bytes

    write_file(path, option, write)


def csv_lines(fields: Sequence[str], rows: Iterable[Mapping]) -> Iterator[str]:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(fields)
    for row in rows:
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
        writer.writerow(json.dumps(row[name]) if isinstance(row[name], list) else row[name] for name in fields)
    yield buffer.getvalue()


def json_lines(rows: Iterable[Mapping]) -> Iterator[str]:
    yield from (json.dumps(row) + "\n" for row in rows)


def json_array(rows: Iterable[Mapping]) -> Iterator[str]:
    start = "[\n"
    for row in rows:
        yield start + json.dumps(row)
        start = ",\n"
    yield "[]\n" if start == "[\n" else "\n]\n"
