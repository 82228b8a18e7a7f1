"""Options of main.py beyond the official recipe: configuration files, fine-tuning, balance, and records.

Their defaults leave everything as it is without them, so that such a value is not stored.
"""

import functools

from training.command_line import Parser, path


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("configuration").add_argument
    add("--config", type=path, default="", metavar="FILE", help="options in YAML; those of the command line win")


@functools.cache
def defaults() -> dict[str, object]:
    """Return the default of each option here."""
    parser = Parser(add_help=False)
    add_arguments(parser)
    return vars(parser.parse_args([]))


def without_defaults(args: dict) -> dict:
    """Return options by name as they are stored: without the unused ones of this file."""
    unused = defaults()
    return {name: value for name, value in args.items() if name not in unused or value != unused[name]}
