"""Draw the README's images: python -m tools.figures [NAME ...] [--output docs/images].

model   a Twins-SVT block, and top-1 accuracy against measured images/s: logs/published and the newest records of
        logs/benchmarks whose names end with cpu_inference and cpu_peers
speed   ours / timm on the same weights: the newest records that end with cpu_inference and cpu_training
complexity  multiply-adds, and time if it was measured, of attention layers: logs/complexity
demo    curves and predictions of `make demo`
dense   results of `make demo-dense` beside the labels
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from tools import plot_run
from tools.measurement import read_csv
from tools.plot_logs import tidy
from tools.readme_tables import LOGS, REGISTERED, ROOT, paper, read_json, record, same_mode
from training.errors import UserError, exit_code
from training.options import Parser

# In inches: GitHub shows a page about 9 inches wide, so that fonts keep their size.
WIDTH, DPI = 9.2, 180
COLORS = {"float32": "tab:blue", "bfloat16": "tab:orange"}
SCENES = (4, 18, 20, 28)  # val images of make demo-dense


# ---------------------------------------------------------------- the model


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, facecolor="black"))


def draw_layers(axis: Axes, middle: float, attention: str, color: str) -> None:
    """Draw LN, attention, +, LN, MLP, + from the bottom up, each sum with its shortcut."""
    width, height = 1.5, 0.62
    style = dict(boxstyle="round,pad=0,rounding_size=0.12", ec="black")
    for bottom, layer, shade in ((-0.55, attention, color), (2.0, "MLP", "whitesmoke")):
        norm, upper, total, side = bottom + 0.55, bottom + 1.5, bottom + 2.55, middle + width / 2 + 0.22
        for level, text, fill in ((norm, "LN", "white"), (upper, layer, shade)):
            axis.add_patch(FancyBboxPatch((middle - width / 2, level), width, height, fc=fill, **style))
            axis.text(middle, level + height / 2, text, ha="center", va="center", fontsize=10)
        arrow(axis, (middle, bottom), (middle, norm))
        arrow(axis, (middle, norm + height), (middle, upper))
        axis.plot([middle] * 2, [upper + height, total], color="black", linewidth=1)
        axis.plot([middle, side, side], [bottom + 0.2, bottom + 0.2, total], color="black", linewidth=1)
        arrow(axis, (side, total), (middle + 0.16, total))
        axis.plot(middle, total, "o", ms=11, mfc="white", mec="black", mew=1)
        axis.plot(middle, total, "+", ms=7, color="black", mew=1.2)


def draw_tokens(axis: Axes, left: float, query: str, keys: str, *, local: bool) -> None:
    """Draw 8 x 8 tokens in 2 x 2 windows, and what the query in the corner attends to: its window, or a key of each."""
    side, bottom = 0.3, 1.1
    for column, row in np.ndindex(8, 8):
        color = query if (column, row) == (0, 7) else keys if local and column < 4 <= row else "white"
        corner = left + column * side, bottom + row * side
        axis.add_patch(Rectangle(corner, side, side, fc=color, ec="lightgray", lw=0.5))
    for column, row in np.ndindex(2, 2):
        x, y = left + 4 * column * side, bottom + 4 * row * side
        axis.add_patch(Rectangle((x, y), 4 * side, 4 * side, fill=False, ec="black", lw=1))
        if not local:
            x, y = x + 2 * side, y + 2 * side
            axis.plot([left + side / 2, x], [bottom + 7.5 * side, y], color=query, linewidth=0.8)
            axis.plot(x, y, "s", ms=7, color=keys, mec=query)


def draw_block(axis: Axes) -> None:
    """Draw the layers of LSA, then of GSA, each with the tokens that a query attends to."""
    for left, attention, query, keys, title in (
        (0.0, "LSA", "darkorange", "navajowhite", "LSA: the tokens\nof its window"),
        (5.3, "GSA", "tab:blue", "lightblue", "GSA: a summary\nof each region"),
    ):
        draw_layers(axis, left + 1.0, attention, keys)
        draw_tokens(axis, left + 2.3, query, keys, local=attention == "LSA")
        axis.text(left + 3.5, 3.65, title, ha="center", va="bottom", fontsize=9)
    axis.set(xlim=(0.1, 10.1), ylim=(-0.7, 5.3), aspect="equal")
    axis.axis("off")


def cases(name: str) -> tuple[list[dict], str]:
    """Return the cases of a record, and the machine that it was made on."""
    found = read_json(record(name), "environment", "cases")
    return found["cases"], f"{found['environment']['hardware']}, {found['environment']['threads']} threads"


def rates(name: str, dtype: str) -> tuple[dict[tuple[str, str], float], str]:
    """Return eager images/s by (model, library), and the machine, of a record."""
    found, machine = cases(name)
    rows = [(case["model"], row) for case in found if case["dtype"] == dtype for row in case["rows"]]
    rows = [(model, row) for model, row in rows if row["mode"] == "eager" and "failed" not in row]
    return {(model, row["library"]): row["pictures_per_s"] for model, row in rows}, machine


def draw_accuracy(axis: Axes, dtype: str = "bfloat16") -> None:
    ours, machine = rates("cpu_inference", dtype)
    others, other_machine = rates("cpu_peers", dtype)
    for family, color, offset in (("Twins-SVT", "tab:orange", (5, 4)), ("PCPVT", "tab:blue", (-10, -11))):
        rows = [row for row in paper() if row["name"].startswith(family)]
        speeds = [ours[REGISTERED[row["model"]], "ours"] for row in rows]
        axis.plot(speeds, [float(row["acc1"]) for row in rows], "o-", color=color, label=family)
        for speed, row in zip(speeds, rows):
            size = row["name"].rsplit("-", 1)[1][0]
            axis.annotate(size, (speed, float(row["acc1"])), offset, textcoords="offset points", fontsize=9)
    peers = {row["timm"]: (row["name"], float(row["acc1"])) for row in read_csv(LOGS / "published" / "peers.csv")}
    for (_, library), speed in others.items() if other_machine == machine else ():
        if library in peers:
            name, accuracy = peers[library]
            axis.plot(speed, accuracy, "s", color="dimgray", ms=5)
            style = dict(textcoords="offset points", fontsize=8, color="dimgray")
            axis.annotate(name, (speed, accuracy), (6, -3), **style)
    axis.set(xlabel=f"images/s, {dtype}, batch 8 ({machine})", ylabel="ImageNet top-1 (%), reported")
    axis.legend(frameon=False, loc="upper right", fontsize=9)
    axis.margins(0.12)
    tidy(axis)


def model() -> Figure:
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    draw_block(left)
    draw_accuracy(right)
    return figure


# ---------------------------------------------------------------- the records


def speed() -> Figure:
    """Bars of ours / timm: a group for each model, a bar for each dtype."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = {REGISTERED[row["model"]]: row["name"].removeprefix("Twins-").replace("-", "\n") for row in paper()}
    for axis, task in zip(axes, ("inference", "training")):
        found, machine = cases(f"cpu_{task}")
        ratios = {(case["dtype"], case["model"]): same_mode(case)["timm", "eager"] for case in found}
        models, dtypes = (list(dict.fromkeys(keys)) for keys in zip(*((model, dtype) for dtype, model in ratios)))
        for number, dtype in enumerate(dtypes):
            places = np.arange(len(models)) + 0.38 * (number - (len(dtypes) - 1) / 2)
            bars = axis.bar(places, [ratios[dtype, name] for name in models], 0.36, color=COLORS[dtype], label=dtype)
            axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
        axis.set_axisbelow(True)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xticks(range(len(models)), [names[name] for name in models], fontsize=9)
        axis.set_title(f"{task} ({machine})", fontsize=10)
        tidy(axis)
        axis.grid(axis="x", visible=False)
    axes[0].set_ylabel("ours / timm, images/s, eager")
    axes[1].legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9)
    return figure


