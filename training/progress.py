"""How far a loop is: the time that is left, and a line that a terminal rewrites.

Needs the standard library only.
"""

import os
import shutil
import sys
import time

MOST_OFTEN = 0.1  # seconds between two versions of the line


class Pace:
    """Estimate what parts of equal work still take: by the later half of those done, for the first ones are slow."""

    def __init__(self):
        self.seconds: list[float] = []

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def left(self, parts: int) -> float:
        """Return seconds; 0 before the first part is done."""
        later = self.seconds[len(self.seconds) // 2 :]
        return parts * sum(later) / len(later) if later else 0.0


class LiveLine:
    """The last line of a terminal, which each text replaces; not for files and pipes, which get lines as they are."""

    def __init__(self):
        self.shown, self.at = False, 0.0

    @property
    def wanted(self) -> bool:
        return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def show(self, text: str) -> None:
        if time.monotonic() - self.at >= MOST_OFTEN:
            columns = shutil.get_terminal_size().columns
            sys.stdout.write(f"\x1b[2K{text[: columns - 1]}\r")
            sys.stdout.flush()
            self.shown, self.at = True, time.monotonic()

    def clear(self) -> None:
        """Remove the line, so that another one can be printed."""
        if self.shown:
            sys.stdout.write("\x1b[2K")
            sys.stdout.flush()
            self.shown = False


LIVE = LiveLine()
