"""Options from a YAML file: --config FILE, and the args.yaml that a run's folder gets.

Imports PyYAML only where there is a file to read or write: main.py asks before torch is imported.
"""

import argparse
import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from training.command_line import INERT, Parser

NAME = "args.yaml"
# Of the command line alone, or of one run: neither is written to args.yaml.
NOT_WRITTEN = {"config", "output_dir", "resume", "overwrite", "dry_run", "local_rank"}
NOT_READ = ("config", "local_rank", "help")
# PyYAML reads 5e-4 as text: it is a number in YAML 1.2, as on the command line.
FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def tokens(parser: Parser, argv: list[str]) -> list[str]:
    """Return the options in the file of --config as words of a command line; end the process if one is wrong."""
    finder = Parser(prog=parser.prog, add_help=False)
    finder.add_argument("--config", default="")
    path = finder.parse_known_args(argv)[0].config
    words = []
    for key, value in (read(parser, path) if path else {}).items():
        parser.source = f"{path}, {key}"
        found = words_of(parser, str(key), value)
        parser.parse_known_args(found)  # so that its error names file and key
        words += found
    parser.source = "command line"
    return words


def read(parser: Parser, path: str) -> dict:
    """Return the mapping in a YAML file; end the process with one line if there is none, or a key is there twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
    try:
        loader = Loader(Path(path).read_text())
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            wrong(parser, f"no options (--config {path})", "expected lines of NAME: VALUE")
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            wrong(parser, f"an option is there twice ({path}, {twice[0]})", "remove one")
        return loader.construct_document(node)
    except OSError as error:
        wrong(parser, f"cannot read (--config {path})", error.strerror)
    except (yaml.YAMLError, ValueError) as error:
        wrong(parser, f"not YAML (--config {path})", " ".join(str(error).split())[:160])


def wrong(parser: Parser, what: str, advice: str) -> None:
    parser.exit(2, f"{parser.prog}: error: {what}: {advice}\n")


def words_of(parser: Parser, key: str, value: object) -> list[str]:
    """Return one entry of a file as words of a command line."""
    actions = {option.lstrip("-").replace("_", "-"): action for option, action in parser._option_string_actions.items()}
    action = actions.get(key.replace("_", "-"))
    # In args.yaml an option has the name of its value, which --no-NAME shares.
    if action is None or action.dest in NOT_READ:
        useful = [n for n, a in actions.items() if a.dest not in NOT_READ and not (a.help or "").startswith(INERT)]
        close = difflib.get_close_matches(key.replace("_", "-"), useful, n=1, cutoff=0.4)
        advice = f"did you mean {close[0].replace('-', '_')}?" if close else "main.py --help lists the options"
        wrong(parser, f"unknown option ({parser.source})", advice)
    name = action.option_strings[0]
    if action.nargs == 0:
        expect(parser, value, bool, "true or false")
        constant = action.const if value else not action.const
        same = (each for each in parser._actions if each.dest == action.dest and each.const is constant)
        return [other.option_strings[0] for other in same][:1]
    if action.nargs == "?" and isinstance(value, bool):
        return [name] if value else []
    if isinstance(value, Mapping) and action.metavar == "KEY=VALUE":
        return [name, *(f"{each}={item!r}" for each, item in value.items())]
    if action.nargs in (None, "?"):
        return [f"{name}={scalar(parser, action, value)}"]
    values = value if isinstance(value, list) else [value]
    return [name, *(scalar(parser, action, each) for each in values)]


def scalar(parser: Parser, action: argparse.Action, value: object) -> str:
    kind = getattr(action.type, "kind", str)
    if kind is float:
        expect(parser, value, (int, float), "a number")
    else:
        expect(parser, value, kind, "a whole number" if kind is int else "text")
    return value if isinstance(value, str) else repr(value)


def expect(parser: Parser, value: object, kinds: type | tuple[type, ...], says: str) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        wrong(parser, f"not {says} ({parser.source}: {str(value)[:40]})", f"expected {says}")


def text(given: Mapping[str, object]) -> str:
    """Return options by name as the YAML that --config reads back to the same values."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(given.items())}
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=110)
