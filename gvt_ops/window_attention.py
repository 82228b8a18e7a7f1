"""Attention inside windows on a GPU, from qkv as its projection writes it to what the next projection reads, in one
pass over memory.

No copies into windows and back, no padding, no mask in memory. What else there is, and why it cannot do that:
- SDPA's backends, flash-attention and xFormers attend along one axis of tokens: windows have to be copied into rows of
  a batch, or one after another into one long sequence, and back; and flash attention takes no mask for the map's edges.
- FlexAttention has the same one axis, and skips keys by blocks (128 unless told), which a row of windows across a map
  does not fall into.
- NATTEN works on maps, and with its stride equal to its window it is this attention where windows fit the map. It
  copies q, k and v apart first (`.contiguous()`), refuses windows larger than the map, moves those at the edges inwards
  instead of cutting them off, and comes compiled for one torch and one CUDA.
"""

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor

# A window's keys and values have to lie in one tile.
MOST_TOKENS = 256
MOST_CHANNELS = 64
MOST_MEMORY = (
    160 * 1024
)  # bytes of shared memory, enough for both; 99 KiB, the least from capability 8.0 on, for half as large a tile
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON = importlib.util.find_spec("triton") is not None
WANTED = os.environ.get("TWINS_WINDOW_KERNEL", "1") != "0"


def why_not(x: Tensor, *, heads: int, window: int, dropout: float) -> str | None:
    """None where attend_in_windows can take the projection of the map x, (B, H, W, C), else the reason. dropout: of the
    weights, now.

    It has no second derivatives, which nothing shows in advance: asking for them raises.
    """
    tokens, channels = window**2, x.shape[-1] // heads
    if not WANTED:
        return "TWINS_WINDOW_KERNEL=0 is set"
    if not TRITON:
        return "Triton is not installed"
    if not x.is_cuda:
        return "the map is not on a CUDA device"
    if x.dtype not in DTYPES:
        return "the map is none of float32, float16, bfloat16"
    if dropout > 0:
        return "the kernel drops no weights"
    if tokens > MOST_TOKENS:
        return f"a window has {tokens} tokens, the kernel takes {MOST_TOKENS}"
    if channels > MOST_CHANNELS:
        return f"a head has {channels} channels, the kernel takes {MOST_CHANNELS}"
    memory = shared_memory(x.device.index)
    if not memory:
        return "the kernel is made for NVIDIA's devices of compute capability 8.0 and above"
    if tokens > 128 and channels > 32 and memory < MOST_MEMORY:
        large = f"windows of {tokens} tokens with {channels} channels"
        return f"{large} need a device with {MOST_MEMORY} bytes of shared memory"
    return None


@torch.compiler.assume_constant_result  # for torch.compile, which knows no device properties
def shared_memory(index: int) -> int:
    """Bytes of it that a program may have on a CUDA device, 0 on one that the kernel is not made for."""
    device = torch.cuda.get_device_properties(index)
    return device.shared_memory_per_block_optin if torch.version.hip is None and device.major >= 8 else 0


def reference(qkv: Tensor, heads: int, window: int) -> Tensor:
    """attend_in_windows in plain PyTorch: what it must equal."""
    H, W = qkv.shape[1:3]
    beyond = (0, 0, 0, -W % window, 0, -H % window)
    q, k, v = (
        in_windows(F.pad(qkv, beyond), window).unflatten(-1, (3, heads, -1)).unbind(-3)
    )  # each (B, rows, columns, N, heads, D)
    real = in_windows(
        F.pad(torch.ones_like(qkv[..., :1], dtype=torch.bool), beyond), window
    )  # (B, rows, columns, N, 1)
    scores = torch.einsum("brcqhd,brckhd->brcqkh", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~real.unsqueeze(3), float("-inf")).softmax(dim=4)
    out = torch.einsum("brcqkh,brckhd->brcqhd", weights, v).flatten(-2)  # (B, rows, columns, N, C)
    return out.unflatten(3, (window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :H, :W]


def in_windows(x: Tensor, side: int) -> Tensor:
    """(B, H, W, C) -> (B, H / side, W / side, side * side, C)."""
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(3, 4)


@torch.library.custom_op("twins::attend_in_windows", mutates_args=())
def attend_in_windows(qkv: Tensor, heads: int, window: int) -> Tensor:
    """(B, H, W, 3 * C) -> (B, H, W, C): attention inside windows of window x window tokens. The map's edges cut
    windows.

    qkv holds [3, heads, D] for each token. In its dtype, with sums in float32.
    """
    from gvt_ops import window_kernel

    out = like(qkv, qkv.shape[-1] // 3)
    window_kernel.launch(window_kernel.forward, qkv.contiguous(), out, heads=heads, window=window)
    return out


@torch.library.custom_op("twins::attend_in_windows_backward", mutates_args=())
def attend_in_windows_backward(grad: Tensor, qkv: Tensor, heads: int, window: int) -> Tensor:
    """The gradient of qkv, as qkv is laid out."""
    from gvt_ops import window_kernel

    grad_qkv = like(qkv, qkv.shape[-1])
    window_kernel.launch(
        window_kernel.backward, grad.contiguous(), qkv.contiguous(), grad_qkv, heads=heads, window=window
    )
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
