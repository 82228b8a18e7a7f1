"""The kernels of window attention: equal to plain PyTorch, forward and backward, on a GPU or (test_window_attention.py)
in Triton's interpreter.
"""

import itertools
import os

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import golden_images, golden_weights
from exact import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from gvt_ops import accelerate, window_attention
from gvt_ops.window_attention import (
    attend_in_windows,
    attend_in_windows_backward,
    from_windows,
    real_keys,
    to_windows,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip(
        "no CUDA device: test_window_attention.py runs this file in Triton's interpreter",
        allow_module_level=True,
    )

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16]
if not INTERPRETED:
    DTYPES.append(torch.bfloat16)  # whose GEMMs the interpreter gets wrong


def by_sdpa(qkv, heads, side):
    """The same by PyTorch's fused attention, with copies into windows and back and a mask."""
    B, H, W, _ = qkv.shape
    below, right = -H % side, -W % side
    windows = to_windows(F.pad(qkv, (0, 0, 0, right, 0, below)), side, side)
    q, k, v = windows.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mask = real_keys(H, W, side, side, device=qkv.device).repeat(B, 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return from_windows(out.transpose(1, 2).flatten(2), side, side, H + below, W + right)[:, :H, :W]


def run(attention, qkv, grad, *sizes):
    """-> the output and the gradient of qkv, in float64."""
    qkv = qkv.detach().clone().requires_grad_()
    out = attention(qkv, *sizes)
    out.backward(grad)
    return out.detach().double(), qkv.grad.double()


def assert_no_worse_than_sdpa(B, H, W, heads, D, window, dtype):
    """Root mean square errors, for the largest one alone is a matter of luck, at most twice those of PyTorch's own in
    the same dtype.
    """
    torch.manual_seed(B + H + W + D + window)
    qkv = torch.randn(B, H, W, 3 * heads * D, device=DEVICE).to(dtype)
    grad = torch.randn(B, H, W, heads * D, device=DEVICE).to(dtype)
    exact = run(reference, qkv.double(), grad.double(), heads, window)
    for mine, torchs, truth in zip(
        run(attend_in_windows, qkv, grad, heads, window), run(by_sdpa, qkv, grad, heads, window), exact
    ):
        assert mine.shape == truth.shape
        assert (mine - truth).norm() <= 2 * (torchs - truth).norm()


MAPS = {4: (2, 8, 6), 7: (2, 14, 9), 14: (1, 16, 14)}
HEADS = {16: 3, 32: 2, 64: 1}
# One size of head for each window in the everyday tests, all with all in the slow ones.
GRID = [
    pytest.param(w, D, marks=[] if pair in zip(MAPS, HEADS) else pytest.mark.slow)
    for pair in itertools.product(MAPS, HEADS)
    for w, D in [pair]
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "D"), GRID)
def test_errors_are_at_most_twice_those_of_sdpa(window, D, dtype):
    assert_no_worse_than_sdpa(*MAPS[window], HEADS[D], D, window, dtype)


@pytest.mark.parametrize(("H", "W"), [(7, 7), (3, 20), (1, 1), (13, 8)])
def test_whole_windows_and_cut_ones_and_maps_smaller_than_one(H, W):
    assert_no_worse_than_sdpa(1, H, W, 2, 32, 7, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 3, 16])
def test_the_smallest_windows_and_the_largest(window):
    assert_no_worse_than_sdpa(1, 4, 17, 1, 16, window, torch.float32)


@pytest.mark.parametrize("D", [24, 40])
def test_heads_that_are_no_power_of_two(D):
    assert_no_worse_than_sdpa(1, 9, 7, 2, D, 7, torch.float16)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    *(st.integers(1, 2), st.integers(1, 12), st.integers(1, 18), st.integers(1, 2)),
    *(st.integers(4, 64), st.integers(4, 16), st.sampled_from(DTYPES)),
)
def test_any_size(B, H, W, heads, D, window, dtype):
    assert_no_worse_than_sdpa(B, H, W, heads, D, window, dtype)


def test_what_is_not_contiguous_is_taken():
    qkv, grad = torch.randn(1, 48, 8, 7, device=DEVICE), torch.randn(1, 16, 8, 7, device=DEVICE)
    qkv, grad = qkv.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    expected = run(attend_in_windows, qkv.contiguous(), grad.contiguous(), 1, 7)
    for got, wanted in zip(run(attend_in_windows, qkv, grad, 1, 7), expected):
        assert torch.equal(got, wanted)
    assert torch.isfinite(run(attend_in_windows, qkv, grad[:1, :1, :1, :1].expand_as(grad), 1, 7)[1]).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's numpy, which sees the NaNs too
