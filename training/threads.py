"""How OpenMP's threads wait for each other, which is decided before torch is loaded.

Needs the standard library only.
"""

import os
import statistics
import time
from pathlib import Path

WAIT, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
LOAD, QUOTA = Path("/proc/loadavg"), Path("/sys/fs/cgroup/cpu.max")
ABOUT_1_MS = "20000"  # rounds of waiting
LOOKS, PAUSE_S = 5, 0.002


def set_policy() -> None:
    """Let threads that wait sleep; on a machine that has cores for them, only after about a millisecond.

    Falling asleep and waking up costs up to half of the speed of small batches. Spinning as long as by the C library's
    default costs more than that beside another busy process (docs/speed.md). What the environment says holds.
    """
    if WAIT in os.environ:
        return
    os.environ[WAIT] = "PASSIVE"
    if cores_are_free():
        os.environ.setdefault(SPINS, ABOUT_1_MS)


def describe() -> str:
    given = (f"{name}={os.environ[name]}" for name in (WAIT, SPINS) if name in os.environ)
    return f"threads that wait: {', '.join(given)}"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_are_free() -> bool:
    """Return True if the machine has a core for each of our threads beside what runs now. False if it does not say."""
    try:
        running = statistics.median(_running() for _ in range(LOOKS)) - 1  # without this process
        available = min(os.cpu_count(), _quota())
    except (OSError, LookupError, ValueError):
        return False
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() else cores()
    return 0 <= running <= available - threads


def _running() -> int:
    time.sleep(PAUSE_S)
    return int(LOAD.read_text().split()[3].partition("/")[0])


def _quota() -> float:
    """Return how many cores a container may use."""
    if not QUOTA.exists():
        return float("inf")
    most, period = QUOTA.read_text().split()
    return float("inf") if most == "max" else int(most) / int(period)
