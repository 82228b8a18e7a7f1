"""The processes of a run: signals, time limits, and which of them ended or hang."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from training.errors import NonFiniteError, Preempted, UserError, short_reason
from training.launcher import die_with_parent
from utils import all_gather, get_random_state, get_world_size, set_random_state

# What torch says if batches find no room in shared memory; the second after a bus error.
NO_ROOM = re.compile("unable to allocate shared memory|out of shared memory|(shared memory|DataLoader).*No space left")
PEERS: list[tuple[str, int, str]] = []  # `identity` of each process of the run


# ---------------------------------------------------------------- signals and time limits


class StopSignals:
    """Note SIGTERM, SIGINT and SIGUSR1 while entered: `received` is the signal's name, or None. The run ends at a safe
    point; at a second SIGINT (Ctrl-C) at once. Signals that are ignored, as SIGINT is in the background, stay so.

    on_poll: called each time before the run looks, with what it tells of where it is; tests stop runs there.
    """

    SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]

    def __init__(self, on_poll: Callable[..., None] = lambda *where: None):
        self.received, self.on_poll = None, on_poll

    def __enter__(self):
        heard = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def poll(self, *where: object) -> bool:
        """Return True if a signal asked this process to stop."""
        self.on_poll(*where)
        return self.received is not None


@contextlib.contextmanager
def time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raise `error` in the main thread if the body takes longer, even inside a system call.

    No limit with 0 seconds, in another thread, or on Windows, which lacks the signal.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not (seconds and is_main and hasattr(signal, "SIGALRM")):
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
    """Start a loader worker: in a group of its own, away from the launcher's signals, ending with its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Of the thread that hands over memory, when the trainer breaks off: the trainer prints a line of its own.
    sys.excepthook = lambda *_: None
    die_with_parent("SIGKILL")


# ---------------------------------------------------------------- lost processes


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; none without such a process or file system."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def identity() -> tuple[str, int, str]:
    """Return host, pid and start time in kernel ticks: unique among all processes that a run's machines ever have."""
    return socket.gethostname(), os.getpid(), "".join(_stat(os.getpid())[19:20])


def process_state(pid: int, started: str = "") -> str:
    """Return "stopped", "gone" or "alive". started: as in `identity`, for another process may have its pid by now."""
    fields = _stat(pid)
    if not fields or (started and fields[19] != started):
        return "gone" if sys.platform == "linux" else "alive"
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(fields[0], "alive")


def meet_peers() -> None:
    """Note which processes the run has. Every process must call it."""
    PEERS[:] = all_gather(identity())


def is_lost_process(error: BaseException) -> bool:
    """Return True if the error only follows from another process that ended or hangs."""
    text, signs = str(error).lower(), ("gloo", "closed by peer", "timed out waiting")
    known = isinstance(error, dist.DistError) or any(sign in text for sign in signs)
    return isinstance(error, RuntimeError) and get_world_size() > 1 and known


def peers_of_this_machine() -> dict[int, tuple[int, str]]:
    """Return rank -> (pid, state) of the run's processes on this machine."""
    here = socket.gethostname()
    return {rank: (pid, process_state(pid, started)) for rank, (host, pid, started) in enumerate(PEERS) if host == here}


def lost_processes() -> str:
    """Name the processes of this machine that ended or are stopped."""
    time.sleep(0.5)  # for the process table to know
    states = peers_of_this_machine().items()
    lost = [f"process {rank} (pid {pid}) is {state}" for rank, (pid, state) in states if state != "alive"]
    return ", ".join(lost) or "none of this machine has ended: look for one that hangs, or at the other machines"


def end_stopped_processes() -> None:
    """Kill the run's stopped processes here: the run is over, and the launcher would wait half a minute for them."""
    for pid, state in peers_of_this_machine().values():
        if state == "stopped":
            with contextlib.suppress(ProcessLookupError):  # another process was faster
                os.kill(pid, signal.SIGKILL)


def loading_processes() -> str:
    """Name the workers that this process has, or has just had."""
    states = [f"pid {child.pid} is {process_state(child.pid)}" for child in multiprocessing.active_children()]
    return ", ".join(states) or "none is left"


def loading_error(error: BaseException | None) -> BaseException | None:
    """Return DataLoader's error among an error and those that it was raised while handling, or None."""
    signs = re.compile("^DataLoader|unable to open shared memory|^Too many open files")
    while error is not None and not (isinstance(error, RuntimeError) and signs.search(str(error))):
        error = error.__context__
    return error


def is_out_of_shared_memory(error: BaseException) -> bool:
    """Return True if a batch found no room where workers leave it, by torch's errors (the second: a bus error)."""
    while error is not None and not (isinstance(error, RuntimeError) and NO_ROOM.search(str(error))):
        error = error.__context__
    return error is not None


def shared_memory() -> str:
    try:
        return f"/dev/shm has {shutil.disk_usage('/dev/shm').total / 2**20:.3g} MiB"
    except OSError:
        return "/dev/shm"


def explain(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the line of an error that a user can act on; None for one of ours."""
    if isinstance(error, Preempted):
        return error.code, str(error)
    if isinstance(error, (UserError, NonFiniteError)):
        return 2 if isinstance(error, UserError) else 1, short_reason(error)
    if is_lost_process(error):
        what = f"no answer from another process of this run ({lost_processes()})"
        return 1, f"{what}: stopped too, continue with --resume auto"
    if is_out_of_shared_memory(error):
        advice = "start the container with a larger --shm-size, or pass fewer --num_workers, 0 for none"
        return 1, f"shared memory is too small ({shared_memory()}): {advice}; --resume auto continues a training run"
    if (loading := loading_error(error)) is not None:
        what = f"data loading failed ({short_reason(loading, 120)} [{loading_processes()}])"
        return 1, f"{what}: look for lack of memory or a stuck disk, then --resume auto"
    return None


# ---------------------------------------------------------------- the order of sums


def settle_gradient_buckets(parallel: nn.Module, model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> None:
    """Run two steps without effect, after which DistributedDataParallel sums gradients in its final order.

    It reorders its buckets after a first backward pass. A resumed run would otherwise sum in another order in its first
    step than the uninterrupted one did, and from three processes on end with other bits.
    """
    states, buffers = get_random_state(), [buffer.clone() for buffer in model.buffers()]
    for _ in range(2):
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = parallel(images)
        logits.float().sum().backward()
    model.zero_grad(set_to_none=True)
    for buffer, value in zip(model.buffers(), buffers):
        buffer.copy_(value)
    set_random_state(states)
