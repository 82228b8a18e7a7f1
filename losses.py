"""The training loss, and Mixup with CutMix, which change what it is taken of."""

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from training.errors import UserError
from training.options import Options


def build_criterion(*, mixing: bool, smoothing: float) -> nn.Module:
    """Return the cross entropy of logits (B, C).

    Under Mixup or CutMix with soft targets (B, C), which are smoothed already, else with labels (B,).
    """
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
