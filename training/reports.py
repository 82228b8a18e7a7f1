"""Files about predictions: rows for each image, per-class scores, and the confusion matrix."""

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from samplers import eval_indices
from training.errors import UserError
from training.options import Options
from training.outputs import TABLES, check_new, csv_lines, write_file, write_rows
from utils import all_gather, in_main_process, log

MOST_DRAWN = 50  # classes of a confusion matrix that can be read as an image
PAIRS = 20  # shown instead
LONGEST = 30  # characters of a name in a figure
TEXT = dict(fontsize=8, parse_math=False)  # a name may hold a $


# ---------------------------------------------------------------- the record of an evaluation


class EvalRecord:
    """What an evaluation predicts for each image, for --per-class and --predictions; nothing without these."""

    FIELDS = ("path", "label", "prediction", "probability", "top")

    def __init__(self, args: Options):
        self.per_class, self.predictions = (Path(name) if name else None for name in (args.per_class, args.predictions))
        self.shared, self.batches = args.dist_eval, []
        in_main_process(lambda: self.check(args.overwrite))

    def check(self, overwrite: bool) -> None:
        if self.per_class:
            check_new(self.per_class, "--per-class", overwrite=overwrite, suffixes=(".csv",))
            check_new(self.per_class.with_suffix(".png"), "the figure of --per-class", overwrite=overwrite)
            if find_spec("matplotlib") is None:
                raise UserError("matplotlib is missing (--per-class): pip install --requirement requirements-dev.txt")
        if self.predictions:
            check_new(self.predictions, "--predictions", overwrite=overwrite, suffixes=TABLES)
            if self.per_class and self.predictions.absolute() == self.per_class.absolute():
                raise UserError(f"one name for two files ({self.predictions}): give --per-class another")

    def add(self, logits: Tensor, top: Tensor, targets: Tensor) -> None:
        """Keep a batch's predictions: logits (B, classes), the classes of the largest (B, k), targets (B,)."""
        if self.per_class or self.predictions:
            probabilities = logits.softmax(1).gather(1, top)
            self.batches.append((targets.cpu(), top.cpu(), probabilities.cpu()))

    def write(self, dataset: Dataset) -> None:
        """Write the files for a data set whose images were evaluated in the order of eval_indices."""
        if not (self.per_class or self.predictions):
            return
        own = tuple(torch.cat(parts) for parts in zip(*self.batches)) if self.batches else None
        parts = all_gather(own) if self.shared else [own]
        labels, top, probabilities = in_order(parts, len(dataset))
        in_main_process(lambda: self.write_files(dataset, labels.numpy(), top.numpy(), probabilities.numpy()))

    def write_files(self, dataset: Dataset, labels: np.ndarray, top: np.ndarray, probabilities: np.ndarray) -> None:
        if self.predictions:
            rows = prediction_rows(dataset, labels, top, probabilities)
            write_rows(self.predictions, "--predictions", self.FIELDS, rows)
            log(f"predictions of {len(labels)} images: {self.predictions}")
        if self.per_class:
            classes, image = list(dataset.classes), self.per_class.with_suffix(".png")
            table = class_lines(classes, labels, top[:, 0])
            write_file(self.per_class, "--per-class", lambda file: [file.write(line.encode()) for line in table])
            figure = draw_confusion(classes, labels, top[:, 0])
            write_file(image, "--per-class", lambda file: figure.savefig(file, format="png", dpi=110))
            log(f"scores of {len(classes)} classes: {self.per_class}, {image}")


def in_order(parts: Sequence[tuple[Tensor, ...] | None], length: int) -> list[Tensor]:
    """Return the images of all processes in the order of the data set. parts: of each process, in its own order."""
    first, whole = next(part for part in parts if part is not None), []
    for column, like in enumerate(first):
        values = like.new_empty(length, *like.shape[1:])
        for rank, part in enumerate(parts):
            if part is not None:
                values[list(eval_indices(length, rank=rank, world=len(parts)))] = part[column]
        whole.append(values)
    return whole


def ranked(classes: Sequence[str], top: Sequence[int], probabilities: Sequence[float]) -> list[list]:
    """Return [class name, probability] of each of the largest."""
    return [[classes[label], round(float(value), 6)] for label, value in zip(top, probabilities)]


def prediction_rows(dataset: Dataset, labels, top, probabilities) -> Iterator[dict]:
    names = [path for path, _ in dataset.samples] if hasattr(dataset, "samples") else None
    for number, label in enumerate(labels):
        best = ranked(dataset.classes, top[number], probabilities[number])
        row = dict(path=names[number] if names else f"number {number}", label=dataset.classes[label])
        yield row | dict(prediction=best[0][0], probability=best[0][1], top=best)


# ---------------------------------------------------------------- classes


def class_lines(classes: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> Iterator[str]:
    """Yield the CSV of a confusion matrix: a row for each label, with its support and top-1 in percent."""
    fields = ["class", "support", "correct", "top1", *(f"predicted {name}" for name in classes)]

    def rows() -> Iterator[dict]:
        for number, name in enumerate(classes):
            counts = np.bincount(predictions[labels == number], minlength=len(classes))
            support, correct = int(counts.sum()), int(counts[number])
            yield dict(zip(fields, [name, support, correct, top1(correct, support), *counts.tolist()]))

    return csv_lines(fields, rows())


def top1(correct: int, support: int) -> str:
    return f"{100 * correct / support:.3f}" if support else ""


def draw_confusion(classes: Sequence[str], labels: np.ndarray, predictions: np.ndarray):
    """Return a matplotlib figure: the confusion matrix, or the most confused pairs of many classes."""
    from matplotlib.figure import Figure  # not among what the training itself needs

    side = min(16, 4 + 0.3 * len(classes)) if len(classes) <= MOST_DRAWN else 8
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    draw = draw_matrix if len(classes) <= MOST_DRAWN else draw_pairs
    draw(figure, classes, labels, predictions)
    figure.suptitle(f"top-1 {100 * np.mean(labels == predictions):.2f} % of {len(labels)} images", fontsize=10)
    return figure


def draw_matrix(figure, classes: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> None:
    number, names = len(classes), [shortened(name) for name in classes]
    counts = np.bincount(labels * number + predictions, minlength=number**2).reshape(number, number)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes = figure.subplots()
    colors = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(colors, label="share of the label's images", shrink=0.7)
    axes.set_xticks(range(number), names, rotation=90, **TEXT)
    axes.set_yticks(range(number), names, **TEXT)
    axes.set(xlabel="prediction", ylabel="label")
    for row, column in zip(*np.nonzero(counts)):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=color)


def draw_pairs(figure, classes: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> None:
    pairs = most_confused(labels, predictions)
    support, axes = np.bincount(labels, minlength=len(classes)), figure.subplots()
    bars = axes.barh(range(len(pairs)), [number for _, _, number in pairs])
    axes.bar_label(bars, [f"{number} of {support[label]}" for label, _, number in pairs], padding=3, fontsize=8)
    names = [f"{shortened(classes[label])} as {shortened(classes[guess])}" for label, guess, _ in pairs]
    axes.set_yticks(range(len(pairs)), names, **TEXT)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(f"images of the {len(pairs)} most confused pairs of {len(classes)} classes: label as prediction")


def most_confused(labels: np.ndarray, predictions: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (label, prediction, number of images) of the wrong predictions made most often."""
    wrong = labels != predictions
    pairs = Counter(zip(labels[wrong].tolist(), predictions[wrong].tolist()))
    return [(*pair, number) for pair, number in pairs.most_common(PAIRS)]


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
