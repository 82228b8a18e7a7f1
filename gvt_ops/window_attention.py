"""Attention inside windows (LSA): a map is padded and cut into windows, or one Triton kernel keeps it in place.

The kernel goes from qkv as its projection writes it to what the next projection reads, in one pass over memory: no
copies into windows and back, no padding, no mask in memory. What else there is, and why it cannot do that:
- SDPA's backends, flash-attention and xFormers attend along one axis of tokens: windows have to be copied into rows of
  a batch, or one after another into one long sequence, and back; and flash attention takes no mask for the map's edges.
- FlexAttention has the same one axis, and skips keys by blocks (128 unless told), which a row of windows across a map
  does not fall into.
- NATTEN works on maps, and with its stride equal to its window it is this attention where windows fit the map. It
  copies q, k and v apart first (`.contiguous()`), refuses windows larger than the map, moves those at the edges inwards
  instead of cutting them off, and comes compiled for one torch and one CUDA.

Shapes: B images; a map of H x W tokens, (B, H, W, C); windows of h x w tokens.
"""

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvt_ops.attention import attention

# ---------------------------------------------------------------- what a model calls


def pad_to_windows(
    x: Tensor, *, window: int, pad: str, heads: int, dropout: nn.Dropout, fused: bool, accelerated: bool
) -> Tensor:
    """(B, H, W, C) -> (B * windows, h * w, C), with zeros on the right and below where windows do not fit the map.

    Where the kernel is used, the map as it is, (B, H, W, C), with those zeros only if they are keys. pad: see
    gvt.LocalAttention. The others are those of window_attention.
    """
    H, W = x.shape[1:3]
    if has_symbolic_sides(H, W):
        return to_symbolic_windows(x, window)
    rate = dropout.p if dropout.training else 0.0
    kernel = accelerated and fused and unsupported_reason(x, heads=heads, window=window, dropout=rate) is None
    h, w, below, right, masked = layout(H, W, window, pad)
    if (below or right) and not (kernel and masked):
        x = F.pad(x, (0, 0, 0, right, 0, below))
    return x if kernel else to_windows(x, h, w)


