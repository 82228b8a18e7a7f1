"""Draw a run: curves of its log.txt beside val pictures with label and prediction.

python -m tools.picture RUN_FOLDER --data-path FOLDER [--pictures 24] [--output RUN_FOLDER/run.png]
"""

import argparse
import json
import sys
from pathlib import Path

import gvt  # noqa: F401  registers the models, and comes before timm

# isort: split
import matplotlib
import numpy as np
import timm
import torch

import datasets
from training import checkpoint
from training.errors import UserError, exit_code

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = 6


@torch.inference_mode()
def predict(folder: Path, data_path: str, pictures: int) -> list[tuple[np.ndarray, str, str]]:
    """(picture, label, prediction) of val pictures spread evenly over the set, by the run's best weights."""
    payload = checkpoint.load(str(folder / "checkpoint_best.pth"))
    args = argparse.Namespace(**payload["args"] | {"data_path": data_path})
    classes = payload["class_names"]
    model = timm.create_model(args.model, num_classes=len(classes)).eval()
    checkpoint.load_into(model, checkpoint.weights(payload, source=str(folder)), source=str(folder))
    dataset = datasets.build_dataset("val", args, transform=datasets.build_transform(False, args), classes=classes)
    chosen = np.linspace(0, len(dataset) - 1, min(pictures, len(dataset))).round().astype(int)
    batch, labels = zip(*(dataset[index] for index in chosen))
    predictions = model(torch.stack(batch)).argmax(1).tolist()
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (datasets.IMAGENET_DEFAULT_MEAN, datasets.IMAGENET_DEFAULT_STD)
    )
    shown = [(x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy() for x in batch]
    return [(x, classes[label], classes[said]) for x, label, said in zip(shown, labels, predictions)]


def draw(lines: list[dict], predictions: list[tuple[np.ndarray, str, str]], title: str, output: Path) -> None:
    rows = -(-len(predictions) // COLUMNS)
    figure = plt.figure(figsize=(15, max(4.5, 1.55 * rows)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    losses, accuracy = left.subplots(2, 1, sharex=True)
    epochs = [line["epoch"] for line in lines]
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.plot(epochs, [line["train_loss"] for line in lines], label="train")
    losses.plot(epochs, [line["test_loss"] for line in lines], label="val")
    losses.set_ylabel("loss")
    losses.legend(frameon=False)
    accuracy.plot(epochs, [line["test_acc1"] for line in lines], color="tab:green")
    accuracy.set(ylabel="top-1 on val (%)", xlabel="epoch", ylim=(0, 100))
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
    left.suptitle(title)
    grid = right.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (picture, label, said) in zip(grid.flat, predictions):
        axes.imshow(picture, interpolation="nearest")
        right_answer = said == label
        axes.set_title(
            f"{label}" if right_answer else f"{label}, said {said}",
            fontsize=9,
            color="black" if right_answer else "tab:red",
        )
    wrong = sum(label != said for _, label, said in predictions)
    right.suptitle(f"val pictures and what the model says: {len(predictions) - wrong} of {len(predictions)} right")
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="picture.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--data-path", required=True, help="its data set")
    parser.add_argument("--pictures", type=int, default=36)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args(argv)
    log = args.run / "log.txt"
    if not log.is_file():
        raise UserError(f"no run here ({log} is missing): give the --output_dir of a training")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    output = args.output or args.run / "run.png"
    best = max(line["test_acc1"] for line in lines)
    title = f"{args.run.name}: {len(lines)} epochs, best top-1 {best:.1f} %"
    draw(lines, predict(args.run, args.data_path, args.pictures), title, output)
    print(output)


if __name__ == "__main__":
    sys.exit(exit_code("picture.py", main, sys.argv[1:]))
