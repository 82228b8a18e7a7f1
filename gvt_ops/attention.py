"""softmax(q k^T / sqrt(D)) v as PyTorch computes it, fused or not, and the ways of an accelerated model on a CPU.

Shapes: B images or windows, N queries, M keys, D channels of a head.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvt_ops import onednn

MAX_BATCH = 65_535  # of a fused CUDA kernel, whose grid ends there; 1,024 images of 224 pixels have more windows
MAX_KEYS = 256  # of attention through GEMMs, which keeps its weights in memory
MAX_WEIGHTS = 2**20  # of them at once: 4 MiB of float32


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    dropout: nn.Dropout,
    fused: bool,
    accelerated: bool = False,
) -> Tensor:
    """q (B, heads, N, D), k and v (B, heads, M, D) -> (B, heads, N, D).

    mask: broadcasts to (B, heads, N, M), True where a query may see a key. dropout: of the weights; unfused, they go
    through this module, where a forward hook sees them. accelerated: see gvt_ops.accelerate.
    """
    if not fused:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return dropout(scores.softmax(dim=-1)) @ v
    options = dict(dropout=dropout, fused=True, accelerated=accelerated)
    chunk = max_batch(q, k, accelerated=accelerated)
    if chunk is not None and q.shape[0] > chunk:
        masks = itertools.repeat(None) if mask is None else mask.expand(q.shape[0], -1, -1, -1).split(chunk)
        parts = zip(*(x.split(chunk) for x in (q, k, v)), masks)
        return torch.cat([attention(*part, **options) for part in parts])
    half = q.dtype in (torch.bfloat16, torch.float16)
    if accelerated and half and q.device.type == "cpu" and torch.is_grad_enabled():
        # The backward pass of the CPU's fused kernel takes several times as long in half precision as in float32.
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), mask, **options).to(q.dtype)
    rate = dropout.p if dropout.training else 0.0
    if accelerated and not rate and unsupported_reason(q, k) is None:
        return gemm_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)


def max_batch(q: Tensor, k: Tensor, *, accelerated: bool) -> int | None:
    """Return how many of a batch one call of fused attention should take, or None for all.

    CUDA's limit is one of correctness. Through GEMMs, as many as have weights that stay in the cache; a compiler fuses
    what goes over them.
    """
    if q.is_cuda:
        return MAX_BATCH
    if accelerated and not torch.compiler.is_compiling() and unsupported_reason(q, k) is None:
        return max(1, MAX_WEIGHTS // (q.shape[1] * q.shape[2] * k.shape[2]))
    return None


def unsupported_reason(q: Tensor, k: Tensor) -> str | None:
    """Return why gemm_attention does not compute this, or None if it does."""
    if q.dtype != torch.bfloat16:
        return f"q is {q.dtype}: fused attention is as fast but in bfloat16"
    if onednn.WITH_AMX and not torch.compiler.is_compiling():  # a compiler fuses what is between the GEMMs
        return "fused attention is faster on processors with AMX, which its kernel uses"
    if k.shape[-2] > MAX_KEYS:
        return f"{k.shape[-2]} keys: the map of weights is large, GEMMs are for {MAX_KEYS}"
    return onednn.unsupported_reason(q, k)


def gemm_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """F.scaled_dot_product_attention by two batched GEMMs. q k^T is rounded to bfloat16, as in unfused attention.

    torch gives GEMMs of bfloat16 to oneDNN, but its fused attention has a kernel of its own, several times as slow
    where keys are few on a processor without AMX (AMD EPYC, Zen 5). With AMX (Intel Xeon, Sapphire Rapids) the fused
    kernel makes whole forward passes 1.04 to 1.2 times as fast as GEMMs do.
    """
    scores = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(q.dtype) @ v
