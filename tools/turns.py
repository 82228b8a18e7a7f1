"""A process for each contender of tools.benchmark, so that all take turns, and none harms or helps another.

A process sleeps while it is not asked: its main thread waits for a message, and the threads of its libraries sleep by
the policy that training/__init__.py sets.
"""

import contextlib
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import torch

from tools.contenders import GEMM, REFERENCE, Case, Gemm, Name, Reference, Runner
from training.errors import UserError, library_reason, short_reason

KINDS = {GEMM: Gemm, REFERENCE: Reference}

# A server imports torch once, and each process is a fork of it that has not computed anything.
FORKSERVER = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if FORKSERVER else "spawn")
if FORKSERVER:
    # What tools.benchmark imports, but not itself: a process runs the main module once more.
    CONTEXT.set_forkserver_preload(["tools.turns", "tools.count", "tools.readme_tables"])


def serve(pipe: Connection, case: Case, name: Name, device: torch.device, threads: int) -> None:
    """Answer (method, arguments) by (True, result) or (False, reason) until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    if os.environ.get("TWINS_DEBUG") != "1":
        # Compilers, profilers and converters talk there. What matters is answered.
        for descriptor in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    torch.set_num_threads(threads)
    contender = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, args, options = pipe.recv()
            try:
                contender = contender or KINDS.get(name[0], Runner)(case, name, device)
                answer = True, getattr(contender, method)(*args, **options)
            except UserError as error:
                answer = False, short_reason(error)
            except Exception as error:
                answer = False, library_reason(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # for the others
            pipe.send(answer)


class Contender:
    """A network and mode in a process of its own. `failed` says why it cannot be measured, once it cannot."""

    def __init__(self, case: Case, name: Name, device: torch.device):
        self.name, self.failed = name, None
        self.pipe, end = CONTEXT.Pipe()
        arguments = end, case, name, device, torch.get_num_threads()
        self.process = CONTEXT.Process(target=serve, args=arguments, daemon=False)
        self.process.start()
        end.close()

    def ask(self, method: str, *args, **options):
        """Return what its method returns; None if it failed, now or before."""
        if self.failed is not None:
            return None
        try:
            self.pipe.send((method, args, options))
            good, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            good, answer = False, f"its process ended with exit code {self.process.exitcode} (out of memory?)"
        if good:
            return answer
        self.fail(answer)
        return None

    def fail(self, reason: str) -> None:
        self.failed = reason
        self.close()

    def close(self) -> None:
        """End the process, which may compute something at the moment."""
        self.pipe.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_) -> None:
        self.close()
