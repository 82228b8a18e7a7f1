"""Export a trained classifier, run the file, and compare it with PyTorch: python -m tools.export --weights FILE
--to FORMAT --output FILE.

    pt2          torch.export: a program for torch without this project's code
    onnx         for onnxruntime and others; holds class names, size, mean, std and crop as metadata
    openvino     an .xml and a .bin file
    safetensors  the weights alone, by their official names

What the images must be like is in OUTPUT.json beside the other formats. A file that differs from PyTorch by more than
rounding is not kept, and the exit code is 1.
"""

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import datasets
from gvt_ops import accelerate
from tools import measurement, quantize, runtimes
from tools.runtimes import CheckFailed, Outputs, Shape
from tools.trained import Trained, load
from training import sources
from training.checkpoint import Checkpoint, save_safetensors
from training.errors import UserError, exit_code
from training.images import ImageReader
from training.options import Parser

FORMATS = tuple(runtimes.SUFFIXES)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Largest difference to PyTorch in float32, for outputs up to 1; where sides vary, torch masks windows that it else
# does not pad.
BOUNDS = {"onnx": 1e-4, "openvino": 1e-4, "pt2": 0.0, "pt2, any size": 1e-6, "safetensors": 0.0}
LEAST_AGREEMENT = 0.99  # of half precision with float32 on val
ROUNDS = 7

Run = Callable[[Tensor], Outputs]


@dataclass(frozen=True)
class Plan:
    """What is written. precision: float32, float16, bfloat16 or int8."""

    fmt: str
    shape: Shape
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES.get(self.precision, torch.float32)

    @property
    def bound(self) -> float | None:
        """Return the largest difference for outputs up to 1, None where rounding decides."""
        if self.precision != "float32":
            return None
        return BOUNDS["pt2, any size" if self.fmt == "pt2" and self.shape.dynamic_size else self.fmt]


# ---------------------------------------------------------------- writing


def write(trained: Trained, plan: Plan, path: Path, images: list[Tensor] | None) -> None:
    """Write the file. images: for calibration, where the precision is int8."""
    info = describe(trained, plan)
    if plan.fmt == "safetensors":
        state = {name: value.to(plan.dtype).contiguous() for name, value in trained.model.state_dict().items()}
        save_safetensors(path, state)
        runtimes.write_info(path, info)
        return
    network = copy.deepcopy(trained.model)
    if plan.dtype != torch.float32:
        network = runtimes.InPrecision(network, plan.dtype)
    program = runtimes.trace(network, plan.shape)
    if images is None:
        runtimes.write(program, plan.fmt, path, info)
    else:
        quantize.write(program, plan.fmt, path, info, images)


def describe(trained: Trained, plan: Plan) -> dict:
    """Return what a program that runs the file needs to know."""
    images = {"input_size": [len(trained.mean), *trained.sides], "mean": trained.mean, "std": trained.std}
    images |= {"crop": trained.crop, "interpolation": "bicubic"}
    return {"model": trained.name, "class_names": trained.classes, **images, "precision": plan.precision}


def open_written(trained: Trained, plan: Plan, path: Path) -> Run:
    """Return images -> logits by the file; raise CheckFailed for weights that are not the model's, bit for bit."""
    if plan.fmt != "safetensors":
        return runtimes.open_file(plan.fmt, path)
    written, state = Checkpoint.open(path).weights(), trained.model.state_dict()
    same = written.keys() == state.keys()
    if not same or not all(torch.equal(written[name], value.to(plan.dtype)) for name, value in state.items()):
        raise CheckFailed("its weights are not the model's")
    network = copy.deepcopy(trained.model).to(plan.dtype)
    network.load_state_dict(written)
    return torch.inference_mode()(lambda images: network(images.to(plan.dtype)).float())


# ---------------------------------------------------------------- the check


def check(trained: Trained, plan: Plan, path: Path) -> None:
    """Compare the file with PyTorch and time both; raise CheckFailed if they differ too much."""
    runs = {"PyTorch": accelerate(copy.deepcopy(trained.model)), "file": open_written(trained, plan, path)}
    if plan.fmt == "openvino":
        runs["file at default precision"] = runtimes.open_file(plan.fmt, path, precision=None)
    compare(trained.model, runs, images_to_check(plan), plan)


