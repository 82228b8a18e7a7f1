"""What the tests of this folder share: exact results to compare with, and who can run oneDNN."""

import pytest
import torch
import torch.nn.functional as F

from gvt_ops import onednn
from gvt_ops.window_attention import from_windows, real_keys, to_windows

needs_onednn = pytest.mark.skipif(not onednn.AVAILABLE, reason="no oneDNN with AVX-512 on this machine")


def doubled(*tensors):
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def rms_error(value, exact):
    return (value.double() - exact).square().mean().sqrt()


def compiled_graphs(function, *inputs):
    """-> the result of torch.compile(function) without breaks, and the graphs that the compiler was given."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    return torch.compile(function, fullgraph=True, dynamic=False, backend=keep)(*inputs), graphs


def calls(graph, *targets):
    return sum(node.op == "call_function" and node.target in targets for node in graph.graph.nodes)


def reference(qkv, heads, window):
    """attend_in_windows in plain PyTorch: what it must equal. The map's edges cut windows."""
    H, W = qkv.shape[1:3]
    below, right = -H % window, -W % window
    windows = to_windows(F.pad(qkv, (0, 0, 0, right, 0, below)), window, window)
    q, k, v = windows.unflatten(-1, (3, heads, -1)).unbind(-3)  # each (B * windows, N, heads, D)
    real = real_keys(H, W, window, window, device=qkv.device).repeat(qkv.shape[0], 1, 1, 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~real, float("-inf")).softmax(dim=-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2)  # (B * windows, N, C)
    return from_windows(out, window, window, H + below, W + right)[:, :H, :W]