def window_attention(
    qkv: Tensor,
    shape: tuple[int, ...],
    *,
    window: int,
    pad: str,
    heads: int,
    dropout: nn.Dropout,
    fused: bool,
    accelerated: bool,
) -> Tensor:
    """Attend inside windows: the projection of what pad_to_windows made of a map, and its shape -> (B, H, W, C).

    qkv holds [3, heads, D] for each token. dropout, fused, accelerated: see attention.
    """
    B, H, W, C = shape
    if has_symbolic_sides(H, W):
        options = dict(dropout=dropout, fused=fused, accelerated=accelerated)
        return attend_in_symbolic_windows(qkv, shape, window=window, pad=pad, heads=heads, **options)
    if qkv.dim() == 4:
        return attend_in_windows(qkv, heads, window)[:, :H, :W]
    h, w, below, right, masked = layout(H, W, window, pad)
    mask = None
    if masked and (below or right):
        mask = real_keys(H, W, h, w, device=qkv.device).repeat(B, 1, 1, 1)  # (B * windows, 1, 1, h * w)
    # Windows are rows of the batch, because fused kernels take 4-D tensors: each is (B * windows, heads, h * w, D).
    q, k, v = qkv.reshape(-1, h * w, 3, heads, C // heads).permute(2, 0, 3, 1, 4).unbind(0)
    x = attention(q, k, v, mask, dropout=dropout, fused=fused, accelerated=accelerated)
    x = from_windows(x.transpose(1, 2).flatten(2), h, w, H + below, W + right)
    return x[:, :H, :W] if below or right else x


def layout(H: int, W: int, window: int, pad: str) -> tuple[int, int, int, int, bool]:
    """Return the sides h and w of a window, the padding below and on the right, and True if padding is masked."""
    h = w = window
    below, right = -H % h, -W % w
    masked = bool(below or right) if pad == "mask" else bool(below and right) and pad == "published"
    if masked:
        # Along a side that is shorter than a window, all padding is masked: a shorter window gives the same without it.
        h, w = min(h, H), min(w, W)
        below, right = -H % h, -W % w
    return h, w, below, right, masked


def to_windows(x: Tensor, h: int, w: int) -> Tensor:
    """(B, H, W, C) -> (B * H/h * W/w, h * w, C), windows row by row. H and W must be multiples of h and w."""
    B, H, W, C = x.shape
    return x.reshape(B, H // h, h, W // w, w, C).transpose(2, 3).reshape(-1, h * w, C)


def from_windows(x: Tensor, h: int, w: int, H: int, W: int) -> Tensor:
    """(B * H/h * W/w, h * w, C) -> (B, H, W, C), the inverse of to_windows."""
    C = x.shape[-1]
    return x.reshape(-1, H // h, W // w, h, w, C).transpose(2, 3).reshape(-1, H, W, C)


def real_keys(H: int, W: int, h: int, w: int, *, device: torch.device) -> Tensor:
    """-> (windows, 1, 1, h * w), True for the tokens of an H x W map, False for the padding to its right and below."""
    real = torch.ones(1, H, W, 1, dtype=torch.bool, device=device)
    real = F.pad(real, (0, 0, 0, -W % w, 0, -H % h), value=False)
    return to_windows(real, h, w).reshape(-1, 1, 1, h * w)


# ---------------------------------------------------------------- export with sizes that vary

# The same without a branch on sizes, each of which torch.export would turn into a limit of the exported program: always
# padded, always masked. Copies are explicit, because a reshape asks whether one is needed.


def has_symbolic_sides(*sides: int) -> bool:
    """Return True while torch.export traces a map whose sides vary."""
    return torch.compiler.is_exporting() and any(isinstance(side, torch.SymInt) for side in sides)


def to_symbolic_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, window * window, C), with zeros on the right and below."""
    H, W = x.shape[1:3]
    rows, columns = (H + window - 1) // window, (W + window - 1) // window
    x = F.pad(x, (0, 0, 0, columns * window - W, 0, rows * window - H))
    x = x.unflatten(2, (columns, window)).unflatten(1, (rows, window)).transpose(2, 3)
    return x.clone(memory_format=torch.contiguous_format).flatten(3, 4).flatten(0, 2)


def attend_in_symbolic_windows(
    qkv: Tensor, shape: tuple[int, ...], *, window: int, pad: str, heads: int, **options
) -> Tensor:
    """window_attention of what to_symbolic_windows made of a map; options: of attention."""
    B, H, W, C = shape
    if pad == "published":
        raise ValueError("pad='published' masks some sizes only: export it with fixed sizes")
    rows, columns = (H + window - 1) // window, (W + window - 1) // window
    mask = None
    if pad == "mask":
        mask = to_symbolic_windows(qkv.new_ones((B, H, W, 1), dtype=torch.bool), window).unsqueeze(1).transpose(2, 3)
    q, k, v = qkv.unflatten(2, (3, heads, C // heads)).permute(2, 0, 3, 1, 4).unbind(0)
    x = attention(q, k, v, mask, **options).transpose(1, 2).flatten(2)
    x = x.unflatten(0, (B, rows, columns)).unflatten(3, (window, window)).transpose(2, 3)
    x = x.clone(memory_format=torch.contiguous_format).flatten(3, 4).flatten(1, 2)
    return F.pad(x, (0, 0, 0, W - columns * window, 0, H - rows * window))  # negative: cuts the padding off


# ---------------------------------------------------------------- the kernel

MAX_TOKENS = 256  # a window's keys and values have to lie in one tile
MAX_CHANNELS = 64
# Bytes of shared memory that serve both; 99 KiB, the least from capability 8.0 on, serve half as large a tile.
MAX_MEMORY = 160 * 1024
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON = importlib.util.find_spec("triton") is not None
WANTED = os.environ.get("TWINS_WINDOW_KERNEL") == "1"  # off, because no GPU has shown yet that it is faster


def unsupported_reason(x: Tensor, *, heads: int, window: int, dropout: float) -> str | None:
    """Return why attend_in_windows cannot take the projection of the map x, (B, H, W, C), or None if it can.

    dropout: the rate of dropped weights. It has no second derivatives, which nothing shows in advance: asking for them
    raises.
    """
    tokens, channels = window**2, x.shape[-1] // heads
    if not WANTED:
        return "TWINS_WINDOW_KERNEL=1 is not set"
    if not TRITON:
        return "Triton is not installed"
    if not x.is_cuda:
        return "the map is not on a CUDA device"
    if x.dtype not in DTYPES:
        return "the map is none of float32, float16, bfloat16"
    if dropout > 0:
        return "the kernel drops no weights"
    if tokens > MAX_TOKENS:
        return f"a window has {tokens} tokens, the kernel takes {MAX_TOKENS}"
    if channels > MAX_CHANNELS:
        return f"a head has {channels} channels, the kernel takes {MAX_CHANNELS}"
    if window * x.shape[2] * 3 * x.shape[-1] >= 2**31:
        return f"a row of windows is too large ({x.shape[2]} tokens wide): the kernel counts inside it in 32 bits"
    memory = shared_memory(x.device.index)
    if not memory:
        return "the kernel is made for NVIDIA's devices of compute capability 8.0 and above"
    if tokens > 128 and channels > 32 and memory < MAX_MEMORY:
        large = f"windows of {tokens} tokens with {channels} channels"
        return f"{large} need a device with {MAX_MEMORY} bytes of shared memory"
    return None


@torch.compiler.assume_constant_result  # for torch.compile, which knows no device properties
def shared_memory(index: int) -> int:
    """Return the bytes that a program may have on a CUDA device, 0 on one that the kernel is not made for."""
    device = torch.cuda.get_device_properties(index)
    return device.shared_memory_per_block_optin if torch.version.hip is None and device.major >= 8 else 0


@torch.library.custom_op("twins::attend_in_windows", mutates_args=())
def attend_in_windows(qkv: Tensor, heads: int, window: int) -> Tensor:
    """(B, H, W, 3 * C) -> (B, H, W, C): attend inside windows of window x window tokens, which the map's edges cut.

    qkv holds [3, heads, D] for each token. In its dtype, with sums in float32.
    """
    from gvt_ops import window_kernel

    out = like(qkv, qkv.shape[-1] // 3)
    window_kernel.launch(window_kernel.forward, qkv.contiguous(), out, heads=heads, window=window)
    return out


@torch.library.custom_op("twins::attend_in_windows_backward", mutates_args=())
def attend_in_windows_backward(grad: Tensor, qkv: Tensor, heads: int, window: int) -> Tensor:
    """Return the gradient of qkv, as qkv is laid out."""
    from gvt_ops import window_kernel

    grad_qkv = like(qkv, qkv.shape[-1])
    maps = grad.contiguous(), qkv.contiguous(), grad_qkv
    window_kernel.launch(window_kernel.backward, *maps, heads=heads, window=window)
    return grad_qkv


def like(x: Tensor, channels: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], channels))


def keep_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    qkv, ctx.heads, ctx.window = inputs
    ctx.save_for_backward(qkv)


def differentiate(ctx, grad: Tensor) -> tuple:
    return attend_in_windows_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.window), None, None


attend_in_windows.register_fake(lambda qkv, heads, window: like(qkv, qkv.shape[-1] // 3))
attend_in_windows_backward.register_fake(lambda grad, qkv, heads, window: like(qkv, qkv.shape[-1]))
attend_in_windows.register_autograd(differentiate, setup_context=keep_for_backward)
