"""The dtypes and the memory format that a run computes in."""

import torch
from torch import Tensor, nn

import gvt
from training.errors import UserError
from training.options import Options


def amp_dtype(args: Options, device: torch.device) -> torch.dtype:
    return getattr(torch, args.amp_dtype or ("float16" if device.type == "cuda" else "float32"))


def memory_format(args: Options) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def precision_kwargs(args: Options, device: torch.device) -> dict:
    return dict(amp_dtype=amp_dtype(args, device), memory_format=memory_format(args))


def autocast_residuals(model: nn.Module) -> None:
    """Give the sums x + f(x) of each stage the dtype of autocast, from its PEG on, as timm's Twins has it.

    The official code keeps them in float32, the dtype of LayerNorm's outputs under autocast on a GPU: twice the memory
    traffic, and gradients closer to those in float64.
    """
    if not isinstance(model, gvt.Twins):
        raise UserError("only models of gvt.py have a PEG (--residual-dtype autocast): omit it")
    for module in model.modules():
        if isinstance(module, gvt.PEG):
            module.register_forward_hook(to_autocast_dtype)


def to_autocast_dtype(module: nn.Module, inputs: tuple, x: Tensor) -> Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