def test_every_number_is_written_and_none_beyond():
    """Among numbers that are not finite: nothing of a neighbor's window, head or image is read, and nothing is left
    as it was.
    """
    qkv = torch.randn(2, 9, 8, 3, 2, 16, device=DEVICE)
    others = torch.full_like(qkv, float("nan"))
    others[1, 7:, :7, :, 1] = qkv[
        1, 7:, :7, :, 1
    ]  # the window below on the left, cut after two rows: 14 tokens of one head
    out = attend_in_windows(others.flatten(3), 2, 7).unflatten(-1, (2, 16))
    assert torch.equal(out[1, 7:, :7, 1], attend_in_windows(qkv.flatten(3), 2, 7).unflatten(-1, (2, 16))[1, 7:, :7, 1])
    assert out.isfinite().sum() == 14 * 16
    grad_qkv = attend_in_windows_backward(torch.ones_like(out).flatten(3), others.flatten(3), 2, 7)
    assert grad_qkv.isfinite().sum() == 3 * 14 * 16


def test_the_operators_are_registered_as_torch_wants_them():
    qkv, grad = torch.randn(1, 4, 3, 48, device=DEVICE), torch.randn(1, 4, 3, 16, device=DEVICE)
    torch.library.opcheck(attend_in_windows, (qkv.clone().requires_grad_(), 1, 4))
    torch.library.opcheck(attend_in_windows_backward, (grad, qkv, 1, 4))


def test_a_second_derivative_is_refused():
    qkv = torch.randn(1, 4, 4, 48, device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad(attend_in_windows(qkv, 1, 4).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="attend_in_windows_backward"):
        first.sum().backward()


def take_the_kernel(monkeypatch):
    """Take the kernel wherever fused attention is asked for. -> a list that grows with each call."""
    seen = []
    monkeypatch.setattr(window_attention, "unsupported_reason", lambda x, **sizes: None)
    monkeypatch.setattr(
        window_attention,
        "attend_in_windows",
        lambda *inputs: seen.append(inputs[0].shape) or attend_in_windows(*inputs),
    )
    return seen


@pytest.mark.parametrize(
    "pad", ["mask", pytest.param("zero", marks=pytest.mark.slow), pytest.param("published", marks=pytest.mark.slow)]
)
def test_a_model_gives_the_same_as_without(pad, monkeypatch):
    """Logits and gradients in float32, against float64; all windows of a stage are cut somewhere."""
    model, x = (
        accelerate(golden_weights(timm.create_model("alt_gvt_demo", num_classes=5, pad=pad))).to(DEVICE),
        golden_images(1, 72, 100).to(DEVICE),
    )

    def logits_and_gradients():
        model.zero_grad()
        logits = model(x.to(model.head.weight.dtype))
        logits.square().sum().backward()
        return torch.cat([logits.detach().flatten().double(), *(p.grad.flatten().double() for p in model.parameters())])

    monkeypatch.setattr(window_attention, "unsupported_reason", lambda x, **sizes: "to compare")
    exact = logits_and_gradients()
    model.float()
    plain = logits_and_gradients()
    seen = take_the_kernel(monkeypatch)
    assert (logits_and_gradients() - exact).norm() <= 2 * (plain - exact).norm()
    assert len(seen) == 4
    model.set_fused_attn(False)
    logits_and_gradients()
    assert len(seen) == 4


@pytest.mark.slow
def test_a_compiled_model_holds_the_kernel(monkeypatch):
    model, x = (
        accelerate(timm.create_model("alt_gvt_demo", num_classes=5)).to(DEVICE),
        torch.randn(1, 3, 40, 32, device=DEVICE),
    )
    take_the_kernel(monkeypatch)
    a, b = model(x), torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)(x)
    assert torch.allclose(a, b, atol=1e-5)
    for ours, theirs in zip(
        *(torch.autograd.grad(logits.square().sum(), list(model.parameters())) for logits in (a, b))
    ):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_an_exported_model_holds_the_kernel(monkeypatch):
    model, x = (
        accelerate(timm.create_model("alt_gvt_demo", num_classes=5)).to(DEVICE).eval(),
        torch.randn(2, 3, 40, 32, device=DEVICE),
    )
    monkeypatch.setattr(window_attention, "unsupported_reason", lambda x, **sizes: None)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert sum(node.target == torch.ops.twins.attend_in_windows.default for node in program.graph.nodes) == 4
    with torch.no_grad():
        assert torch.allclose(program.module()(x[:1]), model(x[:1]), atol=1e-5)
