"""The training loss."""

from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn


def build_criterion(*, mixing: bool, smoothing: float) -> nn.Module:
    """Cross entropy of logits (B, classes): with soft targets (B, classes) under Mixup or CutMix, which smooth by themselves, else with labels (B,)."""
    if mixing:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=smoothing) if smoothing else nn.CrossEntropyLoss()
