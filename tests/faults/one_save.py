"""One save as a run does it, for programs that interrupt it: python tests/faults/one_save.py FOLDER [at N | error CODE
at N].

FOLDER holds checkpoint.pth of 3 whole epochs and an earlier one; the save writes that of 4 and prunes. "at N": SIGKILL
before the Nth call that changes a file, from inside the process (where there is no strace); with an error's name, that
error instead.
"""

import errno
import os
import signal
import sys
from pathlib import Path

import common  # noqa: F401  the project's path

from training import checkpoint, files
from training.errors import UserError, print_error
from training.files import CHECKPOINT

PAYLOAD_MB = 3


def payload(epoch: int) -> dict:
    """A state with as many bytes as make several writes, told apart by its epoch."""
    import torch

    value = torch.full((PAYLOAD_MB, 2**18), float(epoch))
    return {"model": {f"w{i}": part.clone() for i, part in enumerate(value)}, "epoch": epoch}


def prepare(folder: Path) -> None:
    folder.mkdir(parents=True)
    checkpoint.save(folder / files.older_name(2, 0), payload(2))
    checkpoint.save(folder / CHECKPOINT, payload(3))


def save(folder: Path) -> None:
    checkpoint.save(folder / CHECKPOINT, payload(4), keep_as=folder / files.older_name(3, 0))
    files.prune(folder, 2, (4, 0))


def interrupt(at: int, code: str = "") -> None:
    """Make the Nth call that changes a file an accident."""
    calls = []

    def watched(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == at and not code:
                os.kill(os.getpid(), signal.SIGKILL)
            if code and len(calls) >= at and function is not unlink:
                raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
            return function(*args, **kwargs)

        return call

    class Watched:
        def __init__(self, file):
            self.write, self.flush = watched(file.write), file.flush

    recorder, unlink = files._Recorder.__init__, os.unlink
    files._Recorder.__init__ = lambda self, file: recorder(self, Watched(file))
    os.fsync, os.replace, os.link, os.unlink = (
        watched(function) for function in (os.fsync, os.replace, os.link, unlink)
    )
    Path.unlink = lambda self, missing_ok=False: os.unlink(self) if self.exists() or not missing_ok else None


if __name__ == "__main__":
    folder, rest = Path(sys.argv[1]), sys.argv[2:]
    if rest:
        interrupt(int(rest[-1]), rest[1] if rest[0] == "error" else "")
    try:
        save(folder)
    except UserError as error:
        print_error(str(error))
        sys.exit(2)