def difference(outputs: Outputs, expected: Outputs) -> float:
    """Return the largest absolute difference, infinity for outputs that are not finite."""
    if isinstance(outputs, tuple):
        return max(difference(*pair) for pair in zip(outputs, expected, strict=True))
    return (outputs - expected).abs().max().item() if outputs.isfinite().all() else float("inf")


def largest_of(outputs: Outputs) -> float:
    return max(each.abs().max().item() for each in (outputs if isinstance(outputs, tuple) else (outputs,)))


def compare(
    reference: Run, runs: dict[str, Run], batches: list[Tensor], plan: Plan, measure=difference, unit: str = "|logit|"
) -> None:
    """Print how far the runs but "PyTorch" are from the reference, and images/s of all; raise CheckFailed if the file
    differs too much. measure: (outputs, the reference's) -> difference.
    """
    rows, worst, largest = [], 0.0, 0.0
    for images in batches:
        expected = reference(images)
        differences = {name: measure(run(images), expected) for name, run in runs.items() if name != "PyTorch"}
        worst, largest = max(worst, differences["file"]), max(largest, largest_of(expected))
        row = {"images": " x ".join(map(str, images.shape))}
        row |= {f"difference, {name}": f"{value:.1e}" if value else "0" for name, value in differences.items()}
        speeds = images_per_s(runs, images)
        rows.append(row | {f"images/s, {name}": f"{value:.1f}" for name, value in speeds.items()})
    print(measurement.text_table(rows))
    line = f"largest difference to PyTorch in float32: {worst:.2g}, largest {unit} {largest:.3g}"
    if plan.bound is not None:
        bound = plan.bound * max(1, largest)
        line += f", bound {bound:.2g}"
        if worst > bound:
            raise CheckFailed(line)
    if worst == float("inf"):
        raise CheckFailed(f"outputs that are not finite in {plan.precision}")
    print(line)


def images_to_check(plan: Plan) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    batches = (1, 3) if plan.shape.dynamic_batch or plan.fmt == "safetensors" else (1,)
    sizes = runtimes.sizes_to_check(plan.shape)
    return [torch.randn(batch, plan.shape.channels, *size, generator=generator) for size in sizes for batch in batches]


def images_per_s(runs: dict[str, Run], images: Tensor) -> dict[str, float]:
    """Return the median of rounds in which all take turns."""

    def timed(run: Run) -> Callable[[int], float]:
        return lambda number: measurement.seconds(lambda: run(images), images.device)

    rounds = measurement.run_rounds(
        {name: timed(run) for name, run in runs.items()}, repeats=ROUNDS, warmup=1, label=""
    )
    return {name: len(images) / statistics.median(values) for name, values in rounds.items()}


# ---------------------------------------------------------------- accuracy on val


def val_set(data_path: Path, trained: Trained) -> datasets.Folder:
    """Return the val images of a data set, with the indices of the classifier's classes."""
    images = sources.find(data_path, "val")
    stored = trained.classes if set(images.classes) <= set(trained.classes) else None
    classes = datasets.match_classes(images.classes, stored, len(trained.classes))
    return datasets.Folder(images, trained.transform, ImageReader("val", alpha=trained.alpha), classes)


def check_on_val(trained: Trained, plan: Plan, path: Path, images: datasets.Folder) -> None:
    """Print the accuracy in PyTorch and of the file; raise CheckFailed if half precision names other classes."""
    run = open_written(trained, plan, path)
    loader = DataLoader(images, batch_size=32 if plan.shape.dynamic_batch or plan.fmt == "safetensors" else 1)
    before = after = same = 0
    for batch, labels in tqdm(loader, desc="val", disable=None):
        old, new = trained.model(batch).argmax(1), run(batch).argmax(1)
        before, after = before + (old == labels).sum().item(), after + (new == labels).sum().item()
        same += (old == new).sum().item()
    images.reader.report(final=True)
    number = len(images)
    was, now, agree = (f"{100 * count / number:.2f} %" for count in (before, after, same))
    print(f"top-1 on {number} val images: {was} in PyTorch (float32), {now} of the file; the same class for {agree}")
    if plan.dtype != torch.float32 and same < LEAST_AGREEMENT * number:
        raise CheckFailed(f"{plan.precision} names the class that float32 names for {agree} of val, bound 99 %")


