"""The files of a run's folder: written whole, listed, pruned, and the folder owned by one process at a time.

Needs the standard library only: main.py asks before torch is imported.
"""

import fcntl
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

CHECKPOINT, BEST, LOG, STATUS, LOCK = "checkpoint.pth", "checkpoint_best.pth", "log.txt", "status.json", ".lock"
OLDER = re.compile(r"checkpoint-\d{4,}-\d{6,}\.pth")  # what --checkpoint-hist keeps beside the newest


# ---------------------------------------------------------------- files written whole


class _Recorder:
    """A file whose first error is kept: torch.save turns what `write` raises, a signal's handler included, into an
    error that does not say why.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.error, self.over = file, None, False
        self.flush = file.flush

    def write(self, data) -> int:
        if (
            self.over or self.error is not None
        ):  # torch's writer ends its file even then, from where an exception would end the process
            return memoryview(data).nbytes
        try:
            return self.file.write(data)
        except BaseException as error:
            self.error = error
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, write: Callable[[BinaryIO], object], *, keep_as: Path | None = None) -> None:
    """Replace a file as a whole: at every moment it holds either what it held, or all that `write` writes.

    keep_as: what the file held stays, durable, under this name. Raises OSError where the file cannot be written, and
    then nothing has changed.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    """Give a file another name. Where the file system has no links, it loses its own name, and is found under the
    other.
    """
    try:
        os.link(path, name)
    except OSError:
        os.replace(path, name)


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda file: file.write(text.encode()))


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process of an earlier run left half-written. For the folder's owner only."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- the checkpoints of a folder


def older_name(epochs: int, updates: int) -> str:
    """The name of a checkpoint after so many whole epochs, and so many updates of the next one."""
    return f"checkpoint-{epochs:04d}-{updates:06d}.pth"


def older_checkpoints(folder: Path) -> list[Path]:
    """The kept checkpoints beside the newest one, the newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*.pth") if OLDER.fullmatch(path.name)]
    return sorted(found, key=position_of, reverse=True)


def position_of(path: Path) -> tuple[int, ...]:
    """Whole epochs, and updates of the next one, as `older_name` has them."""
    return tuple(int(part) for part in path.stem.split("-")[1:])


def candidates(folder: Path) -> list[Path]:
    """All checkpoints of a folder, in the order in which a run is continued from them."""
    named = [Path(folder) / CHECKPOINT, *older_checkpoints(folder), Path(folder) / BEST]
    return [path for path in named if path.is_file()]


def prune(folder: Path, keep: int, place: tuple[int, int]) -> None:
    """Leave the newest `keep` checkpoints, CHECKPOINT counted, and none from beyond `place`, where the run is; not to
    touch the best one.

    Those from beyond are of a branch that was left when the run went back to an earlier checkpoint.
    """
    found = older_checkpoints(folder)
    kept = [path for path in found if position_of(path) <= place][: max(keep - 1, 0)]
    for path in set(found) - set(kept):
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- one owner


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _lock(file) -> bool:
    """Whether the lock was free, and is this process's now. It ends with the process, however that ends, and is not
    inherited by others.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: there is none to hold
        return True
    return True


def owner(folder: Path) -> str | None:
    """Who runs in this folder now, as "process N on HOST"; None if nobody does. Not for a process that holds the lock
    itself.
    """
    try:
        with open(Path(folder) / LOCK, "r+") as file:
            return None if _lock(file) else file.read().strip() or "another process"
    except OSError:
        return None


def in_use(folder: Path, taken_by: str) -> str:
    what = f"the folder is in use (--output_dir {folder}): {taken_by} runs in it"
    return f"{what}; wait for it, stop it, or choose another folder"


class Lock:
    """The right to write in a folder, until `release` or the end of the process. `taken_by`: who has it instead, or
    None.
    """

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
