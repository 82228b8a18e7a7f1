"""Draw what a trained Twins attends to: python -m tools.attention IMAGE... --weights FILE --output DIR.

For each image, one figure for each stage, and one of attention rollout. A stage's figure has a row for each block, with
the mean of the heads and each head:

    LSA   in each window, where the token at the query's place attends; white lines are the windows' borders
    GSA   where the query attends, on the regions that the sub-sampled map summarizes (PCPVT has GSA only)

Queries are the center and the most confident position: the token of the last stage whose own logits give the predicted
class the highest probability. --query X,Y is another one, in pixels of the original image.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import gvt

# isort: split
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from tools import views
from tools.attention_maps import PATCHES, BlockMaps, attention_maps, empty_maps, rollout
from tools.views import View, overlay
from training import options
from training.errors import exit_code

PANEL = 1.1  # inches


# ---------------------------------------------------------------- queries


@torch.no_grad()
def predict(model: gvt.Twins, x: Tensor) -> tuple[int, float, tuple[float, float]]:
    """Return the class, its probability, and the most confident position (x, y) in pixels of the view."""
    tokens = model.forward_features(x)
    probabilities = model.forward_head(tokens)[0].softmax(0)
    top = int(probabilities.argmax())
    best = int(model.head(tokens)[0].softmax(-1)[:, top].argmax())
    columns = x.shape[3] // PATCHES[-1]
    position = tuple((index + 0.5) * PATCHES[-1] for index in (best % columns, best // columns))
    return top, float(probabilities[top]), position


def token_at(point: tuple[float, float], each: BlockMaps) -> tuple[int, int]:
    """Return the row and column of the token at (x, y), or of the nearest one where the map ends before the image."""
    patch, (H, W) = PATCHES[each.stage], each.tokens
    return min(int(point[1]) // patch, H - 1), min(int(point[0]) // patch, W - 1)


# ---------------------------------------------------------------- figures


def borders(each: BlockMaps, view: View, left: float) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Return the lines between windows."""
    (width, height), (h, w), patch = view.size, each.cell, PATCHES[each.stage]
    columns = [left + x * patch for x in range(w, each.tokens[1], w)]
    rows = [y * patch for y in range(h, each.tokens[0], h)]
    return [((x, 0), (x, height)) for x in columns] + [((left, y), (left + width, y)) for y in rows]


def draw_row(axis: Axes, view: View, each: BlockMaps, point: tuple[float, float]) -> None:
    """Draw a block: the image with the query, the mean of the heads, each head."""
    width, height = view.size
    heads = each.of(token_at(point, each))
    for column, heat in enumerate([None, *each.relative(torch.cat([heads.mean(0)[None], heads]))]):
        left = overlay(axis, view, column, heat, PATCHES[each.stage])
        if each.local:
            axis.add_collection(LineCollection(borders(each, view, left), colors="white", linewidths=0.5))
        axis.plot(left + point[0], point[1], "+", color="cyan", markersize=6)
    axis.set(xlim=(0, left + width), ylim=(height, 0), aspect="equal", yticks=[])
    titles = ["image", "mean", *(f"head {head + 1}" for head in range(len(heads)))]
    axis.set_xticks([(column * 1.06 + 0.5) * width for column in range(len(titles))], titles, fontsize=7)
    axis.tick_params(length=0, pad=1)
    axis.set_ylabel(f"block {each.block + 1}\n{each.kind}", fontsize=8)
    for side in axis.spines.values():
        side.set_visible(False)