def complexity(folder: Path = LOGS / "complexity") -> Figure:
    """Lines are the paper's formulas, dots what was counted."""
    found = read_json(folder / "complexity.json", "environment", "settings", "by_side", "by_window")
    settings, timed = found["settings"], any(row["ms"] for row in found["by_side"])
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    axes = figure.subplots(1, 3 if timed else 2)
    for kind, color in (("LSA", "tab:orange"), ("GSA", "tab:blue"), ("full", "dimgray")):
        rows = [row for row in found["by_side"] if row["kind"] == kind]
        sides = [row["side"] for row in rows]
        axes[0].plot(sides, [row["formula"] / 1e6 for row in rows], "-", color=color, label=kind)
        axes[0].plot(sides, [row["products"] / 1e6 for row in rows], "o", color=color, ms=4)
        if timed:
            axes[2].plot(sides, [row["ms"] for row in rows], "o-", color=color, ms=4, label=kind)
    windows, tokens = np.linspace(2, 28, 200), settings["side"] ** 2
    cost = 2 * tokens * (windows**2 + tokens / windows**2) * settings["dim"] / 1e6
    axes[1].plot(windows, cost, "-", color="tab:green", label="LSA + GSA")
    rows = found["by_window"]
    axes[1].plot([row["window"] for row in rows], [row["products"] / 1e6 for row in rows], "o", color="tab:green", ms=4)
    best = settings["side"] ** 0.5
    axes[1].axvline(best, color="black", linewidth=1, linestyle=":", label=f"optimum, {best:.1f}")
    axes[0].set(xlabel="side of the map (tokens)", ylabel="multiply-adds of the products (M)", xscale="log")
    axes[1].set(
        xlabel=f"side of windows, on a map of {settings['side']} x {settings['side']}", xscale="log", ylim=(0, 350)
    )
    if timed:
        where = found["environment"]
        axes[2].set(xlabel="side of the map (tokens)", ylabel="ms, one image, float32", xscale="log")
        axes[2].set_title(f"{where['hardware']}, {settings['threads']} threads", fontsize=9)
    for axis in axes:
        axis.set_yscale("linear" if axis is axes[1] else "log")
        ticks = (2, 4, 7, 14, 28) if axis is axes[1] else (14, 28, 56, 112)
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=9, loc="upper center" if axis is axes[1] else "upper left")
        tidy(axis)
    return figure


