"""Plot training logs over the official ones: python -m tools.plot_logs [LOG ...] [-o curves.png] [--published NAME ...
| --no-published].

A LOG is a log.txt of main.py, or the folder of a run. Without any, only the official runs are drawn. With some, the
plot ends where the longest of them ends, so that a short run can be compared with the beginning of the official runs.
"""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from tools.measurement import read_csv
from training.curves import plot, tidy
from training.errors import UserError, exit_code
from training.options import Parser

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "logs" / "published" / "classification.csv"
PANELS = {"train_loss": "training loss", "test_acc1": "validation Acc@1 (%)", "train_lr": "learning rate"}
KEYS = ("epoch", *PANELS)
# Darkness of an official run's line by the last letter of its name: larger models are darker.
SHADES = {"s": 0.5, "b": 0.75, "l": 1.0}
FORMAT = "give a log.txt, one line of JSON per epoch"


def read_log(path: Path, keys: Iterable[str] = KEYS) -> list[dict]:
    """Return the lines of a log.txt (or of the one in a folder). Raise UserError if a line lacks a number for one of
    `keys`.
    """
    path = path / "log.txt" if path.is_dir() else path
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"no log ({path}): give a log.txt, or a folder that holds one") from error
    except UnicodeDecodeError as error:
        raise UserError(f"not a log ({path}): {FORMAT}") from error
    if not lines:
        raise UserError(f"empty log ({path}): wait until the first epoch ends")
    epochs = [parse_line(line, keys, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    return [epoch for epoch in epochs if epoch.get("test_acc1", 0.0) is not None]  # --eval-interval skips some


def parse_line(line: str, keys: Iterable[str], where: str) -> dict:
    try:
        epoch = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({where}): {FORMAT}") from error
    if isinstance(epoch, dict) and epoch.get("test_acc1", 0.0) is None:
        return epoch  # not evaluated
    lacking = [key for key in keys if not isinstance(epoch, dict) or not isinstance(epoch.get(key), (int, float))]
    if lacking:
        raise UserError(f"no number for {', '.join(lacking)} ({where}): give a log.txt that main.py wrote")
    return epoch


def published_logs() -> dict[str, list[dict]]:
    """Return the epochs of each official run, by its name in logs/published/classification.csv."""
    runs = {}
    for row in read_csv(PUBLISHED):
        runs.setdefault(row.pop("model"), []).append({key: float(value) for key, value in row.items()})
    return runs


def published_style(name: str, alone: bool) -> dict:
    """Return line settings: PCPVT dashed, SVT solid; two colors if drawn alone, gray behind other runs."""
    pcpvt, shade = name.startswith("pcpvt"), SHADES.get(name[-1], 1.0)
    colors = colormaps[("Blues" if pcpvt else "Oranges") if alone else "Greys"]
    dashes, width = (0, (4, 2)) if pcpvt else "-", 1.2 if alone else 1.0
    return dict(color=colors(shade * (0.95 if alone else 0.75)), linestyle=dashes, linewidth=width)


def draw(logs: dict[str, list[dict]], published: dict[str, list[dict]], output: Path) -> None:
    """Draw a panel each for training loss, Acc@1 and learning rate. Both arguments map a label to its epochs."""
    last = max((epoch["epoch"] for log in logs.values() for epoch in log), default=math.inf)
    published = {name: [epoch for epoch in log if epoch["epoch"] <= last] for name, log in published.items()}
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (key, title) in zip(axes, PANELS.items()):
        styles = {name: published_style(name, alone=not logs) for name, log in published.items() if log}
        behind = [plot(axis, published[name], key, name, **style) for name, style in styles.items()]
        dots = {name: "o" if len(log) < 30 else "" for name, log in logs.items()}
        own = [plot(axis, log, key, name, linewidth=1.8, marker=dots[name], ms=3) for name, log in logs.items()]
        axis.set(title=title, xlabel="epoch")
        tidy(axis)
    axes[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    shared = dict(ncols=6, frameon=False, fontsize=9, title_fontsize=9)
    for lines, side, title in ((own, "upper", None), (behind, "lower", "official (ImageNet)")):
        if lines:
            figure.legend(handles=lines, loc=f"outside {side} center", title=title, **shared)
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the plot (-o {output}): {str(error).splitlines()[0]}") from error


def label(path: Path) -> str:
    """Return the folder of a log.txt, or the path of a file with another name."""
    path = path.parent if path.name == "log.txt" else path
    return str(path) if path.name else path.resolve().name


def main(argv: list[str]) -> None:
    parser, published = Parser(prog="plot_logs.py", description=__doc__.splitlines()[0]), published_logs()
    add = parser.add_argument
    add("logs", nargs="*", type=Path, metavar="LOG", help="a log.txt, or the folder of a run")
    add("-o", "--output", type=Path, default=Path("curves.png"), metavar="FILE", help="the plot (%(default)s)")
    note = "official runs to draw, such as pcpvt_s (all); write LOGs before it"
    add("--published", nargs="+", choices=published, default=published, metavar="NAME", help=note)
    add("--no-published", dest="published", action="store_const", const=[], help="draw no official runs")
    args = parser.parse_args(argv)
    logs = {label(path): read_log(path) for path in args.logs}
    if not logs and not args.published:
        raise UserError("nothing to draw (--no-published): give a LOG")
    draw(logs, {name: published[name] for name in args.published}, args.output)
    print(args.output)


if __name__ == "__main__":
    sys.exit(exit_code("plot_logs.py", main, sys.argv[1:]))
