"""Parameters and FLOPs of the classification models: python tools/count.py [--model NAME ...] [--input-size 224] [--json].

FLOPs are what papers call so: multiply-adds, in 1e9 (G), of convolutions and matrix products, for one picture. Norms, softmax, activations
and sums are not counted. There are two conventions for the products of attention, q k^T and softmax(...) v:
the paper counts them (Table 1), the README of the published code does not.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gvt

# isort: split
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from options import Parser

FLOPS_OF_A_G = 2e9  # FlopCounterMode takes a multiply-add for two operations


def count(name: str, input_size: int = 224) -> dict[str, int | float]:
    """-> params, gmacs and gmacs_without_attention of a model of gvt.MODEL_NAMES, for input_size x input_size pixels."""
    with torch.device("meta"):  # shapes without values
        model = timm.create_model(name).eval()
        picture = torch.empty(1, 3, input_size, input_size)
    model.set_fused_attn(False)  # unfused, attention's products are the only batched ones, whatever kernels a device has
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(picture)
    total, products = counter.get_total_flops(), counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "gmacs": total / FLOPS_OF_A_G,
        "gmacs_without_attention": (total - products) / FLOPS_OF_A_G,
    }


def side(text: str) -> int:
    if int(text) < gvt.SMALLEST:
        raise argparse.ArgumentTypeError(f"{text} is below {gvt.SMALLEST}, the smallest picture for Twins")
    return int(text)


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=list(gvt.MODEL_NAMES), default=list(gvt.MODEL_NAMES), metavar="NAME", help="(all)")
    parser.add_argument("--input-size", type=side, default=224, metavar="PIXELS", help="side of a picture (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON object, with the models' names as keys")
    args = parser.parse_args(argv)
    counts = {name: count(name, args.input_size) for name in args.model}
    if args.json:
        return print(json.dumps(counts, indent=1))
    print(f"{'model':<16}{'parameters':>12}{'G, attention products counted':>32}{'not counted':>14}")
    for name, row in counts.items():
        print(f"{name:<16}{row['params']:>12,}{row['gmacs']:>32.3f}{row['gmacs_without_attention']:>14.3f}")
    print(f"G: 1e9 multiply-adds for one picture of {args.input_size} x {args.input_size} pixels.")
    print("The paper counts attention's products (q k^T and softmax(...) v), the README of the published code does not.")


if __name__ == "__main__":
    main(sys.argv[1:])