# ---------------------------------------------------------------- the demos


def needed(path: Path, command: str) -> Path:
    if not path.exists():
        raise UserError(f"nothing to draw ({path}): run `{command}` first")
    return path


def demo(run: Path = ROOT / "output" / "demo", data: Path = ROOT / "data" / "digits") -> Figure:
    needed(run / "checkpoint_best.pth", "make demo")
    return plot_run.draw(run, str(data), images=24, width=WIDTH)


def dense(output: Path = ROOT / "output") -> Figure:
    """Labels, segmentation and boxes of four val images. mmseg and mmdet draw labels and result side by side."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    axes = figure.subplots(2, 6)
    for pair, number in zip(axes.reshape(4, 3), SCENES):
        drawings = []
        for name in ("segmentor", "detector"):
            path = output / name / "images" / f"{number:04d}.png"
            with Image.open(needed(path, "make demo-dense")) as image:
                pixels = np.asarray(image.convert("RGB"))
            drawings.append(np.split(pixels, 2, axis=1))
        (labels, segmentation), (_, boxes) = drawings
        for axis, pixels in zip(pair, (labels, segmentation, boxes)):
            axis.imshow(pixels, interpolation="nearest")
            axis.axis("off")
    for axis, title in zip(axes[0], ("labels", "Semantic FPN", "Mask R-CNN") * 2):
        axis.set_title(title, fontsize=10)
    return figure


FIGURES = {figure.__name__: figure for figure in (model, demo, dense, speed, complexity)}


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(FIGURES)} (all)")
    add("--output", type=Path, default=ROOT / "docs" / "images", metavar="FOLDER", help="(docs/images)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in FIGURES]:
        raise UserError(f"no such image ({unknown[0]}): choose from {', '.join(FIGURES)}")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.names or FIGURES:
        path = args.output / f"{name}.png"
        FIGURES[name]().savefig(path, dpi=DPI, facecolor="white")
        print(path)


if __name__ == "__main__":
    sys.exit(exit_code("figures.py", main, sys.argv[1:]))
