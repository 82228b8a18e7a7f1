"""Linear layers on a CPU through oneDNN.

torch gives GEMMs of float32 to MKL. On an AMD EPYC (Zen 5) oneDNN was twice as fast with an error of the same size. On
an Intel Xeon (Sapphire Rapids) it was 0.93 to 1.2 times as fast with 8 images, 0.8 to 1.1 times with one, and 1.1 to
1.8 times with GELU, which oneDNN fuses: taking it for all linear layers costs at most 6 % of their time there, and pays
with 8 images (logs/benchmarks/2026-11-28_intel_linear_layers). python -m tools.linear_layers times both on this
machine. A whole step of training was 1.04 (PCPVT-S) and 1.1 times (SVT-S) as fast through MKL on the Intel processor.
unsupported_reason says why oneDNN is not used for a layer; F.linear, the reference, is used then.
"""

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gvt_ops.torch_private import LINEAR_POINTWISE, in_transform

AVAILABLE = (
    LINEAR_POINTWISE is not None
    and torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
)
REASON = "timed as fast as MKL or faster for 8 images on Intel and AMD (python -m tools.linear_layers)"
CPUINFO = Path("/proc/cpuinfo")
PROCESSOR = CPUINFO.read_text() if CPUINFO.exists() else platform.processor()
ON_INTEL, WITH_AMX = "GenuineIntel" in PROCESSOR, "amx_bf16" in PROCESSOR
MAX_HIDDEN = 2**24  # bytes of an MLP's hidden layer at once


def unsupported_reason(x: Tensor, weight: Tensor) -> str | None:
    """Return why oneDNN does not compute this GEMM, or None if it does."""
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, oneDNN is for CPUs"
    if not AVAILABLE:
        return "this torch has no oneDNN for processors with AVX-512"
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != x.dtype:
        return f"x and weight are {x.dtype} and {weight.dtype}: both must be float32 or bfloat16"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtype of F.linear"
    if x.dtype == torch.bfloat16 and needs_gradient(x, weight):
        return "gradients of bfloat16 are no faster"
    if ON_INTEL and needs_gradient(x, weight):
        return "gradients of float32 are faster through MKL on Intel"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "an exported program is for any machine"
    if in_transform():
        return "the operator has no rules for torch.func and forward-mode differentiation"
    return None


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out) -> (..., out), as F.linear."""
    if unsupported_reason(x, weight) is not None or not _fits(x, weight, bias):
        return F.linear(x, weight, bias)
    return _gemm(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """F.gelu of linear, fused where no gradient is needed. approximate: as F.gelu's."""
    if needs_gradient(x, weight, bias) or unsupported_reason(x, weight) is not None or not _fits(x, weight, bias):
        return F.gelu(linear(x, weight, bias), approximate=approximate)
    return _gemm(x, weight, bias, "gelu", approximate)


def mlp_chunk(x: Tensor, weight: Tensor) -> int | None:
    """Return how many rows of x an MLP with this first layer should take at once, or None for all.

    The hidden layer of more rows would leave the cache, and the C library asks the kernel for a block above 32 MiB
    each time, page by page.
    """
    if torch.compiler.is_compiling() or unsupported_reason(x, weight) is not None or needs_gradient(x, weight):
        return None
    rows = max(1, MAX_HIDDEN // (weight.shape[0] * weight.element_size()))
    return rows if x.numel() > rows * x.shape[-1] else None


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return False if there is nothing to multiply, or an error that F.linear should raise."""
    wrong = bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1])
    return not wrong and x.shape[-1:] == weight.shape[1:] and x.numel() > 0


def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None, after: str = "none", algorithm: str = "") -> Tensor:
    direct = not torch.compiler.is_compiling() and not needs_gradient(x, weight, bias)
    return (_run if direct else torch.ops.twins.linear)(x, weight, bias, after, algorithm)


# ---------------------------------------------------------------- the operator, for autograd and for the compiler
# The compiler keeps torch's operator to itself: its own use of it has weights in another layout.


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, after: str, algorithm: str) -> Tensor:
    return LINEAR_POINTWISE(x, weight, bias, after, [], algorithm)


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, after: str, algorithm: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, *_ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = linear(grad, weight.t())
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[1]:
        # The same sums either way; oneDNN is faster where the rows of its result are the longer side.
        wide = grad.shape[1] > x.shape[1]
        grad_weight = linear(x.t(), grad.t()).t() if wide else linear(grad.t(), x.t())
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0)
    return grad_x, grad_weight, grad_bias, None, None


def _operations(x: torch.Size, weight: torch.Size, *others, out_shape: torch.Size, **options) -> int:
    """Two a multiply-add, as FlopCounterMode counts those of torch's own GEMMs."""
    return 2 * x.numel() * weight[0]


_LIBRARY = torch.library.Library("twins", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, str after, str algorithm) -> Tensor")
_LIBRARY.impl("linear", _run, "CPU")
torch.library.register_fake("twins::linear", _shape, lib=_LIBRARY)
torch.library.register_autograd("twins::linear", _backward, setup_context=_save, lib=_LIBRARY)
register_flop_formula([torch.ops.twins.linear, *([LINEAR_POINTWISE] if LINEAR_POINTWISE is not None else [])])(
    _operations
)
