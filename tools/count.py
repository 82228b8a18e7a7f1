"""Count parameters and FLOPs: python -m tools.count [--model NAME ...] [--input-size 224], or --dense [NAME ...].

FLOPs are what papers call so: multiply-adds, in 1e9 (G), of convolutions and matrix products, for one image. Norms,
softmax, activations and sums are not counted. There are two conventions for the products of attention, q k^T and
softmax(...) v: the paper counts them (Table 1), the README of the official code does not.

--dense: segmentors at 512 x 512, detectors at 800 x 600 without padding, built from their configs. Counted is what
predicts on an image: backbone, neck and heads, in a segmentor without the auxiliary head (its parameters are counted).
Mask R-CNN has 1,000 boxes and 100 masks, and its deconvolution counts four times its real products, as officially
reported. The paper's FLOPs of Semantic FPN are without attention's products, all others with them.
"""

import argparse
import functools
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import gvt

# isort: split
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from dense import libraries
from tools.measurement import csv_text, read_csv, text_table
from training import files
from training.errors import exit_code
from training.options import Parser

ROOT = Path(__file__).resolve().parent.parent
FLOPS_OF_A_G = 2e9  # FlopCounterMode takes a multiply-add for two operations


def count(name: str, input_size: int = 224) -> dict[str, int | float]:
    """Return params, gmacs and gmacs_without_attention of a model of gvt.MODEL_NAMES, for a square image."""
    # Shapes without values.
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        image = torch.empty(1, 3, input_size, input_size)
    return counted(model, lambda: model(image))


def counted(model: torch.nn.Module, forward: Callable[[], object], **settings) -> dict[str, int | float]:
    # Unfused, attention's products are the only batched ones, whatever kernels a device has.
    getattr(model, "backbone", model).set_fused_attn(False)
    with torch.no_grad(), FlopCounterMode(display=False, **settings) as counter:
        forward()
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
    """Return the name in DENSE of what a config builds: schedules of 12 and of 36 epochs have the same model."""
    return re.split("_512x512|_fpn_", config)[0]


def count_dense(name: str) -> dict[str, int | float]:
    """Return what `count` does, of a model of DENSE."""
    library = HEADS[next(head for head in HEADS if name.startswith(head))]
    libraries.load(library)
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    config = min((ROOT / libraries.TASKS[library] / "configs").glob(f"{name}_*.py"))
    with DefaultScope.overwrite_default_scope(library), torch.device("meta"), libraries.quiet():
        model = importlib.import_module(f"{library}.registry").MODELS.build(Config.fromfile(config).model).eval()
    mapping = {torch.ops.aten.convolution: at_output_size}
    return counted(model, lambda: predict(model), custom_mapping=mapping)


def at_output_size(x, weight, bias, stride, padding, dilation, transposed, *others, out_shape, **named) -> int:
    """Count the operations of a convolution, with a deconvolution taken for a convolution."""
    return conv_flop_count(x, weight, out_shape, transposed=False)


def predict(model: torch.nn.Module) -> None:
    """Do what a segmentor or detector does for an image, but for choosing boxes and cutting them out by values."""
    empty = functools.partial(torch.empty, device="meta")
    if hasattr(model, "decode_head"):
        return model(empty(1, 3, 512, 512), mode="tensor")
    maps = model.extract_feat(empty(1, 3, 600, 800))
    if not hasattr(model, "roi_head"):
        return model.bbox_head(maps)
    model.rpn_head(maps)
    model.roi_head.bbox_head(empty(BOXES, maps[0].shape[1], 7, 7))
    model.roi_head.mask_head(empty(MASKS, maps[0].shape[1], 14, 14))


def reported_flops() -> dict[str, str]:
    """Return the paper's G by the names of DENSE, "" where they are not known: see logs/README.md."""
    rows = read_csv(ROOT / "logs" / "published" / "dense.csv")
    known = {dense_model(row["config"]): row["flops_g"] for row in rows if row["flops_g"]}
    return {name: known.get(name, "") for name in DENSE}


def as_csv(counts: dict[str, dict[str, int | float]]) -> str:
    rows = []
    for name, row in counts.items():
        rounded = {key: f"{row[key]:.3f}" for key in ("gmacs", "gmacs_without_attention")}
        rows.append({"model": name, "params": row["params"]} | rounded)
    return csv_text(rows)


# ---------------------------------------------------------------- command line


def side(text: str) -> int:
    if int(text) < gvt.SMALLEST:
        raise argparse.ArgumentTypeError(f"{text} is below {gvt.SMALLEST}, the smallest image for Twins")
    return int(text)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="count.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", nargs="+", choices=list(gvt.MODEL_NAMES), metavar="NAME", help="classification models (all)")
    add("--input-size", type=side, metavar="PIXELS", help="side of an image for them (224)")
    dense = "segmentors and detectors instead, such as fpn_alt_gvt_s (all)"
    add("--dense", nargs="*", choices=DENSE, metavar="NAME", help=dense)
    add("--json", action="store_true", help="print a JSON object, with the models' names as keys")
    add("--csv", type=Path, metavar="FILE", help="with --dense: write a table for tools/readme_tables.py")
    args = parser.parse_args(argv)
    if args.dense is None and args.csv:
        parser.error("--csv is for --dense")
    if args.dense is not None and (args.model or args.input_size):
        parser.error("--dense goes without --model and --input-size")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    dense, size = args.dense is not None, args.input_size or 224
    if dense:
        counts = {name: count_dense(name) for name in args.dense or DENSE}
    else:
        counts = {name: count(name, size) for name in args.model or gvt.MODEL_NAMES}
    if args.csv:
        files.write_text(args.csv, as_csv(counts))
    if args.json:
        print(json.dumps(counts, indent=1))
        return
    reported = reported_flops() if dense else {}
    rows = []
    for name, row in counts.items():
        cells = {"model": name, "parameters": f"{row['params']:,}"}
        cells |= {"G": f"{row['gmacs']:.3f}", "G without attention": f"{row['gmacs_without_attention']:.3f}"}
        rows.append(cells | ({"paper": reported[name]} if dense else {}))
    print(text_table(rows))
    images = "512 x 512 (segmentors) or 800 x 600 (detectors)" if dense else f"{size} x {size}"
    print(f"G: 1e9 multiply-adds for one image of {images} pixels, with attention's products (q k^T, softmax(...) v).")
    print(f"The paper counts them{', but not for Semantic FPN' if dense else '; the official README does not'}.")


if __name__ == "__main__":
    sys.exit(exit_code("count.py", main, sys.argv[1:]))
