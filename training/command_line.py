"""A parser of command lines with one-line errors, and the types of options.

Needs the standard library only: main.py asks before torch is imported.
"""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable

# How the help of an option begins that is accepted, or refused, but does nothing.
INERT = ("refused:", "without effect:", "ignored:", "not supported:")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, which suggest no inert option, and `-` and `_` alike in the names of options."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)
        self.source = "command line"  # of the words that are parsed, for messages

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        names = {name.replace("_", "-"): name for name in self._option_string_actions}
        spelled = []
        for token in args:
            name, equals, value = token.partition("=")
            known = names.get(name.replace("_", "-")) if name.startswith("--") else None
            spelled.append(known + equals + value if known else token)
        return super().parse_known_args(spelled, namespace)

    def error(self, message):
        words = message.split()
        if message.startswith("unrecognized arguments:"):
            unknown = next((word for word in words[2:] if word.startswith("-")), words[2])
            options = self._option_string_actions.items()
            useful = [name for name, option in options if not (option.help or "").startswith(INERT)]
            close = difflib.get_close_matches(unknown.split("=")[0], useful, n=1)
            advice = f"did you mean {close[0]}?" if close else "--help lists the options"
            message = f"unknown option ({self.source}, {unknown}): {advice}"
        else:
            message = f"{message} ({self.source}): --help lists the options"
        self.exit(2, f"{self.prog}: error: {message}\n")


def numbers(kind: type, says: str, test: Callable[[float], bool]) -> Callable[[str], float]:
    """Return an option's type: finite numbers of `kind` that pass `test`, which `says` describes."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and abs(value) < MOST and test(value)):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {says}")
        return value

    number.kind = kind
    return number


def path(text: str) -> str:
    """Return the name of a file or folder; raise ArgumentTypeError if it cannot be one."""
    if (
        "\0" in text
        or (not text.startswith("https://") and max(len(os.fsencode(part)) for part in text.split("/")) > 255)
        or len(text) > 4000
    ):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}... cannot be the name of a file")
    return text


MOST = 2**62  # no option is as large; torch and numpy take no larger integers
positive = numbers(int, "a number from 1 up", lambda value: value >= 1)
count = numbers(int, "a number from 0 up", lambda value: value >= 0)
seed = numbers(int, "a number", lambda value: True)
LARGEST = 16384  # pixels
MAX_PIXELS = 178_956_970  # of an image; Pillow raises an error above it by default
pixels = numbers(int, f"a number of pixels from 1 to {LARGEST}", lambda value: 1 <= value <= LARGEST)
wait = numbers(int, "a number of seconds from 0 up", lambda value: 0 <= value < 10**6)
seconds = numbers(int, "a number of seconds from 1 up", lambda value: 1 <= value < 10**6)
probability = numbers(float, "between 0 and 1", lambda value: 0 <= value <= 1)
fraction = numbers(float, "above 0 and below 1", lambda value: 0 < value < 1)
share = numbers(float, "above 0 and up to 1", lambda value: 0 < value <= 1)
amount = numbers(float, "a number from 0 up", lambda value: value >= 0)
above_zero = numbers(float, "a number above 0", lambda value: value > 0)


def is_name(text: object) -> bool:
    """Return True for what can name a part of a data set, inside the folder of the data."""
    valid = isinstance(text, str) and text not in ("", ".", "..") and not {"/", "\0"} & set(text)
    return valid and len(text) <= 60  # with the suffix of a file it is still a name


def split(text: str) -> str:
    if not is_name(path(text)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a name")
    return text


# ---------------------------------------------------------------- options of several programs


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cuda or cpu; if not given: cuda if there is one")


def add_max_pixels(parser, default: int = MAX_PIXELS) -> None:
    """Add --max-pixels to a parser or one of its groups."""
    what = "refuse larger images (%(default)s)"
    parser.add_argument("--max-pixels", type=positive, default=default, metavar="N", help=what)
