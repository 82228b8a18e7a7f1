"""The training loss."""

import torchvision_cpu  # noqa: F401  before timm, see there

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
