"""Parameters and FLOPs: python -m tools.count [--model NAME ...] [--input-size 224] [--json], or --dense [NAME ...]
[--json | --csv FILE].

FLOPs are what papers call so: multiply-adds, in 1e9 (G), of convolutions and matrix products, for one picture. Norms,
softmax, activations and sums are not counted. There are two conventions for the products of attention, q k^T and
softmax(...) v: the paper counts them (Table 1), the README of the published code does not.

--dense: segmentors at 512 x 512, detectors at 800 x 600 without padding, built from their configs. Counted is what
gives the answer for a picture: backbone, neck and heads, in a segmentor without the auxiliary head, which only trains
(its parameters are counted). Mask R-CNN looks at 1,000 boxes and 100 masks, and its deconvolution counts the whole
kernel for each pixel of the output, four times its real products, as published. With attention's products counted, the
published FLOPs of UperNet, RetinaNet and Mask R-CNN are met within 0.6 %; those of Semantic FPN are met without them,
within 2 %, and are exceeded by 4 to 12 % with them. So each published table keeps to one convention.
"""

import argparse
import csv
import functools
import importlib
import io
import json
import re
import sys
from pathlib import Path

import gvt

# isort: split
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from dense import libraries
from training import files
from training.errors import exit_code
from training.options import Parser

ROOT = Path(__file__).resolve().parent.parent
FLOPS_OF_A_G = 2e9  # FlopCounterMode takes a multiply-add for two operations


def count(name: str, input_size: int = 224) -> dict[str, int | float]:
    """-> params, gmacs and gmacs_without_attention of a model of gvt.MODEL_NAMES, for input_size x input_size
    pixels.
    """
    with torch.device("meta"):  # shapes without values
        model = timm.create_model(name).eval()
        picture = torch.empty(1, 3, input_size, input_size)
    model.set_fused_attn(
        False
    )  # unfused, attention's products are the only batched ones, whatever kernels a device has
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(picture)
    return figures(model, counter)


def figures(model: torch.nn.Module, counter: FlopCounterMode) -> dict[str, int | float]:
    total, products = counter.get_total_flops(), counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "gmacs": total / FLOPS_OF_A_G,
        "gmacs_without_attention": (total - products) / FLOPS_OF_A_G,
    }


# ---------------------------------------------------------------- segmentors and detectors

HEADS = {"fpn": "mmseg", "upernet": "mmseg", "retinanet": "mmdet", "mask_rcnn": "mmdet"}
DENSE = [f"{head}_{family}_{size}" for head in HEADS for family in ("pcpvt", "alt_gvt") for size in "sbl"]
BOXES, MASKS = 1000, 100


def dense_model(config: str) -> str:
    """The name in DENSE of what a config builds: trainings of 12 and of 36 epochs have the same model."""
    return re.split("_512x512|_fpn_", config)[0]


def count_dense(name: str) -> dict[str, int | float]:
    """-> the figures of count, of a model of DENSE."""
    library = HEADS[next(head for head in HEADS if name.startswith(head))]
    libraries.load(library)
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    config = min((ROOT / libraries.TASKS[library] / "configs").glob(f"{name}_*.py"))
    with DefaultScope.overwrite_default_scope(library), torch.device("meta"), libraries.quiet():
        model = importlib.import_module(f"{library}.registry").MODELS.build(Config.fromfile(config).model).eval()
    model.backbone.set_fused_attn(False)
    with (
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution: at_output_size}) as counter,
    ):
        look(model)
    return figures(model, counter)


def at_output_size(x, weight, bias, stride, padding, dilation, transposed, *others, out_shape, **named) -> int:
    """Operations of a convolution, with a deconvolution taken for a convolution."""
    return conv_flop_count(x, weight, out_shape, transposed=False)


def look(model: torch.nn.Module) -> None:
    """What a segmentor or a detector does for one picture, without what depends on values: choosing boxes and cutting
    them out.
    """
    empty = functools.partial(torch.empty, device="meta")
    if hasattr(model, "decode_head"):
        return model(empty(1, 3, 512, 512), mode="tensor")
    maps = model.extract_feat(empty(1, 3, 600, 800))
    if not hasattr(model, "roi_head"):
        return model.bbox_head(maps)
    model.rpn_head(maps)
    model.roi_head.bbox_head(empty(BOXES, maps[0].shape[1], 7, 7))
    model.roi_head.mask_head(empty(MASKS, maps[0].shape[1], 14, 14))


def published_flops() -> dict[str, str]:
    """By the names of DENSE, "" where the paper's are not known: see logs/README.md."""
    with open(ROOT / "logs" / "published" / "dense.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    known = {dense_model(row["config"]): row["flops_g"] for row in rows if row["flops_g"]}
    return {name: known.get(name, "") for name in DENSE}


def as_csv(counts: dict[str, dict[str, int | float]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "params", "gmacs", "gmacs_without_attention"])
    for name, row in counts.items():
        writer.writerow([name, row["params"], f"{row['gmacs']:.3f}", f"{row['gmacs_without_attention']:.3f}"])
    return text.getvalue()


# ---------------------------------------------------------------- the command line


def side(text: str) -> int:
    if int(text) < gvt.SMALLEST:
        raise argparse.ArgumentTypeError(f"{text} is below {gvt.SMALLEST}, the smallest picture for Twins")
    return int(text)


def main(argv: list[str]) -> None:
    classifiers = list(gvt.MODEL_NAMES)
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=classifiers, metavar="NAME", help="classification models (all)")
    parser.add_argument("--input-size", type=side, metavar="PIXELS", help="side of a picture for them (224)")
    parser.add_argument(
        "--dense",
        nargs="*",
        choices=DENSE,
        metavar="NAME",
        help="segmentors and detectors instead, such as fpn_alt_gvt_s (all)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object, with the models' names as keys")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="with --dense: write a table for tools/readme_tables.py"
    )
    args = parser.parse_args(argv)
    if args.dense is None and args.csv:
        parser.error("--csv is for --dense")
    if args.dense is not None and (args.model or args.input_size):
        parser.error("--dense goes without --model and --input-size")
    size = args.input_size or 224
    if args.dense is None:
        counts = {name: count(name, size) for name in args.model or classifiers}
    else:
        counts = {name: count_dense(name) for name in args.dense or DENSE}
    if args.csv:
        files.write_text(args.csv, as_csv(counts))
    if args.json:
        return print(json.dumps(counts, indent=1))
    published = published_flops() if args.dense is not None else {}
    print(
        f"{'model':<20}{'parameters':>12}{'G, attention products counted':>32}"
        f"{'not counted':>14}{'published' if published else '':>12}".rstrip()
    )
    for name, row in counts.items():
        line = f"{name:<20}{row['params']:>12,}{row['gmacs']:>32.3f}{row['gmacs_without_attention']:>14.3f}"
        line += f"{published.get(name, ''):>12}"
        print(line.rstrip())
    if published:
        print("G: 1e9 multiply-adds for one picture, of 512 x 512 pixels for segmentors, of 800 x 600 for detectors.")
        return print("The paper counts attention's products, but not for Semantic FPN.")
    print(f"G: 1e9 multiply-adds for one picture of {size} x {size} pixels.")
    print(
        "The paper counts attention's products (q k^T and softmax(...) v), the README of the published code does not."
    )


def run(argv: list[str]) -> int:
    return exit_code("count.py", main, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
