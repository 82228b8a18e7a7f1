"""torch.compile with the settings that suit these models."""

import os
from collections.abc import Callable

import torch
from torch import nn

from gvt_ops.modules import accelerate


def compile(model: nn.Module, *, inference: bool = False, backend: str | Callable = "inductor", **options) -> nn.Module:
    """Return torch.compile(model, dynamic=False), with settings of Inductor that suit (B, H, W, C) maps.

    - Without layout optimization, which makes every 4-D tensor near a convolution channels-last by the number of its
      dimensions: H of a (B, H, W, C) map would be innermost, and LayerNorm and GEMMs would copy it first.
      TORCHINDUCTOR_LAYOUT_OPTIMIZATION=1 in the environment keeps it.
    - inference=True, on a CPU: with freezing, which packs weights for the GEMMs in the first call. Call the model
      without gradients, and compile it again after weights change. An accelerated model is made plain, for packed GEMMs
      take the place of accelerate's. Freezing is on for whatever the process compiles from then on.

    dynamic=False: one graph for each shape of images. options: of torch._inductor.config, for this model.
    """
    if backend != "inductor":
        return torch.compile(model, backend=backend, dynamic=False)
    freezing = freezes(model, inference)
    if freezing:
        from torch._inductor import config  # here: it takes its time

        # Of the process, for the tracer reads it there while it compiles.
        config.freezing = True
        accelerate(model, enable=False)
    options = compile_options(freezing) | options
    return torch.compile(model, backend=backend, dynamic=False, options=options)


def freezes(model: nn.Module, inference: bool) -> bool:
    return inference and next(model.parameters()).device.type == "cpu"


def describe_compiled(model: nn.Module, *, inference: bool, backend: str) -> str:
    """Return which settings `compile` gives to the compiler of a model, in one line."""
    options = compile_options(freezes(model, inference)) if backend == "inductor" else {}
    settings = ", ".join(f"{name} {'on' if value else 'off'}" for name, value in options.items())
    return f"compiled by {backend}: {settings or 'its default settings'}"


def compile_options(freezing: bool) -> dict[str, bool]:
    """Return what compile sets of torch._inductor.config."""
    options = {"freezing": True} if freezing else {}
    if "TORCHINDUCTOR_LAYOUT_OPTIMIZATION" not in os.environ:
        options["layout_optimization"] = False
    return options
