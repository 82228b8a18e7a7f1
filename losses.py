"""The training loss, and Mixup with CutMix, which change what it is taken of."""

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import csv
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from training.errors import UserError
from training.options import Options


class WeightedCrossEntropy(nn.Module):
    """The mean over images of - sum_c w_c t_c log p_c, for --class-weights w (C,).

    t (B, C) are Mixup's targets, smoothed already, in which each class has its own share; or they are made of labels
    (B,). Unlike torch's, the mean for labels does not depend on which classes a batch has.
    """

    def __init__(self, weights: Tensor, smoothing: float):
        super().__init__()
        self.register_buffer("weights", weights)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.ndim == 1:
            classes = logits.shape[1]
            targets = F.one_hot(targets, classes) * (1 - self.smoothing) + self.smoothing / classes
        return -(self.weights * targets * logits.float().log_softmax(1)).sum(1).mean()


def class_weights(source: str, classes: Sequence[str], labels: Sequence[int]) -> Tensor | None:
    """Return the weight of each class for --class-weights, None without; raise UserError for a file that lacks one.

    balanced: in inverse proportion to a class's images; the mean over all images is 1. Else a CSV of class,weight.
    """
    if not source:
        return None
    if source == "balanced":
        counts = torch.bincount(torch.as_tensor(labels), minlength=len(classes))
        return torch.where(counts > 0, len(labels) / ((counts > 0).sum() * counts.clamp(min=1)), 0.0)
    weights = dict(read_weights(source))
    if lacking := [name for name in classes if name not in weights]:
        raise UserError(f"no weight of {lacking[0]} (--class-weights {source}): give one for each class")
    if unknown := sorted(weights.keys() - set(classes)):
        raise UserError(f"a weight of no class ({source}, {unknown[0]}): remove it")
    return torch.tensor([weights[name] for name in classes], dtype=torch.float32)


def read_weights(source: str) -> list[tuple[str, float]]:
    """Return class and weight of each row."""
    try:
        rows = list(csv.reader(Path(source).read_text().splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read (--class-weights {source}): {error}") from None
    if not rows or rows[0] != ["class", "weight"]:
        raise UserError(f"no weights (--class-weights {source}): expected the header class,weight, or balanced")
    found = []
    for number, row in enumerate(rows[1:], start=2):
        try:
            name, weight = row[0], float(row[1])
        except (ValueError, IndexError):
            weight = math.nan
        if len(row) != 2 or not 0 <= weight < math.inf or name in dict(found):
            raise UserError(
                f"not a class and its weight ({source}, line {number}): expected NAME,NUMBER, each name once"
            )
        found.append((name, weight))
    return found


def class_weights_recipe(source: str) -> dict[str, str]:
    """Return what a run's recipe says of --class-weights FILE: its content, wherever it is."""
    if source in ("", "balanced"):
        return {}
    digest = hashlib.sha256(repr(sorted(read_weights(source))).encode()).hexdigest()
    return {"class_weights": f"file {digest[:16]}"}


def build_criterion(*, mixing: bool, smoothing: float, weights: Tensor | None = None) -> nn.Module:
    """Return the cross entropy of logits (B, C), of which each class has its weight if `weights` (C,) are given.

    Under Mixup or CutMix with soft targets (B, C), which are smoothed already, else with labels (B,).
    """
    if weights is not None:
        return WeightedCrossEntropy(weights, smoothing)
    if mixing:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=smoothing) if smoothing else nn.CrossEntropyLoss()


def build_mixup(args: Options, num_classes: int) -> Mixup | None:
    """Return what mixes images (B, 3, H, W) and labels (B,), B even, into soft targets (B, C), or None."""
    if not args.mixing:
        return None
    if args.batch_size % 2:
        what = f"an odd batch with Mixup (--batch-size {args.batch_size})"
        raise UserError(f"{what}: make it even, or pass --mixup 0 --cutmix 0")
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
