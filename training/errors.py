"""Errors that end a run, as one line for a person, and exit codes.

Needs the standard library only: main.py asks before torch is imported.
"""

import difflib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

LONGEST_LINE = 300  # characters
PREEMPTED = 128 + signal.SIGTERM  # the exit code of a run that a signal ended, its state saved
INTERRUPTED = 128 + signal.SIGINT  # the same after Ctrl-C, whether there was a state to save or not


class UserError(Exception):
    """Something the user can fix, as one line: WHAT (WHERE): WHAT TO DO. Exit code 2."""


class NonFiniteError(Exception):
    """A loss or gradient that is not finite, at a step of the epoch. Exit code 1."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Preempted(Exception):
    """A signal asked the run to end, and its state is saved. Exit code 143, after Ctrl-C 130."""

    def __init__(self, message: str, code: int = PREEMPTED):
        super().__init__(message)
        self.code = code


def short_reason(error: BaseException, limit: int | None = None) -> str:
    """Return an error's message as one line: the first, or the last of a worker's traceback; else the error's type."""
    lines = str(error).strip().splitlines() or [""]
    line = lines[-1] if any("Traceback" in each for each in lines[:2]) else lines[0]
    line = line.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return " ".join(line.split())[:limit] or type(error).__name__


def did_you_mean(path: Path, pattern: str = "*") -> str:
    """Return a question with the names most like a missing file's in its folder; empty if there is none like it."""
    near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob(pattern)], n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else ""


def print_error(message: str, kind: str = "error", program: str = "main.py") -> None:
    """Print one line on the error stream, cut to what a screen can hold unless TWINS_DEBUG=1."""
    line = f"{program}: {kind}: {' '.join(message.split())}"
    short = len(line) <= LONGEST_LINE or os.environ.get("TWINS_DEBUG") == "1"
    print(line if short else line[: LONGEST_LINE - 3] + "...", file=sys.stderr, flush=True)


def end_at_interrupt(program: str) -> None:
    """Let Ctrl-C end this process at once, with one line: there is nothing to save."""

    def end(*_) -> None:
        # Not by print, inside which the signal may come.
        os.write(sys.stderr.fileno(), f"{program}: stopped: stopped by SIGINT\n".encode())
        os._exit(INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)


def exit_code(program: str, main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Run a tool's main; return its exit code, 2 after a UserError, or 130 after Ctrl-C; each prints one line."""
    try:
        return main(argv) or 0
    except KeyboardInterrupt:
        print_error("stopped by SIGINT", kind="stopped", program=program)
        return INTERRUPTED
    except UserError as error:
        if os.environ.get("TWINS_DEBUG") == "1":
            raise
        print(f"{program}: error: {short_reason(error)}", file=sys.stderr)
        return 2


def library_reason(error: BaseException) -> str:
    """Return the type and the message of another library's exception in at most 200 characters."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    first_line = (str(error.args[0] if error.args else error).strip().splitlines() or [""])[0]
    message = " ".join(first_line.split())[:200]
    if isinstance(error, KeyError) and " " not in message:
        return f"{message!r} is missing"
    return f"{type(error).__name__}: {message}"
