"""The processes of a run: signals and time limits, and which of them ended or hang."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from training.launcher import die_with_parent
from utils import all_gather, get_world_size

PEERS: list[tuple[str, int, str]] = []  # `identity` of each process of the run


# ---------------------------------------------------------------- signals and time limits


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


# ---------------------------------------------------------------- lost processes


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


def meet_peers() -> None:
    """Note who the processes of the run are. Every process must call it."""
    PEERS[:] = all_gather(identity())


def is_lost_process(error: RuntimeError) -> bool:
    """Whether the error is only the echo of another process that ended or is stuck."""
    text = str(error).lower()
    return get_world_size() > 1 and (
        isinstance(error, dist.DistError) or "gloo" in text or "closed by peer" in text or "timed out waiting" in text
    )


def peers_of_this_machine() -> dict[int, tuple[int, str]]:
    """rank -> (pid, state) of the run's processes here."""
    here = socket.gethostname()
    return {rank: (pid, process_state(pid, started)) for rank, (host, pid, started) in enumerate(PEERS) if host == here}


def lost_processes() -> str:
    """Which processes of this machine ended or are stopped, in words."""
    time.sleep(0.5)  # for the process table to know
    lost = [
        f"process {rank} (pid {pid}) is {state}"
        for rank, (pid, state) in peers_of_this_machine().items()
        if state != "alive"
    ]
    return ", ".join(lost) or "none of this machine has ended: look for one that hangs, or at the other machines"


def end_stopped_processes() -> None:
    """Kill those of the run's processes here that are stopped: the run is over, and the launcher would wait half a
    minute for them.
    """
    for pid, state in peers_of_this_machine().values():
        if state == "stopped":
            os.kill(pid, signal.SIGKILL)


def is_loading_error(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader")


def loading_processes() -> str:
    """The data-loading processes that this one has, or has just had, in words."""
    states = [f"pid {child.pid} is {process_state(child.pid)}" for child in multiprocessing.active_children()]
    return ", ".join(states) or "none is left"
