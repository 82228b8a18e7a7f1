"""What surrounds a run: files written whole, one owner of its folder, the checkpoints it keeps, signals, and what
became of it.

Needs the standard library only, so that main.py can ask before torch is imported.
"""

import contextlib
import ctypes
import datetime
import fcntl
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

CHECKPOINT, BEST, LOG, STATUS, LOCK = "checkpoint.pth", "checkpoint_best.pth", "log.txt", "status.json", ".lock"
EARLIER = re.compile(r"checkpoint-\d{4,}-\d{6,}\.pth")  # what --checkpoint-hist keeps beside the newest
PREEMPTED = 128 + signal.SIGTERM  # the exit code of a run that a signal ended, its state saved
LAST_SECONDS = 4.0  # that a process without its launcher has for saving


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


def earlier_name(epochs: int, updates: int) -> str:
    """The name of a checkpoint after so many whole epochs, and so many updates of the next one."""
    return f"checkpoint-{epochs:04d}-{updates:06d}.pth"


def earlier(folder: Path) -> list[Path]:
    """The kept checkpoints beside the newest one, the newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*.pth") if EARLIER.fullmatch(path.name)]
    return sorted(found, key=place_of, reverse=True)


def place_of(path: Path) -> tuple[int, ...]:
    """Whole epochs, and updates of the next one, as `earlier_name` has them."""
    return tuple(int(part) for part in path.stem.split("-")[1:])


def candidates(folder: Path) -> list[Path]:
    """All checkpoints of a folder, in the order in which a run is continued from them."""
    named = [Path(folder) / CHECKPOINT, *earlier(folder), Path(folder) / BEST]
    return [path for path in named if path.is_file()]


def prune(folder: Path, keep: int, place: tuple[int, int]) -> None:
    """Leave the newest `keep` checkpoints, CHECKPOINT counted, and none from beyond `place`, where the run is; not to
    touch the best one.

    Those from beyond are of a branch that was left when the run went back to an earlier checkpoint.
    """
    found = earlier(folder)
    kept = [path for path in found if place_of(path) <= place][: max(keep - 1, 0)]
    for path in set(found) - set(kept):
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- one owner


def _me() -> str:
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
            self.file.write(_me() + "\n")
            self.file.flush()
        else:
            self.file.seek(0)
            self.taken_by = self.file.read().strip() or "another process"
            self.file.close()

    def release(self) -> None:
        self.file.close()


# ---------------------------------------------------------------- what became of a run


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Status:
    """status.json: {"state": running | finished | preempted | failed, "reason", "epoch", "updates", "by", "started",
    "time"}.

    A failure is written by the process that had it; those that only notice that another one is gone leave its reason as
    it is.
    """

    def __init__(self, folder: Path, started: str):
        self.path, self.started, self.place = Path(folder) / STATUS, started, {"epoch": -1, "updates": 0}

    def write(self, state: str, reason: str = "") -> None:
        record = {"state": state, "reason": reason, **self.place, "by": _me(), "started": self.started, "time": now()}
        with contextlib.suppress(OSError):  # a full disk has an error of its own, which comes first
            write_text(self.path, json.dumps(record, indent=1) + "\n")

    def fail(self, reason: str, *, echo: bool = False) -> None:
        if not (echo and self.told()):
            self.write("failed", reason)

    def told(self) -> bool:
        """Whether this run's failure has been written already."""
        try:
            record = json.loads(self.path.read_text())
            return record["state"] == "failed" and record["started"] == self.started
        except (OSError, ValueError, KeyError, TypeError):
            return False


# ---------------------------------------------------------------- signals


class StopSignals:
    """Notes SIGTERM and SIGUSR1 while it is entered: `received` is the signal's name, or None. The run ends at its next
    safe point.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        self.received = signal.Signals(number).name


def die_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG


def launched() -> bool:
    """Whether a launcher (torchrun) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def end_with_launcher() -> None:
    """End soon after the launcher does: a SIGTERM at once, so that the state is saved, and some seconds later the end
    in any case.

    torchrun's processes outlive it otherwise, and go on writing into the run's folder.
    """
    parent = os.getppid()
    die_with_parent(signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        time.sleep(LAST_SECONDS)
        os._exit(PREEMPTED)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()


@contextlib.contextmanager
def time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raise `error` in the main thread where the body takes longer, also in the middle of a system call. 0, or another
    thread: no limit.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(_number, _frame) -> None:
        raise error

    handler, (left, _) = signal.signal(signal.SIGALRM, over), signal.setitimer(signal.ITIMER_REAL, seconds)
    start = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3) if left else 0)
        signal.signal(signal.SIGALRM, handler)


def loading_process(_index: int) -> None:
    """What a data-loading process does first: a group of its own, away from the launcher's signals, and no life without
    the trainer.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = (
        lambda *_: None
    )  # of the thread that hands over memory, where the trainer breaks off: the trainer has its own line
    die_with_parent(signal.SIGKILL)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty where there is no such process, or no such file system."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def identity() -> tuple[str, int, str]:
    """This process among all that the machines of a run ever have: host, pid, and when it was started, in the kernel's
    ticks.
    """
    return socket.gethostname(), os.getpid(), "".join(_stat(os.getpid())[19:20])


def process_state(pid: int, started: str = "") -> str:
    """ "stopped", "gone" or "alive", as this machine's process table has it. started: as in `identity`, for another one
    may have its pid.
    """
    fields = _stat(pid)
    if not fields or (started and fields[19] != started):
        return "gone" if sys.platform == "linux" else "alive"
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(fields[0], "alive")
