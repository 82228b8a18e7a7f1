"""segmentation/export.py and detection/export.py: write a segmentor, or a detector's backbone with its neck, as a file
that runs elsewhere, run the file, and compare it with PyTorch.
"""

from tools.export import Plan, compare, difference, images_to_check, not_kept

# isort: split
import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from dense import libraries
from dense.demo import Predictor
from gvt import SMALLEST
from gvt_ops import accelerate
from tools import runtimes
from tools.runtimes import CheckFailed, Shape
from training.errors import UserError, exit_code, library_reason
from training.options import Parser, positive

FORMATS = ("pt2", "onnx", "openvino")
WHAT = {"mmseg": "a whole segmentor", "mmdet": "a detector's backbone with its neck"}


def export(library: str, argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    sys.exit(exit_code("export.py", lambda words: main(library, words), argv))


def get_parser(library: str) -> Parser:
    about = f"Export {WHAT[library]}, run the file, and compare it with PyTorch. Another size is refused by the file."
    parser = Parser(prog="export.py", description=about)
    add = parser.add_argument
    add("config")
    add("checkpoint")
    add("--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    add("--output", required=True, type=Path, metavar="FILE", help="a new file; .pt2, .onnx, .xml")
    add("--overwrite", action="store_true", help="replace the file")
    source = "the crops of training" if library == "mmseg" else "the largest test image"
    add("--size", nargs=2, type=positive, metavar=("HEIGHT", "WIDTH"), help=f"of the images ({source})")
    add("--dynamic-batch", action="store_true", help="any number of images at a time (one; openvino: any)")
    if library == "mmseg":
        add("--logits", action="store_true", help="logits (B, classes, H, W) (labels (B, H, W))")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="set values of the config")
    return parser


class Segmentor(nn.Module):
    """Normalized images (B, 3, H, W) of one size -> logits (B, classes, H, W), or labels (B, H, W)."""

    def __init__(self, model: nn.Module, sides: tuple[int, int], labels: bool):
        super().__init__()
        self.model, self.sides, self.labels = model, sides, labels

    def forward(self, image: Tensor) -> Tensor:
        logits = self.model.encode_decode(image, [dict(img_shape=self.sides)])
        return logits.argmax(1) if self.labels else logits


class Features(nn.Module):
    """Normalized images (B, 3, H, W) -> the maps of a detector's neck."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.extract_feat(image))


def label_difference(labels: Tensor, logits: Tensor) -> float:
    """Return how far the logit of the file's label lies below the largest one, at the worst pixel."""
    if labels.shape != logits[:, 0].shape or labels.min() < 0 or labels.max() >= logits.shape[1]:
        return float("inf")
    return (logits.amax(1) - logits.gather(1, labels[:, None].long())[:, 0]).max().item()


def sides_of(cfg, size: list[int] | None) -> tuple[int, int]:
    """Return the height and width of the file's images: those asked for, or the config's."""
    preprocessor = cfg.model.data_preprocessor
    if size is None and preprocessor.get("size"):
        size = preprocessor.size
    if size is None:
        scales = [step["scale"] for step in cfg.test_dataloader.dataset.pipeline if step["type"] == "Resize"]
        if len(scales) != 1 or not isinstance(scales[0], (tuple, list)):
            raise UserError(f"the config names no size of images ({cfg.filename}): pass --size HEIGHT WIDTH")
        size = [-(-side // SMALLEST) * SMALLEST for side in reversed(scales[0])]
    if min(size) < SMALLEST:
        raise UserError(f"too small for these models (--size {size[0]} {size[1]}): {SMALLEST} pixels are the least")
    return tuple(size)


def check_model(model: nn.Module, labels: bool) -> None:
    """Raise UserError for a segmentor whose answer is not the largest of logits of the whole image."""
    if model.test_cfg.get("mode", "whole") != "whole":
        advice = "pass --cfg-options model.test_cfg.mode=whole, or cut images yourself and export that size"
        raise UserError(f"it predicts by a sliding window (model.test_cfg): {advice}")
    if labels and model.out_channels == 1:
        raise UserError("its labels come from a threshold (decode_head.out_channels=1): pass --logits")


def describe(predictor: Predictor, shape: Shape, source: str) -> dict:
    """Return what a program that runs the file needs to know: mean and std are for values from 0 to 1."""
    facts = predictor.cfg.model.data_preprocessor
    mean, std = ([round(value / 255, 6) for value in facts[key]] for key in ("mean", "std"))
    images = {"input_size": [3, *shape.sides], "mean": mean, "std": std, "interpolation": "bilinear"}
    images["channels"] = "RGB" if facts.get("bgr_to_rgb") else "BGR"
    return {"model": source, "class_names": predictor.classes, **images, "precision": "float32"}


def write(network: nn.Module, plan: Plan, path: Path, info: dict, outputs: list[str]) -> None:
    try:
        with libraries.quiet():
            program = runtimes.trace(copy.deepcopy(network), plan.shape)
    except Exception as error:  # a config may hold any model
        raise UserError(f"this model cannot be traced ({info['model']}): {library_reason(error)}") from error
    runtimes.write(program, plan.fmt, path, info, outputs)


def check(network: nn.Module, plan: Plan, path: Path) -> None:
    """Compare the file with PyTorch and time both; raise CheckFailed if they differ too much, or if the file takes
    images of another size.
    """
    run, labels = runtimes.open_file(plan.fmt, path), getattr(network, "labels", False)
    runs = {"PyTorch": accelerate(copy.deepcopy(network)), "file": run}
    if plan.fmt == "openvino":
        runs["file at default precision"] = runtimes.open_file(plan.fmt, path, precision=None)
    reference = Segmentor(network.model, plan.shape.sides, labels=False) if labels else network
    measure, unit = (label_difference, "|logit|") if labels else (difference, "|output|")
    compare(reference, runs, images_to_check(plan), plan, measure, unit)
    height, width = plan.shape.sides
    for other in ((height + SMALLEST, width), (height, width + SMALLEST)):
        if not refuses(run, torch.zeros(1, 3, *other)):
            raise CheckFailed(f"it takes images of {other[0]} x {other[1]} pixels")


def refuses(run, images: Tensor) -> bool:
    try:
        run(images)
    except Exception:  # each runtime has its own errors
        return True
    return False


@torch.inference_mode()
def main(library: str, argv: list[str]) -> int:
    args = get_parser(library).parse_args(argv)
    runtimes.check_new(args.output, args.to, overwrite=args.overwrite)
    runtimes.require(args.to)
    libraries.load(library)
    predictor = Predictor(args.config, args.checkpoint, args.cfg_options, library, "cpu")
    model = accelerate(predictor.model, enable=False)
    height, width = sides_of(predictor.cfg, args.size)
    # As in tools.export: with a fixed batch OpenVINO computes attention to a single token wrongly.
    shape = Shape(height, args.dynamic_batch or args.to == "openvino", width=width)
    if library == "mmseg":
        check_model(model, not args.logits)
        network, outputs = Segmentor(model, shape.sides, not args.logits), ["logits" if args.logits else "labels"]
    else:
        network = Features(model)
        outputs = [f"map_{level}" for level, _ in enumerate(network(torch.zeros(1, 3, 2 * SMALLEST, 2 * SMALLEST)))]
    plan = Plan(args.to, shape, "float32")
    try:
        with runtimes.staged(args.output) as path:
            write(network, plan, path, describe(predictor, shape, Path(args.config).stem), outputs)
            check(network, plan, path)
            note = runtimes.notes(plan.fmt, path, shape)
    except CheckFailed as failed:
        return not_kept(args.output, failed)
    print(f"{args.output}: {', '.join(outputs)} of {Path(args.config).stem}; {note}")
    return 0
