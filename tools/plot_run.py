"""Plot a run: curves of its log.txt beside val images with label and prediction.

python -m tools.plot_run RUN_FOLDER --data-path FOLDER [--output RUN_FOLDER/run.png]
"""

import sys
from pathlib import Path

import gvt  # noqa: F401  registers the models, and comes before timm

# isort: split
import numpy as np
import timm
import torch
from matplotlib.figure import Figure, SubFigure

import datasets
from gvt_ops import accelerate
from gvt_ops.loading import model_settings, normalization
from tools.plot_logs import read_log
from training.checkpoint import Checkpoint
from training.curves import plot, tidy
from training.errors import exit_code
from training.options import Parser, parse_args

COLUMNS = 6


@torch.inference_mode()
def predict(folder: Path, data_path: str, images: int) -> list[tuple[np.ndarray, str, str]]:
    """Return (image, label, prediction) of val images spread evenly over the set, by the run's best weights."""
    file = Checkpoint.open(folder / "checkpoint_best.pth")
    args = parse_args([])  # whose options an older run lacks
    vars(args).update(file.payload["args"], data_path=data_path, eval=True, resume=str(folder))
    classes = file.class_names
    settings = model_settings(vars(args), file.source)
    model = accelerate(timm.create_model(args.model, num_classes=len(classes), **settings)).eval()
    file.load_into(model)
    dataset = datasets.build_dataset("val", args, transform=datasets.build_transform(False, args), classes=classes)
    chosen = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int)
    batch, labels = zip(*(dataset[index] for index in chosen))
    predictions = model(torch.stack(batch)).argmax(1).tolist()
    mean, std = (torch.tensor(values)[:, None, None] for values in normalization(vars(args), file.source))
    shown = [(x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy() for x in batch]
    return [(x, classes[label], classes[top]) for x, label, top in zip(shown, labels, predictions)]


def draw_curves(figure: SubFigure, log: list[dict]) -> None:
    losses, accuracy = figure.subplots(2, 1, sharex=True)
    plot(losses, log, "train_loss", "train")
    plot(losses, log, "test_loss", "val")
    plot(accuracy, log, "test_acc1", color="tab:green")
    losses.set_ylabel("loss")
    losses.legend(frameon=False)
    accuracy.set(ylabel="top-1 on val (%)", xlabel="epoch", ylim=(0, 100))
    tidy(losses)
    tidy(accuracy)


def draw_predictions(figure: SubFigure, predictions: list[tuple[np.ndarray, str, str]]) -> None:
    grid = figure.subplots(-(-len(predictions) // COLUMNS), COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (image, label, top) in zip(grid.flat, predictions):
        axes.imshow(image, interpolation="nearest")
        right = top == label
        axes.set_title(label if right else f"{label}, not {top}", fontsize=9, color="black" if right else "tab:red")
    correct = sum(label == top for _, label, top in predictions)
    title = f"val images, labels, wrong predictions in red: {correct} of {len(predictions)} correct"
    figure.suptitle(title, fontsize=10)


def draw(run: Path, data_path: str, *, images: int, width: float) -> Figure:
    """Draw the curves beside the predictions. width: inches."""
    log = read_log(run, keys=("epoch", "train_loss", "test_loss", "test_acc1"))
    predictions = predict(run, data_path, images)
    rows = -(-len(predictions) // COLUMNS)
    figure = Figure(figsize=(width, width * max(0.3, 0.1 * rows)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.3])
    best = max(epoch["test_acc1"] for epoch in log)
    left.suptitle(f"{run.name}: {len(log)} epochs, best top-1 {best:.1f} %", fontsize=10)
    draw_curves(left, log)
    draw_predictions(right, predictions)
    return figure


def main(argv: list[str]) -> None:
    parser = Parser(prog="plot_run.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_FOLDER", help="what --output_dir of main.py named")
    add("--data-path", required=True, metavar="FOLDER", help="its data set")
    add("--output", type=Path, metavar="FILE", help="(RUN_FOLDER/run.png)")
    args = parser.parse_args(argv)
    output = args.output or args.run / "run.png"
    draw(args.run, args.data_path, images=36, width=15).savefig(output, dpi=110)
    print(output)


if __name__ == "__main__":
    sys.exit(exit_code("plot_run.py", main, sys.argv[1:]))
