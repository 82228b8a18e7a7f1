"""Plot a run: curves of its log.txt beside val images with label and prediction.

python -m tools.plot_run RUN_FOLDER --data-path FOLDER [--output RUN_FOLDER/run.png]
"""

import argparse
import json
import sys
from pathlib import Path

import gvt  # noqa: F401  registers the models, and comes before timm

# isort: split
import numpy as np
import timm
import torch
from matplotlib.figure import Figure

import datasets
from tools.plot_logs import tidy
from training import checkpoint
from training.errors import UserError, exit_code
from training.options import Parser

COLUMNS, IMAGES = 6, 36


@torch.inference_mode()
def predict(folder: Path, data_path: str, images: int) -> list[tuple[np.ndarray, str, str]]:
    """Return (image, label, prediction) of val images spread evenly over the set, by the run's best weights."""
    payload = checkpoint.load(str(folder / "checkpoint_best.pth"))
    args = argparse.Namespace(**payload["args"] | {"data_path": data_path})
    classes = payload["class_names"]
    model = timm.create_model(args.model, num_classes=len(classes)).eval()
    checkpoint.load_into(model, checkpoint.weights(payload, source=str(folder)), source=str(folder))
    dataset = datasets.build_dataset("val", args, transform=datasets.build_transform(False, args), classes=classes)
    chosen = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int)
    batch, labels = zip(*(dataset[index] for index in chosen))
    predictions = model(torch.stack(batch)).argmax(1).tolist()
    normal = datasets.IMAGENET_DEFAULT_MEAN, datasets.IMAGENET_DEFAULT_STD
    mean, std = (torch.tensor(values)[:, None, None] for values in normal)
    shown = [(x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy() for x in batch]
    return [(x, classes[label], classes[top]) for x, label, top in zip(shown, labels, predictions)]


def draw_curves(figure, lines: list[dict]) -> None:
    losses, accuracy = figure.subplots(2, 1, sharex=True)
    epochs = [line["epoch"] for line in lines]
    losses.plot(epochs, [line["train_loss"] for line in lines], label="train")
    losses.plot(epochs, [line["test_loss"] for line in lines], label="val")
    losses.set_ylabel("loss")
    losses.legend(frameon=False)
    losses.xaxis.get_major_locator().set_params(integer=True)
    accuracy.plot(epochs, [line["test_acc1"] for line in lines], color="tab:green")
    accuracy.set(ylabel="top-1 on val (%)", xlabel="epoch", ylim=(0, 100))
    tidy(losses)
    tidy(accuracy)


def draw_predictions(figure, predictions: list[tuple[np.ndarray, str, str]]) -> None:
    grid = figure.subplots(-(-len(predictions) // COLUMNS), COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (image, label, top) in zip(grid.flat, predictions):
        axes.imshow(image, interpolation="nearest")
        right = top == label
        axes.set_title(label if right else f"{label}, not {top}", fontsize=9, color="black" if right else "tab:red")
    correct = sum(label == top for _, label, top in predictions)
    figure.suptitle(f"val images, labels, wrong predictions in red: {correct} of {len(predictions)} correct")


def main(argv: list[str]) -> None:
    parser = Parser(prog="plot_run.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="what --output_dir of main.py named")
    parser.add_argument("--data-path", required=True, metavar="FOLDER", help="its data set")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(RUN_FOLDER/run.png)")
    args = parser.parse_args(argv)
    log = args.run / "log.txt"
    if not log.is_file():
        raise UserError(f"no run here ({log} is missing): give the --output_dir of a training run")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    predictions = predict(args.run, args.data_path, IMAGES)
    figure = Figure(figsize=(15, max(4.5, 1.55 * -(-len(predictions) // COLUMNS))), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    best = max(line["test_acc1"] for line in lines)
    left.suptitle(f"{args.run.name}: {len(lines)} epochs, best top-1 {best:.1f} %")
    draw_curves(left, lines)
    draw_predictions(right, predictions)
    output = args.output or args.run / "run.png"
    figure.savefig(output, dpi=110)
    print(output)


if __name__ == "__main__":
    sys.exit(exit_code("plot_run.py", main, sys.argv[1:]))
