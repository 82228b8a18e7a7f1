"""The Triton kernels behind window_attention.py, which imports this file where it launches them: CPU builds of torch
bring no Triton.

One program computes one head of one window. All its keys and values, at most 256 of each, lie in one tile, so that no
pass needs a running softmax: the backward pass computes the weights again from q and k, and nothing but qkv is kept for
it. A program alone writes what it writes: no atomic additions, the same bits each time.

Shapes: maps of H x W tokens. qkv and its gradient hold q, k and v of every head for each token, [3, heads, D]; out and
its gradient [heads, D].
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def window_at(H, W, heads, WINDOW: tl.constexpr):
    """The first token of this program's window, its place in (B * H * W) -> with the rows and columns from it to the
    map's edges.

    In 64 bits, for a batch of maps may hold more than 2^31 numbers; places inside a window are counted from it in 32.
    """
    window, columns = tl.program_id(0) // heads, tl.cdiv(W, WINDOW)
    windows = tl.cdiv(H, WINDOW) * columns
    row, column = window % windows // columns * WINDOW, window % columns * WINDOW
    return ((window // windows).to(tl.int64) * H + row) * W + column, H - row, W - column


@triton.jit
def tokens(first, COUNT: tl.constexpr, rows, columns, W, WINDOW: tl.constexpr):
    """Tokens first to first + COUNT of a window, row by row -> their places from its first, and which the map has."""
    index = first + tl.arange(0, COUNT)
    row, column = index // WINDOW, index % WINDOW
    return row * W + column, (index < WINDOW * WINDOW) & (row < rows) & (column < columns)


@triton.jit
def head_at(x, start, part, parts: tl.constexpr, heads, D: tl.constexpr):
    """Where (B * H * W, parts, heads, D) holds this program's head of `part` for the window's first token."""
    return x + start * (parts * heads * D) + (part * heads + tl.program_id(0) % heads) * D


@triton.jit
def places(token, real, parts: tl.constexpr, heads, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets from head_at and mask, (tokens, CHANNELS)."""
    channel = tl.arange(0, CHANNELS)
    return token[:, None] * (parts * heads * D) + channel[None, :], real[:, None] & (channel < D)[None, :]


@triton.jit
def read(x, start, token, real, part, parts: tl.constexpr, heads, D: tl.constexpr, CHANNELS: tl.constexpr):
    offsets, mask = places(token, real, parts, heads, D, CHANNELS)
    return tl.load(head_at(x, start, part, parts, heads, D) + offsets, mask=mask, other=0.0)


