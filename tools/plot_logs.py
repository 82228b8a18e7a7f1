"""Draw logs over the published ones: python -m tools.plot_logs [LOG ...] [-o curves.png] [--published NAME ... |
--no-published].

A LOG is a log.txt of main.py, or the folder of a run. Without any, the published runs are drawn alone. With some, the
picture ends where the longest of them does, so that a short run can be compared with how the published ones began.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from training.options import Parser

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "logs" / "published" / "classification.csv"
PANELS = {"train_loss": "training loss", "test_acc1": "validation Acc@1 (%)", "train_lr": "learning rate"}
KEYS = ("epoch", *PANELS)
SHADES = {"s": 0.5, "b": 0.75, "l": 1.0}  # of a published run, by the last letter of its name: the larger, the darker


class LogError(Exception):
    """A log or picture that the user can put right, as one line: WHAT (WHERE): WHAT TO DO."""


def read_log(path: Path, keys: Iterable[str] = KEYS) -> list[dict]:
    """The lines of a log.txt (or of the one in a folder), each of which must have a number for each of `keys`."""
    path = path / "log.txt" if path.is_dir() else path
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise LogError(f"no log ({path}): give a log.txt, or a folder that holds one") from error
    except UnicodeDecodeError as error:
        raise LogError(f"not a log ({path}): give a log.txt, one line of JSON an epoch") from error
    if not lines:
        raise LogError(f"empty log ({path}): wait for the first epoch to end") from None
    return [parse_line(line, keys, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def parse_line(line: str, keys: Iterable[str], where: str) -> dict:
    try:
        epoch = json.loads(line)
    except json.JSONDecodeError as error:
        raise LogError(f"not JSON ({where}): give a log.txt, one line of JSON an epoch") from error
    lacking = [key for key in keys if not isinstance(epoch, dict) or not isinstance(epoch.get(key), (int, float))]
    if lacking:
        raise LogError(f"no number for {', '.join(lacking)} ({where}): give a log.txt that main.py wrote")
    return epoch


def published_logs() -> dict[str, list[dict]]:
    """The epochs of each published run, by its name in the table."""
    runs = {}
    with open(PUBLISHED, newline="") as file:
        for row in csv.DictReader(file):
            runs.setdefault(row.pop("model"), []).append({key: float(value) for key, value in row.items()})
    return runs


def style_of_published(name: str, alone: bool) -> dict:
    """PCPVT dashed, SVT solid; grey behind other runs, in two colours where there are none."""
    pcpvt, shade = name.startswith("pcpvt"), SHADES.get(name[-1], 1.0)
    colours = colormaps[("Blues" if pcpvt else "Oranges") if alone else "Greys"]
    return dict(
        color=colours(shade * (0.95 if alone else 0.75)),
        linestyle=(0, (4, 2)) if pcpvt else "-",
        linewidth=1.2 if alone else 1.0,
    )


def plot(axis: Axes, log: list[dict], key: str, name: str, **style) -> Line2D:
    return axis.plot([epoch["epoch"] for epoch in log], [epoch[key] for epoch in log], label=name, **style)[0]


def tidy(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw(logs: dict[str, list[dict]], published: dict[str, list[dict]], output: Path) -> None:
    """A panel each for training loss, Acc@1 and learning rate. Both kinds of runs are given as their label -> their
    epochs.
    """
    last = max((epoch["epoch"] for log in logs.values() for epoch in log), default=math.inf)
    published = {name: [epoch for epoch in log if epoch["epoch"] <= last] for name, log in published.items()}
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (key, title) in zip(axes, PANELS.items()):
        behind = [
            plot(axis, log, key, name, **style_of_published(name, alone=not logs))
            for name, log in published.items()
            if log
        ]
        own = [
            plot(axis, log, key, name, linewidth=1.8, marker="o" if len(log) < 30 else "", markersize=3)
            for name, log in logs.items()
        ]
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        tidy(axis)
    axes[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for lines, place, title in ((own, "upper", None), (behind, "lower", "published (ImageNet)")):
        if lines:
            figure.legend(
                handles=lines,
                loc=f"outside {place} center",
                title=title,
                ncols=6,
                frameon=False,
                fontsize=9,
                title_fontsize=9,
            )
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise LogError(f"cannot write the picture (-o {output}): {str(error).splitlines()[0]}") from error


def label(path: Path) -> str:
    """The folder of a log.txt, or a file with another name."""
    path = path.parent if path.name == "log.txt" else path
    return str(path) if path.name else path.resolve().name


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG", help="log.txt, or the folder of a run")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("curves.png"), metavar="FILE", help="the picture (%(default)s)"
    )
    parser.add_argument(
        "--published",
        nargs="+",
        metavar="NAME",
        help="published runs to draw, such as pcpvt_s (all); write LOGs before it",
    )
    parser.add_argument("--no-published", dest="published", action="store_const", const=[], help="draw none of them")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    logs = {label(path): read_log(path) for path in args.logs}
    published = published_logs()
    chosen = list(published) if args.published is None else args.published
    for name in chosen:
        if name not in published:
            raise LogError(
                f"no such published run (--published {name}): choose from {', '.join(published)}, and write LOGs "
                "before the option"
            )
    if not logs and not chosen:
        raise LogError("nothing to draw (--no-published): give a LOG")
    draw(logs, {name: published[name] for name in chosen}, args.output)
    print(args.output)


def run(argv: list[str]) -> int:
    try:
        main(parse_args(argv))
        return 0
    except LogError as error:
        print(f"plot_logs.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
