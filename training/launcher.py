"""A process under a launcher (torchrun). Needs the standard library only: main.py asks before torch is imported."""

import ctypes
import os
import signal
import sys
import threading
import time

from training.errors import PREEMPTED

LAST_SECONDS = 4.0  # that a process without its launcher has for saving


def launched() -> bool:
    """Whether a launcher (torchrun) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def die_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG


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
