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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gvt

# isort: split
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from gvt_ops.window_attention import from_windows, layout, to_windows
from tools import trained, views
from tools.views import View, overlay
from training import options
from training.errors import UserError, exit_code

PATCHES = tuple(itertools.accumulate(gvt.PATCHES, int.__mul__))  # pixels that a token of each stage is wide
MOST_BYTES = 4 * 2**30  # of maps
PANEL = 1.1  # inches


# ---------------------------------------------------------------- the maps


@dataclass(frozen=True)
class BlockMaps:
    """The attention of a block for one image, whose map at this stage has H x W tokens.

    weights: LSA (windows, heads, h * w, h * w), windows row by row; GSA (1, heads, H * W, keys); each row's sum is 1.
    cell: h and w of an LSA window, or the tokens that a key of GSA summarizes.
    """

    stage: int
    block: int
    local: bool
    weights: Tensor
    tokens: tuple[int, int]
    cell: tuple[int, int]

    @property
    def kind(self) -> str:
        return "LSA" if self.local else "GSA"

    def of(self, query: tuple[int, int]) -> Tensor:
        """Return (heads, H, W), the share of each token in what the query (row, column) attends to; its sum is 1.

        LSA: in each window, of the token at the query's place in its window, or the nearest one on the map; the sum of
        each window is 1. GSA: a key's weight is shared by the tokens that it summarizes.
        """
        if not self.local:
            return self.spread(self.weights[0, :, query[0] * self.tokens[1] + query[1]])
        (H, W), (h, w) = self.tokens, self.cell
        starts = itertools.product(range(0, H, h), range(0, W, w))
        places = [min(query[0] % h, H - top - 1) * w + min(query[1] % w, W - left - 1) for top, left in starts]
        rows = self.weights[torch.arange(len(places)), :, torch.tensor(places)]  # (windows, heads, h * w)
        return self.join(rows.transpose(1, 2))

    def backward(self, share: Tensor) -> Tensor:
        """Return (H, W), the shares of tokens before the attention from those after it, by the mean of the heads."""
        weights = self.weights.mean(1)
        if not self.local:
            return self.spread(share.reshape(1, -1) @ weights[0])[0]
        (H, W), (h, w) = self.tokens, self.cell
        windows = to_windows(F.pad(share, (0, -W % w, 0, -H % h))[None, :, :, None], h, w)  # (windows, h * w, 1)
        return self.join(weights.transpose(1, 2) @ windows)[0]

    def spread(self, keys: Tensor) -> Tensor:
        """(n, keys) -> (n, H, W): tokens beyond the last whole region are no part of a key."""
        (H, W), (h, w) = self.tokens, self.cell
        maps = keys.unflatten(1, (H // h, W // w)) / (h * w)
        maps = maps.repeat_interleave(h, 1).repeat_interleave(w, 2)
        return F.pad(maps, (0, W - maps.shape[2], 0, H - maps.shape[1]))

    def join(self, windows: Tensor) -> Tensor:
        """(windows, h * w, n) -> (n, H, W), without the padding."""
        (H, W), (h, w) = self.tokens, self.cell
        return from_windows(windows, h, w, H + -H % h, W + -W % w)[0, :H, :W].permute(2, 0, 1)


@torch.no_grad()
def attention_maps(model: gvt.Twins, image: Tensor) -> list[BlockMaps]:
    """Return the maps of all blocks, in order, for one normalized image, (3, H, W) or (1, 3, H, W), of any size.

    They are those of the model as it predicts, evaluating, with unfused attention; its modes are as before afterwards.
    On the model's device. Raises UserError if the maps would not fit into memory.
    """
    image = image.reshape(1, *image.shape[-3:])
    maps, seen = empty_maps(model, image.shape[2:]), []
    with _looking(model, seen):
        model(image)
    assert [each.weights.shape for each in maps] == [weights.shape for weights in seen]
    return [BlockMaps(**vars(each) | {"weights": weights}) for each, weights in zip(maps, seen)]


def _blocks(model: gvt.Twins) -> list[tuple[int, int]]:
    return [(stage, block) for stage, blocks in enumerate(model.blocks) for block in range(len(blocks))]


def empty_maps(model: gvt.Twins, size: tuple[int, int]) -> list[BlockMaps]:
    """Return maps with weights on the meta device for images of H x W pixels; raise UserError if they are too large."""
    maps = [_empty(model, size, stage, block) for stage, block in _blocks(model)]
    total = sum(4 * each.weights.numel() for each in maps)
    if total > MOST_BYTES:
        what = f"attention maps of {total / 2**30:.0f} GiB ({size[1]} x {size[0]} pixels)"
        raise UserError(f"{what}: shrink the image, {MOST_BYTES / 2**30:.0f} GiB are the limit")
    return maps


def _empty(model: gvt.Twins, size: tuple[int, int], stage: int, block: int) -> BlockMaps:
    attn = model.blocks[stage][block].attn
    H, W = size
    for patch in gvt.PATCHES[: stage + 1]:
        H, W = H // patch, W // patch
    local = isinstance(attn, gvt.LocalAttention)
    if local:
        h, w = layout(H, W, attn.window, attn.pad)[:2]
        shape = (-(-H // h) * -(-W // w), attn.heads, h * w, h * w)
    else:
        h = w = 1 if attn.sr is None else attn.sr.stride[0]
        shape = (1, attn.heads, H * W, (H // h) * (W // w))
    return BlockMaps(stage, block, local, torch.empty(shape, device="meta"), (H, W), (h, w))


@contextmanager
def _looking(model: gvt.Twins, seen: list[Tensor]) -> Iterator[None]:
    """Evaluate, unfused, and append the weights of each attention to `seen`, in the order of the blocks."""
    attentions = [model.blocks[stage][block].attn for stage, block in _blocks(model)]
    fused, training = [attn.fused_attn for attn in attentions], model.training
    hooks = [attn.attn_drop.register_forward_hook(lambda *call: seen.append(call[-1])) for attn in attentions]
    model.eval().set_fused_attn(False)
    try:
        yield
    finally:
        for hook, attn, was in zip(hooks, attentions, fused):
            hook.remove()
            attn.fused_attn = was
        model.train(training)


def rollout(maps: Sequence[BlockMaps]) -> list[Tensor]:
    """Return for each stage (H, W), the share of its first tokens in the mean of the last ones; the sum is 1.

    Attention rollout (Abnar and Zuidema, 2020): each block passes on half of a token's share, and the other half by
    the mean of its heads. A token of the next stage shares with the 2 x 2 tokens of its patch. Convolutions of the
    position encodings, MLPs and norms are left out, as always in rollout.
    """
    H, W = maps[-1].tokens
    share, shares = torch.full((H, W), 1 / (H * W), device=maps[-1].weights.device), []
    for _, blocks in itertools.groupby(reversed(maps), key=lambda each: each.stage):
        for each in blocks:
            if share.shape != each.tokens:
                share = share.repeat_interleave(2, 0).repeat_interleave(2, 1) / 4
                share = F.pad(share, (0, each.tokens[1] - share.shape[1], 0, each.tokens[0] - share.shape[0]))
            share = (share + each.backward(share)) / 2
        shares.insert(0, share)
    return shares


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
    for column, heat in enumerate([None, heads.mean(0), *heads]):
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
        local, panels = any(each.local for each in blocks), "each panel from 0 (black) to its largest (yellow)"
        kinds = "LSA and GSA" if local else "PCPVT has GSA (spatial reduction) only, no windows"
        H, W = blocks[0].tokens
        yield draw_stage(view, blocks, queries, f"{title}\nstage {stage + 1}, {H} x {W} tokens: {kinds}\n{panels}")
    yield draw_rollout(view, rollout(maps), f"{title}: attention rollout from the mean of the last tokens")


# ---------------------------------------------------------------- the command


def point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
        return int(x) + x % 1, int(y) + y % 1  # which refuses what is not finite
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not X,Y in pixels") from None


def run(args: argparse.Namespace) -> int:
    made = trained.load(args.weights, model=args.model, device=args.device)
    model, parts = views.check_twins(made), ("stage1", "stage2", "stage3", "stage4", "rollout")
    given = {}

    def prepare(image):
        seen = views.view(made, image, whole=args.whole)
        empty_maps(model, seen.x.shape[2:])
        given.update({"given": seen.to_view(args.query)} if args.query else {})
        return seen

    images = views.Views(args.images, prepare, alpha=made.alpha, program="attention.py")
    names = [f"{name}_{part}.png" for name in images.names for part in parts]
    views.new_files(args.output, names, overwrite=args.overwrite)
    for path, name, seen in images:
        top, probability, best = predict(model, seen.x)
        queries = given or {"the center": tuple(side / 2 for side in seen.size), "the most confident position": best}
        title = f"{Path(path).name}: {made.classes[top]}, {probability:.1%}"
        for part, figure in zip(parts, draw(model, seen, queries, title)):
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