# ---------------------------------------------------------------- the tool


def get_parser() -> Parser:
    parser = Parser(prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="a checkpoint of main.py, or weights")
    add("--model", metavar="NAME", help="(what the file says, or its weights' shapes)")
    add("--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    add("--output", required=True, type=Path, metavar="FILE", help="a new file; .pt2, .onnx, .xml, .safetensors")
    add("--overwrite", action="store_true", help="replace the file")
    add("--dynamic-batch", action="store_true", help="any number of images at a time (one; openvino: any)")
    add("--dynamic-size", action="store_true", help="any height and width (those of the training run)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--half", dest="dtype", action="store_const", const="float16", help="in float16")
    group.add_argument("--bf16", dest="dtype", action="store_const", const="bfloat16", help="in bfloat16")
    group.add_argument("--int8", action="store_true", help="quantize; onnx and openvino; needs --calibrate")
    add("--calibrate", type=Path, metavar="FOLDER", help=f"of images for --int8, {quantize.IMAGES} are taken")
    add("--data-path", type=Path, metavar="FOLDER", help="of val/CLASS/*: compare accuracy on it")
    parser.set_defaults(dtype="float32")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for what cannot be written, before anything is loaded."""
    runtimes.check_new(args.output, args.to, overwrite=args.overwrite)
    if args.to == "safetensors" and (args.dynamic_batch or args.dynamic_size):
        raise UserError("weights fit any size (--to safetensors): omit --dynamic-batch and --dynamic-size")
    if args.to == "onnx" and args.dtype == "bfloat16":
        raise UserError("ONNX has no convolution in bfloat16 (--bf16 --to onnx): pass --half, or use another format")
    if args.int8 != bool(args.calibrate):
        raise UserError("--int8 and --calibrate FOLDER belong together (command line): pass both, or none")
    if args.int8 and args.to not in quantize.PACKAGES:
        raise UserError(f"int8 is for onnx and openvino (--int8 --to {args.to}): use one of them")
    if args.int8 and args.dynamic_size:
        raise UserError("int8 is calibrated for one size (--int8 --dynamic-size): omit one of them")
    if args.calibrate and not args.calibrate.is_dir():
        raise UserError(
            f"no such folder (--calibrate {args.calibrate}): name one with images like those to be classified"
        )
    runtimes.require(args.to)
    if args.int8:
        runtimes.need(quantize.PACKAGES[args.to])


def not_kept(output: Path, failed: CheckFailed) -> int:
    print(f"export.py: error: wrong, and not kept ({output}): {failed}", file=sys.stderr)
    return 1


@torch.inference_mode()
def main(argv: list[str]) -> int:
    args = get_parser().parse_args(argv)
    check_options(args)
    trained = load(args.weights, args.model)
    # With a fixed batch OpenVINO 2026.4 computes attention to a single token wrongly: SVT at 32 pixels.
    height, width = trained.sides
    batches = args.dynamic_batch or args.to == "openvino"
    shape = Shape(height, batches, args.dynamic_size, width, channels=len(trained.mean))
    plan = Plan(args.to, shape, "int8" if args.int8 else args.dtype)
    val = val_set(args.data_path, trained) if args.data_path else None
    calibration = quantize.calibration_images(args.calibrate, trained) if args.int8 else None
    try:
        with runtimes.staged(args.output) as path:
            write(trained, plan, path, calibration)
            check(trained, plan, path)
            if val is not None:
                check_on_val(trained, plan, path, val)
            note = runtimes.notes(plan.fmt, path, shape)
    except CheckFailed as failed:
        return not_kept(args.output, failed)
    if val is None and plan.precision != "float32":
        print("accuracy: not measured, --data-path FOLDER does")
    print(f"{args.output}: {trained.name} in {plan.precision}; {note}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("export.py", main, sys.argv[1:]))
