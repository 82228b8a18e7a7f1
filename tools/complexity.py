"""Count and time one layer of LSA, GSA and full attention against the side of its map: python -m tools.complexity
[--time] [--output logs/complexity].

A layer is that of stage 1 of Twins-SVT-S: 64 channels, 2 heads, windows of 7, GSA with a key for each 8 x 8 tokens.
Full attention is GSA with a key for each token. Multiply-adds are counted as tools.count does, beside the formulas of
section 3.2 of the paper, which are for attention's products (q k^T and softmax(...) v) alone. Times are of one image in
float32, and need a machine without other work. `python -m tools.figures complexity` draws the record.
"""

import argparse
import sys
from pathlib import Path

import gvt

# isort: split
import torch
from torch import nn

from gvt_ops import accelerate
from tools.count import counted
from tools.measurement import environment, quartiles, run_rounds, seconds, text_table, write_record
from training.errors import exit_code
from training.options import Parser, positive

DIM, HEADS, WINDOW, RATIO = 64, 2, 7, 8
SIDES = (14, 28, 42, 56, 70, 84, 98, 112)
SIDE, SIZES = 56, (2, 4, 7, 8, 14, 28)  # one map, and the windows that divide it


class Layer(nn.Sequential):
    """One attention layer, which tools.count can count."""

    set_fused_attn = gvt.Twins.set_fused_attn


def layer(kind: str, *, window: int = WINDOW, ratio: int = RATIO) -> Layer:
    if kind == "LSA":
        return Layer(gvt.LocalAttention(DIM, HEADS, window=window)).eval()
    return Layer(gvt.GlobalAttention(DIM, HEADS, sr_ratio=ratio if kind == "GSA" else 1)).eval()


def formula(kind: str, side: int, *, window: int = WINDOW, ratio: int = RATIO) -> int:
    """Return the multiply-adds of attention's products for a map of side x side tokens (section 3.2)."""
    tokens = side * side
    keys = {"LSA": window**2, "GSA": (side // ratio) ** 2, "full": tokens}[kind]
    return 2 * tokens * keys * DIM


def count_layer(kind: str, side: int, **sizes: int) -> dict[str, int]:
    """Return the formula, and the counted multiply-adds of the products and of the whole layer."""
    with torch.device("meta"):
        module, tokens = layer(kind, **sizes), torch.empty(1, side, side, DIM)
    found = counted(module, lambda: module(tokens))
    whole, rest = (round(found[key] * 1e9) for key in ("gmacs", "gmacs_without_attention"))
    return {"formula": formula(kind, side, **sizes), "products": whole - rest, "layer": whole}


def by_side() -> list[dict]:
    return [{"kind": kind, "side": side} | count_layer(kind, side) for kind in ("LSA", "GSA", "full") for side in SIDES]


def by_window() -> list[dict]:
    """Return the products of an LSA and a GSA layer together, by the window that both use."""
    rows = []
    for size in SIZES:
        pair = count_layer("LSA", SIDE, window=size), count_layer("GSA", SIDE, ratio=size)
        rows.append({"window": size} | {name: sum(each[name] for each in pair) for name in ("formula", "products")})
    return rows


@torch.inference_mode()
def time_layers(repeats: int) -> dict[tuple[str, int], dict[str, float]]:
    """Return quartiles of milliseconds by kind and side, measured in turns."""
    device, steps = torch.device("cpu"), {}
    for kind in ("LSA", "GSA", "full"):
        module = accelerate(layer(kind))
        for side in SIDES:
            tokens = torch.randn(1, side, side, DIM)
            steps[kind, side] = lambda _, m=module, x=tokens: 1e3 * seconds(lambda: m(x), device)
    return {case: quartiles(times) for case, times in run_rounds(steps, repeats=repeats, warmup=2).items()}


def main(argv: list[str]) -> None:
    parser = Parser(prog="complexity.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--time", action="store_true", help="time the layers too, on a machine without other work")
    add("--repeats", type=positive, default=15, metavar="N", help="timed rounds, after two more (%(default)s)")
    add("--threads", type=positive, default=1, metavar="N", help="(%(default)s)")
    add("--output", type=Path, metavar="FOLDER", help="write complexity.json and complexity.csv there")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows, windows = by_side(), by_window()
    times = time_layers(args.repeats) if args.time else {}
    for row in rows:
        row["ms"] = times.get((row["kind"], row["side"]), {}).get("median")
    print(text_table(rows))
    print(text_table(windows))
    if args.output:
        record = {"environment": environment(torch.device("cpu")), "settings": settings(args)}
        record |= {"by_side": rows, "by_window": windows}
        write_record(args.output, "complexity", record, rows)


def settings(args: argparse.Namespace) -> dict:
    layers = dict(dim=DIM, heads=HEADS, window=WINDOW, ratio=RATIO, side=SIDE)
    return layers | dict(threads=args.threads, repeats=args.repeats if args.time else 0)


if __name__ == "__main__":
    sys.exit(exit_code("complexity.py", main, sys.argv[1:]))
