"""What ends a run early, as a person reads it.

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


class UserError(Exception):
    """Something the user can put right, as one line: WHAT (WHERE): WHAT TO DO. Exit code 2."""


class NonFiniteError(Exception):
    """A loss or gradient that is not finite, at a step of the epoch. Exit code 1."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Preempted(Exception):
    """A signal asked the run to end, and its state is saved. Exit code 143."""


def one_line(error: BaseException) -> str:
    """The message of an error, also of one that a data-loading worker sent with its traceback around it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def did_you_mean(path: Path, pattern: str = "*") -> str:
    """The names most like a missing file's among those in its folder, as a question. Empty: there is none like it."""
    near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob(pattern)], n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else ""


def print_error(message: str, kind: str = "error") -> None:
    """One line on the error stream, not longer than a screen can hold unless TWINS_DEBUG is set."""
    line = f"main.py: {kind}: {' '.join(message.split())}"
    short = len(line) <= LONGEST_LINE or os.environ.get("TWINS_DEBUG") == "1"
    print(line if short else line[: LONGEST_LINE - 3] + "...", file=sys.stderr, flush=True)


def exit_code(program: str, main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """A tool's: what main gives, and after an error of the user's, which is one line, 2."""
    try:
        return main(argv) or 0
    except UserError as error:
        print(f"{program}: error: {one_line(error)}", file=sys.stderr, flush=True)
        return 2


def short_reason(error: Exception) -> str:
    """The type and the message of another library's exception, in at most 200 characters."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    first_line = (str(error.args[0] if error.args else error).strip().splitlines() or [""])[0]
    message = " ".join(first_line.split())[:200]
    if isinstance(error, KeyError) and " " not in message:
        return f"{message!r} is missing"
    return f"{type(error).__name__}: {message}"