@triton.jit
def write(x, value, start, token, real, part, parts: tl.constexpr, heads, D: tl.constexpr, CHANNELS: tl.constexpr):
    offsets, mask = places(token, real, parts, heads, D, CHANNELS)
    tl.store(head_at(x, start, part, parts, heads, D) + offsets, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def exponentials(q, k, seen, scale, PRECISION: tl.constexpr):
    """softmax(scale * q k^T) over the keys that may be seen, of which each window has one at least, times the sums that
    are returned beside it. In float32.

    Whoever divides by the sums does so where there are fewer numbers.
    """
    scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
    scale *= LOG2_E
    weights = tl.exp2(scores * scale - (tl.max(scores, 1) * scale)[:, None])
    return weights, tl.sum(weights, 1)


@triton.jit(do_not_specialize=["H", "W", "heads"])
def forward(
    qkv, out, H, W, heads, scale, WINDOW: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, rows, columns = window_at(H, W, heads, WINDOW)
    key, seen = tokens(0, KEYS, rows, columns, W, WINDOW)
    k = read(qkv, start, key, seen, 1, 3, heads, D, CHANNELS)
    v = read(qkv, start, key, seen, 2, 3, heads, D, CHANNELS)
    for first in range(0, WINDOW * WINDOW, QUERIES):
        query, real = tokens(first, QUERIES, rows, columns, W, WINDOW)
        q = read(qkv, start, query, real, 0, 3, heads, D, CHANNELS)
        weights, sums = exponentials(q, k, seen, scale, PRECISION)
        value = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) * (1 / sums)[:, None]
        write(out, value, start, query, real, 0, 1, heads, D, CHANNELS)


@triton.jit(do_not_specialize=["H", "W", "heads"])
def backward(
    grad, qkv, grad_qkv, H, W, heads, scale, WINDOW: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    CHANNELS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, rows, columns = window_at(H, W, heads, WINDOW)
    key, seen = tokens(0, KEYS, rows, columns, W, WINDOW)
    k = read(qkv, start, key, seen, 1, 3, heads, D, CHANNELS)
    v = read(qkv, start, key, seen, 2, 3, heads, D, CHANNELS)
    grad_k = tl.zeros((KEYS, CHANNELS), tl.float32)
    grad_v = tl.zeros((KEYS, CHANNELS), tl.float32)
    for first in range(0, WINDOW * WINDOW, QUERIES):
        query, real = tokens(first, QUERIES, rows, columns, W, WINDOW)
        q = read(qkv, start, query, real, 0, 3, heads, D, CHANNELS)
        g = read(grad, start, query, real, 0, 1, heads, D, CHANNELS)
        weights, sums = exponentials(q, k, seen, scale, PRECISION)
        # The scale with the sums: scores' gradients then need neither.
        g = (g * (scale / sums)[:, None]).to(g.dtype)
        grad_v += tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision=PRECISION)
        grad_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        mean = tl.sum(weights * grad_weights, 1) / sums
        grad_scores = (weights * (grad_weights - mean[:, None])).to(q.dtype)
        grad_q = tl.dot(grad_scores, k, input_precision=PRECISION)
        write(grad_qkv, grad_q, start, query, real, 0, 3, heads, D, CHANNELS)
        grad_k += tl.dot(tl.trans(grad_scores), q, input_precision=PRECISION)
    write(grad_qkv, grad_k, start, key, seen, 1, 3, heads, D, CHANNELS)
    write(grad_qkv, grad_v * (1 / scale), start, key, seen, 2, 3, heads, D, CHANNELS)


# For windows of up to 64 tokens, and for larger ones: how many warps a program may get. The first choice serves where
# no clock may choose. One stage: with the next queries already on their way, large windows would not fit into shared
# memory.
CONFIGS = {
    large: [triton.Config({}, num_warps=n, num_stages=1) for n in warps]
    for large, warps in ((False, (4, 2, 1, 8)), (True, (8, 16)))
}
TUNED = {
    (kernel, large): triton.autotune(configs, key=["KEYS", "CHANNELS"])(kernel)
    for kernel in (forward, backward)
    for large, configs in CONFIGS.items()
}


def sizes(*, heads: int, window: int, channels: int) -> dict:
    """What a kernel is compiled for, beside the dtype. channels: those of qkv. A tile's sides are powers of two, for
    tl.dot 16 at least.
    """
    D, keys = channels // (3 * heads), max(16, triton.next_power_of_2(window**2))
    tile = dict(KEYS=keys, CHANNELS=max(16, triton.next_power_of_2(D)), QUERIES=min(keys, 4096 // keys))
    # Of float32; the others have one only.
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return dict(WINDOW=window, D=D, PRECISION=precision, **tile)


def launch(kernel, *tensors: Tensor, heads: int, window: int) -> None:
    """Run `kernel` on contiguous maps. The last tensor is written, the last but one is qkv."""
    B, H, W, channels = tensors[-2].shape
    size = sizes(heads=heads, window=window, channels=channels)
    large = size["KEYS"] > 64
    if torch.are_deterministic_algorithms_enabled() or not tensors[-1].is_cuda:
        size |= CONFIGS[large][0].all_kwargs()  # another number of warps adds in another order
    else:
        kernel = TUNED[kernel, large]
    programs = B * triton.cdiv(H, window) * triton.cdiv(W, window) * heads
    with torch.cuda.device_of(tensors[-1]):
        kernel[(programs,)](*tensors, H, W, heads, size["D"] ** -0.5, **size)
