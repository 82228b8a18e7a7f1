"""The training loss."""

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn


def build_criterion(*, mixing: bool, smoothing: float) -> nn.Module:
    """Cross entropy of logits (B, C): under Mixup or CutMix with soft targets (B, C), which smooth by themselves, else
    with labels (B,).
    """
    if mixing:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=smoothing) if smoothing else nn.CrossEntropyLoss()
