"""Linear layers, and attention in bfloat16, on a CPU through oneDNN.

torch gives products of float32 to MKL, which on an AMD EPYC (Zen 5) reached half of oneDNN's rate with an error of the
same size. Batched products of bfloat16 do go to oneDNN, but torch's fused attention has its own, several times as slow
where keys are few. Where oneDNN cannot serve, or is not wanted, a refusal says why and torch's own F.linear or
F.scaled_dot_product_attention is taken, the references.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

# torch's compiler emits this operator too, but does so by itself for half precision only.
_OPERATOR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_SERVES = (
    _OPERATOR is not None
    and torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
)
_wanted = True
MOST_KEYS = 256  # of attention through products, whose weights lie in memory
MOST_WEIGHTS = 2**20  # at once: 4 MiB of float32
MOST_HIDDEN = 2**24  # bytes of an MLP's hidden layer at once


@contextlib.contextmanager
def by_torch_alone() -> Iterator[None]:
    """F.linear everywhere: what to compare with."""
    global _wanted
    before, _wanted = _wanted, False
    try:
        yield
    finally:
        _wanted = before


def refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why oneDNN is not taken for this product, as a sentence; None where it is."""
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, oneDNN is for CPUs"
    if not _wanted:
        return "it is off (by_torch_alone)"
    if not _SERVES:
        return "this torch has no oneDNN for processors with AVX-512"
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != x.dtype:
        return f"x and weight are {x.dtype} and {weight.dtype}: both must be float32 or bfloat16"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtype of F.linear"
    if x.dtype == torch.bfloat16 and needs_gradient(x, weight):
        return "gradients of bfloat16 are no faster"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "an exported program is for any machine"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "the operator has no rules for torch.func and forward derivatives"
    return None


def unfit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether F.linear has something to say about the shapes or the bias, or there is nothing to multiply."""
    other = bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1])
    return other or x.shape[-1:] != weight.shape[1:] or x.numel() == 0


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out) -> (..., out), as F.linear."""
    if refusal(x, weight) is not None or unfit(x, weight, bias):
        return F.linear(x, weight, bias)
    return _product(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """F.gelu of linear, in one go where no gradient is needed. approximate: as F.gelu's."""
    if refusal(x, weight) is not None or unfit(x, weight, bias) or needs_gradient(x, weight, bias):
        return F.gelu(linear(x, weight, bias), approximate=approximate)
    return _product(x, weight, bias, "gelu", approximate)


def rows_of_mlp(x: Tensor, weight: Tensor) -> int | None:
    """How many rows of x an MLP with this first layer should take at once; None for all.

    What the layer makes of more would leave the cache, and the C library takes a block above 32 MiB from the kernel
    anew, page by page.
    """
    if refusal(x, weight) is not None or needs_gradient(x, weight) or torch.compiler.is_compiling():
        return None
    rows = max(1, MOST_HIDDEN // (weight.shape[0] * weight.element_size()))
    return rows if x.numel() > rows * x.shape[-1] else None


def attention_refusal(q: Tensor, k: Tensor) -> str | None:
    """As refusal, for attention below."""
    if q.dtype != torch.bfloat16:
        return f"q is {q.dtype}: fused attention is as fast but in bfloat16"
    if k.shape[-2] > MOST_KEYS:
        return f"{k.shape[-2]} keys: the map of weights is large, products are for {MOST_KEYS}"
    return refusal(q, k)


def rows_at_once(q: Tensor, k: Tensor) -> int:
    """Of the batch, for attention below: so many that their weights stay in the cache. A compiler fuses what goes over
    them.
    """
    return (
        q.shape[0] if torch.compiler.is_compiling() else max(1, MOST_WEIGHTS // (q.shape[1] * q.shape[2] * k.shape[2]))
    )


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """F.scaled_dot_product_attention, where attention_refusal is None. q k^T is rounded to bfloat16, as where it is not
    fused.
    """
    scores = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(q.dtype) @ v


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, after: str = "none", algorithm: str = "") -> Tensor:
    direct = not torch.compiler.is_compiling() and not needs_gradient(x, weight, bias)
    return (_run if direct else torch.ops.twins.linear)(x, weight, bias, after, algorithm)


# ---------------------------------------------------------------- the operator, for autograd and for the compiler
# The compiler keeps its own use of torch's operator to itself: with weights that it has laid out before.


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, after: str, algorithm: str) -> Tensor:
    return _OPERATOR(x, weight, bias, after, [], algorithm)


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, after: str, algorithm: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, *_ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = linear(grad, weight.t())
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[1]:
        # The same sums either way; oneDNN is faster where the rows of its result are the longer side.
        wide = grad.shape[1] > x.shape[1]
        of_weight = linear(x.t(), grad.t()).t() if wide else linear(grad.t(), x.t())
    if ctx.needs_input_grad[2]:
        of_bias = grad.sum(0)
    return of_x, of_weight, of_bias, None, None


def _operations(x: torch.Size, weight: torch.Size, *others, out_shape: torch.Size, **options) -> int:
    """Two a multiply-add, as FlopCounterMode counts those of torch's own products."""
    return 2 * x.numel() * weight[0]


_LIBRARY = torch.library.Library("twins", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, str after, str algorithm) -> Tensor")
_LIBRARY.impl("linear", _run, "CPU")
torch.library.register_fake("twins::linear", _shape, lib=_LIBRARY)
torch.library.register_autograd("twins::linear", _backward, setup_context=_save, lib=_LIBRARY)
register_flop_formula([torch.ops.twins.linear, *([_OPERATOR] if _OPERATOR is not None else [])])(_operations)
