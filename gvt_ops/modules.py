"""accelerate, and the modules that it puts in the place of plain ones."""

from gvt_ops import attention, onednn
from gvt_ops.torch_private import has_hooks

# isort: split
import os

import timm.layers
import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear through the faster of a CPU's libraries: see gvt_ops/onednn.py."""

    def forward(self, x: Tensor) -> Tensor:
        return onednn.linear(x, self.weight, self.bias)


class Mlp(timm.layers.Mlp):
    """timm's Mlp with GELU fused into the first layer, in chunks that fit the cache. For inference on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if unsupported_reason(self, self.fc1, self.act) is not None:
            return super().forward(x)
        whole = unsupported_reason(self, *self.children()) is not None
        if not whole and (rows := onednn.mlp_chunk(x, self.fc1.weight)):
            parts = [self.forward(part) for part in x.flatten(0, -2).split(rows)]
            return torch.cat(parts).unflatten(0, x.shape[:-1])
        x = onednn.linear_gelu(x, self.fc1.weight, self.fc1.bias, approximate=self.act.approximate)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


def unsupported_reason(mlp: Mlp, *skipped: nn.Module) -> str | None:
    """Return why an MLP must call these modules of it, each with all of its input; None if it may skip their calls."""
    if type(mlp.fc1) is not Linear or type(mlp.act) is not nn.GELU or type(mlp.norm) is not nn.Identity:
        return "a module was replaced"
    if any(has_hooks(module) for module in skipped):
        return "a hook waits for a call"
    return None


ACCELERATED = {nn.Linear: Linear, timm.layers.Mlp: Mlp}
PLAIN = {ours: plain for plain, ours in ACCELERATED.items()}


def accelerate(model: nn.Module, enable: bool = True) -> nn.Module:
    """Run a model by the fastest operators for its device and dtype; enable=False undoes it. Return the same model.

    An accelerated model is for running: training, evaluation, torch.compile. Count, quantize, trace and export the
    plain model: counters, quantization and tracers go by the types of modules. Weights, names of modules, hooks and
    outputs up to rounding stay the same. Call it once the model is built, before DistributedDataParallel and compile;
    again where modules were added.

    What changes is the class of modules: exactly nn.Linear, so that GEMMs on a CPU go through oneDNN where that is
    faster (gvt_ops/onednn.py), and exactly timm's Mlp, so that on a CPU without gradients GELU is fused and the hidden
    layer stays in the cache. And modules with an attribute `accelerated`, the attentions of gvt.py, are told by it:

    - on a CPU, fused attention in half precision with gradients goes through float32, whose backward pass is faster;
    - on a CPU, fused attention in bfloat16 without gradients goes through batched GEMMs, if keys are few and the model
      is compiled or the processor has no AMX;
    - on a GPU with TWINS_WINDOW_KERNEL=1, LSA is one Triton kernel (gvt_ops/window_attention.py).

    With TWINS_ACCELERATE=0 in the environment the model is left, or made, plain.
    """
    enable = enable and os.environ.get("TWINS_ACCELERATE") != "0"
    classes = ACCELERATED if enable else PLAIN
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
        if hasattr(module, "accelerated"):
            module.accelerated = enable
    return model


def describe(model: nn.Module) -> list[str]:
    """Return how a model computes its linear layers and attention and why, in one line each."""
    layers = [module for module in model.modules() if type(module) is Linear]
    told = [module for module in model.modules() if getattr(module, "accelerated", False)]
    if not (layers or told):
        return ["operators: PyTorch's own (not accelerated)"]
    weight = layers[0].weight
    gemm = onednn.unsupported_reason(weight.detach(), weight.detach())
    library = f"PyTorch's ({gemm})" if gemm else f"oneDNN, {onednn.REASON}"
    with torch.enable_grad():
        training = onednn.unsupported_reason(weight.detach(), weight.detach().requires_grad_())
    if training != gemm:
        library += f"; with gradients PyTorch's ({training})"
    lines = [f"{len(layers)} linear layers: {library}"]
    if weight.device.type == "cuda":
        kernel = os.environ.get("TWINS_WINDOW_KERNEL") == "1"
        lsa = "one Triton kernel" if kernel else "copies of windows, TWINS_WINDOW_KERNEL=1 for one Triton kernel"
        return [*lines, f"{len(told)} attentions: PyTorch's fused kernels; LSA through {lsa}"]
    if gemm is not None:
        return [*lines, f"{len(told)} attentions: PyTorch's fused kernel"]
    few = weight.new_empty(1, 1, 1, 1, dtype=torch.bfloat16)
    reason = attention.unsupported_reason(few, few)
    batched = f"bfloat16 without gradients through batched GEMMs{f' if compiled ({reason})' if reason else ''}"
    return [*lines, f"{len(told)} attentions: PyTorch's fused kernel; {batched}"]
