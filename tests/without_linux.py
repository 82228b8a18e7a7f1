"""Run main.py as if the system were not Linux: python tests/without_linux.py OPTIONS, or -m MODULE OPTIONS."""

import multiprocessing
import os
import runpy
import signal
import subprocess  # noqa: F401
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def windows_lock() -> types.ModuleType:
    """msvcrt's lock, by fcntl's: of bytes from the present position on, and a PermissionError where it is taken."""
    import fcntl

    def locking(descriptor, mode, count):
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, os.lseek(descriptor, 0, os.SEEK_CUR))
        except BlockingIOError as error:
            raise PermissionError(error.errno, error.strerror) from error

    module = types.ModuleType("msvcrt")
    module.LK_NBLCK, module.locking = 2, locking
    return module


def hide() -> None:
    """Take away what Windows does not have, and add its lock; subprocess is imported already and stays as it is."""
    sys.modules["msvcrt"] = windows_lock()
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        sys.modules[name] = None
    for module, name in ((signal, "SIGUSR1"), (signal, "SIGALRM"), (signal, "setitimer"), (os, "setpgid")):
        delattr(module, name)
    del os.sched_getaffinity
    multiprocessing.set_start_method("spawn", force=True)


if __name__ in ("__main__", "__mp_main__"):  # also in the processes that it starts, as Windows does
    hide()
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    if sys.argv[1] == "-m":
        name = sys.argv[2]
        sys.argv[:3] = [name]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = str(ROOT / "main.py")
        runpy.run_path(sys.argv[0], run_name="__main__")