def draw_stage(view: View, maps: Sequence[BlockMaps], queries: dict[str, tuple[float, float]], title: str) -> Figure:
    """Draw the maps of one stage: for each query (a name, and x, y in pixels of the view), a row for each block."""
    width, height = (PANEL * side / max(view.size) for side in view.size)
    columns = 2 + max(each.weights.shape[1] for each in maps)
    size = max(columns * width * 1.06 + 0.7, 6.5), len(queries) * (len(maps) * (height + 0.25) + 0.3) + 0.6
    figure = Figure(figsize=size)
    figure.suptitle(title, fontsize=8, y=1 - 0.05 / size[1], va="top")
    bottom = size[1] - 0.6
    for name, point in queries.items():
        x, y = view.to_original(point)
        figure.text(0.5, bottom / size[1], f"query: {name}, ({x:.0f}, {y:.0f})", fontsize=8, ha="center", va="center")
        bottom -= 0.1
        for each in maps:
            bottom -= height + 0.25
            rectangle = (0.6 / size[0], (bottom + 0.2) / size[1], 1 - 0.65 / size[0], height / size[1])
            draw_row(figure.add_axes(rectangle), view, each, point)
        bottom -= 0.2
    return figure


def draw_rollout(view: View, shares: Sequence[Tensor], title: str) -> Figure:
    """Draw the image beside the rollout onto the first tokens of each stage."""
    width, height = (2.4 * side / max(view.size) for side in view.size)
    figure = Figure(figsize=(max((1 + len(shares)) * (width + 0.1), 6.5), height + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for column, axis in enumerate(figure.subplots(1, 1 + len(shares))):
        stage = column - 1
        overlay(axis, view, 0, shares[stage] if column else None, PATCHES[max(stage, 0)])
        axis.set(xlim=(0, view.size[0]), ylim=(view.size[1], 0), aspect="equal")
        axis.set_title(f"to stage {stage + 1}" if column else "image", fontsize=8)
        axis.axis("off")
    return figure


def draw(model: gvt.Twins, view: View, queries: dict[str, tuple[float, float]], title: str) -> Iterator[Figure]:
    """Yield the figure of each stage, then the rollout's."""
    maps = attention_maps(model, view.x)
    for stage, blocks in itertools.groupby(maps, key=lambda each: each.stage):
        blocks = list(blocks)
        local, scale = any(each.local for each in blocks), "from 0 (black) to the largest (yellow) of each panel"
        scale += ", for LSA of each window" if local else ""
        kinds = "LSA and GSA" if local else "PCPVT has GSA (spatial reduction) only, no windows"
        H, W = blocks[0].tokens
        yield draw_stage(view, blocks, queries, f"{title}\nstage {stage + 1}, {H} x {W} tokens: {kinds}\n{scale}")
    yield draw_rollout(view, rollout(maps), f"{title}: attention rollout from the mean of the last tokens")


# ---------------------------------------------------------------- the command


def point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
        return int(x) + x % 1, int(y) + y % 1  # which refuses what is not finite
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not X,Y in pixels") from None


def run(args: argparse.Namespace) -> int:
    made, parts = views.load(args), ("stage1", "stage2", "stage3", "stage4", "rollout")

    def check(seen: View) -> None:
        empty_maps(made.model, seen.x.shape[2:])
        if args.query:
            seen.to_view(args.query)

    images = views.Views(args, made, check, program="attention.py")
    names = [f"{name}_{part}.png" for name in images.names for part in parts]
    views.new_files(args.output, names, overwrite=args.overwrite)
    for path, name, seen in images:
        top, probability, best = predict(made.model, seen.x)
        queries = {"the center": tuple(side / 2 for side in seen.size), "the most confident position": best}
        if args.query:
            queries = {"given": seen.to_view(args.query)}
        title = f"{Path(path).name}: {made.classes[top]}, {probability:.1%}"
        for part, figure in zip(parts, draw(made.model, seen, queries, title)):
            views.save_figure(figure, args.output / f"{name}_{part}.png")
        print(f"{title} -> {args.output / name}_{{{','.join(parts)}}}.png", flush=True)
    return 1 if images.failed else 0


def main(argv: list[str]) -> int:
    parser = options.Parser(
        prog="attention.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    views.add_options(parser)
    add("--query", type=point, metavar="X,Y", help="in pixels of the original image (the center, the most confident)")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_code("attention.py", main, sys.argv[1:]))
