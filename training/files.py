"""The files of a run's folder: atomic writes, the list of checkpoints, and the lock that one process holds.

Needs the standard library only: main.py asks before torch is imported.
"""

import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from training.errors import UserError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

CHECKPOINT, BEST, LOG, STATUS, LOCK = "checkpoint.pth", "checkpoint_best.pth", "log.txt", "status.json", ".lock"
BAD_IMAGES = "bad_images.txt"  # training images that could not be read
SUMMARY = "summary.csv"  # the numbers of LOG as a table
FAR = 2**30  # bytes
OLDER = re.compile(r"checkpoint-\d{4,}-\d{6,}\.pth")  # what --checkpoint-hist keeps beside the newest


# ---------------------------------------------------------------- atomic writes


class _Recorder:
    """A file that keeps its first error: torch.save turns what `write` raises, even a signal's handler, into an error
    without a reason.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.error, self.over = file, None, False
        self.flush = file.flush

    def write(self, data) -> int:
        # torch's writer ends its file even after an error, in a place where an exception would end the process.
        if self.over or self.error is not None:
            return memoryview(data).nbytes
        try:
            return self.file.write(data)
        except BaseException as error:
            self.error = error
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where a folder can be opened (not on Windows)."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, write: Callable[[BinaryIO], object], *, keep_as: Path | None = None) -> None:
    """Replace a file atomically: it always holds either its old content or all that `write` writes.

    keep_as: another name that the old file gets. Raises OSError on failure; nothing has changed then.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb", buffering=2**20) as file:
            recorder = _Recorder(file)
            try:
                write(recorder)
            finally:
                recorder.over = True
                if recorder.error is not None:
                    raise recorder.error
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            _keep(path, keep_as)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _keep(path: Path, name: Path) -> None:
    """Give a file another name; on a file system without links it loses its own."""
    try:
        os.link(path, name)
    except OSError:
        os.replace(path, name)


def write_text(path: Path, text: str) -> None:
    content = text.encode(errors="surrogateescape")  # names of files may be any bytes
    atomic_write(path, lambda file: file.write(content))


def remove_unfinished(folder: Path) -> None:
    """Remove the half-written files of a killed process. For the folder's owner only."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- the checkpoints of a folder


def older_name(epochs: int, updates: int) -> str:
    """Return the name of a checkpoint after so many epochs, and so many updates of the next one."""
    return f"checkpoint-{epochs:04d}-{updates:06d}.pth"


def older_checkpoints(folder: Path) -> list[Path]:
    """Return the kept checkpoints beside the newest one, newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*.pth") if OLDER.fullmatch(path.name)]
    return sorted(found, key=position_of, reverse=True)


def position_of(path: Path) -> tuple[int, ...]:
    """Return epochs, and updates of the next one, from a name that `older_name` made."""
    return tuple(int(part) for part in path.stem.split("-")[1:])


def candidates(folder: Path) -> list[Path]:
    """Return all checkpoints of a folder, in the order in which a run is resumed from them."""
    named = [Path(folder) / CHECKPOINT, *older_checkpoints(folder), Path(folder) / BEST]
    return [path for path in named if path.is_file()]


def best_checkpoint(folder: str | Path) -> Path:
    """Return a folder's best checkpoint, its newest one if none is scored yet; raise UserError if it has none."""
    if not (found := sorted(candidates(folder), key=lambda path: path.name != BEST)):
        raise no_checkpoint(folder)
    return found[0]


def no_checkpoint(folder: str | Path) -> UserError:
    return UserError(f"a folder without a checkpoint ({folder}): pass a file, or the folder of a run")


def prune(folder: Path, keep: int, position: tuple[int, int]) -> list[OSError]:
    """Delete all but the newest `keep` checkpoints, CHECKPOINT counted, and those beyond the run's `position`.

    Those beyond are of a branch that was abandoned when the run went back to an earlier checkpoint. The best one stays.
    Returns the errors of files that could not be deleted; the next call tries again.
    """
    errors = []
    found = older_checkpoints(folder)
    kept = [path for path in found if position_of(path) <= position][: max(keep - 1, 0)]
    for path in set(found) - set(kept):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            errors.append(error)
    return errors


# ---------------------------------------------------------------- one owner


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _lock(file) -> bool:
    """Return True if the lock was free and is now this process's. It ends with the process, and is not inherited."""
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            _lock_byte(file.fileno())
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: there is none to hold
        return True
    return True


def _lock_byte(descriptor: int) -> None:
    """Lock as Windows does: what is locked cannot be read, so it is a byte behind the owner's name."""
    import msvcrt

    os.lseek(descriptor, FAR, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)


def lines(path: Path) -> list[bytes]:
    """Return the lines of a file; none if it does not exist."""
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []


def add_line(path: Path, key: str, text: str) -> int:
    """Add the line KEY, tab, TEXT, unless the file has one of that key; return the number of lines.

    Any number of processes may do so at once.
    """
    start = os.fsencode(f"{key}\t")
    with open(path, "a+b", buffering=0) as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)  # read here, for on NFS closing another descriptor would end the lock
        existing = file.read().splitlines()
        if any(line.startswith(start) for line in existing):
            return len(existing)
        file.write(start + text.encode(errors="surrogateescape") + b"\n")
        return len(existing) + 1


def owner(folder: Path) -> str | None:
    """Return who runs in this folder, as "process N on HOST", or None. Not for a process that holds the lock itself."""
    try:
        with open(Path(folder) / LOCK, "r+") as file:
            return None if _lock(file) else file.read().strip() or "another process"
    except OSError:
        return None


def in_use(folder: Path, taken_by: str, option: str = "--output_dir") -> str:
    what = f"the folder is in use ({option} {folder}): {taken_by} runs in it"
    return f"{what}; wait for it, stop it, or choose another folder"


class Lock:
    """The right to write into a folder until `release` or the end of the process; taken_by: who has it instead."""

    def __init__(self, folder: Path):
        self.file = open(Path(folder) / LOCK, "a+")  # noqa: SIM115  open as long as the run
        self.taken_by = None
        if _lock(self.file):
            self.file.truncate(0)
            self.file.write(this_process() + "\n")
            self.file.flush()
        else:
            self.file.seek(0)
            self.taken_by = self.file.read().strip() or "another process"
            self.file.close()

    def release(self) -> None:
        self.file.close()
