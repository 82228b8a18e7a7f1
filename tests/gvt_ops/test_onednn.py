"""Linear layers through oneDNN: as near to the exact result as torch's own, differentiable twice, and unsupported for a
reason.
"""

import pytest
import torch
import torch.nn.functional as F
from exact import calls, compiled_graphs, doubled, needs_onednn, rms_error

from gvt_ops import onednn


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    """One on which gradients go through oneDNN too."""
    monkeypatch.setattr(onednn, "ON_INTEL", False)


SHAPES = [((2, 5, 6, 64), 256), ((3, 49, 96), 32), ((7, 64), 64), ((1, 64), 5)]


def tensors(shape, out, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, dtype=dtype), torch.randn(out, shape[-1], dtype=dtype)
    return x, weight, torch.randn(out, dtype=dtype) if bias else None


BY_TORCH = {"linear": F.linear, "linear_gelu": lambda *given: F.gelu(F.linear(*given))}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "out"), SHAPES)
@pytest.mark.parametrize("function", ["linear", "linear_gelu"])
def test_as_near_to_the_exact_result_as_torch(function, shape, out, dtype, bias):
    given = tensors(shape, out, dtype, bias)
    ours, by_torch = getattr(onednn, function), BY_TORCH[function]
    with torch.no_grad():
        result, plain = ours(*given), by_torch(*given)
        exact = by_torch(*doubled(*given))
    assert result.shape == plain.shape == (*shape[:-1], out) and result.dtype == dtype and result.is_contiguous()
    assert rms_error(result, exact) <= 2 * rms_error(plain, exact)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_gradients_are_as_near_too(shape, out, bias):
    given = [x.requires_grad_() for x in tensors(shape, out, bias=bias) if x is not None]
    grad = torch.randn(*shape[:-1], out)
    found = torch.autograd.grad(onednn.linear(*given), given, grad)
    plain = torch.autograd.grad(F.linear(*given), given, grad)
    precise = doubled(*given)
    exact = torch.autograd.grad(F.linear(*precise), precise, grad.double())
    for a, b, c in zip(found, plain, exact, strict=True):
        assert a.shape == c.shape
        assert rms_error(a, c) <= 2 * rms_error(b, c) + 1e-7


def test_second_derivatives():
    given = [x.requires_grad_() for x in tensors((3, 8), 5)]
    second = []
    for function in (onednn.linear, F.linear):
        (first,) = torch.autograd.grad(function(*given).square().sum(), given[1], create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), given[1])[0])
    assert torch.allclose(*second, rtol=1e-5)


def test_what_does_not_fit_is_said_by_torch():
    x, weight, bias = tensors((3, 8), 5)
    for function in (onednn.linear, onednn.linear_gelu):
        with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
            function(x[:, :7], weight, bias)
        with torch.no_grad(), pytest.raises(RuntimeError, match="bias|same dtype|expand|size"):
            function(x, weight, bias[:4])


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8)])
def test_one_row_and_none(shape):
    x, weight, bias = (
        torch.randn(shape, requires_grad=True),
        *(each.requires_grad_() for each in tensors((1, 8), 5)[1:]),
    )
    result = onednn.linear(x, weight, bias)
    result.sum().backward()
    assert result.shape == (*shape[:-1], 5) and x.grad.shape == shape and weight.grad.shape == (5, 8)


def test_only_the_gradients_that_are_asked_for():
    x, weight, bias = tensors((3, 8), 5)
    (grad,) = torch.autograd.grad(onednn.linear(x, weight, bias.requires_grad_()).sum(), [bias])
    assert torch.equal(grad, torch.full((5,), 3.0))


@needs_onednn
def test_rows_that_do_not_lie_one_behind_the_other():
    x, weight, bias = tensors((4, 32, 6), 5)
    x, weight = x.transpose(1, 2), tensors((1, 32), 5)[1]
    assert onednn.unsupported_reason(x, weight) is None
    assert torch.allclose(onednn.linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("grad", [True, False])
def test_compiled_without_a_break(grad):
    given = tensors((2, 7, 16), 24)
    if grad:
        given = [x.requires_grad_() for x in given]
    compiled = torch.compile(onednn.linear, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.allclose(compiled(*given), F.linear(*given), atol=1e-5)
    (graph,) = compiled_graphs(onednn.linear, *given)[1]
    assert calls(graph, torch.ops.twins.linear) == 1


UNSUPPORTED = {
    "meta": (dict(device="meta"), {}, "x is on meta"),
    "float64": (dict(dtype=torch.float64), {}, "torch.float64"),
    "two dtypes": ({}, dict(dtype=torch.bfloat16), "torch.float32 and torch.bfloat16"),
    "gradients in bfloat16": (
        dict(dtype=torch.bfloat16, requires_grad=True),
        dict(dtype=torch.bfloat16),
        "gradients of bfloat16",
    ),
}


@needs_onednn
@pytest.mark.parametrize(("of_x", "of_weight", "part"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_unsupported_says_why(of_x, of_weight, part):
    x, weight = (
        torch.zeros(2, 3, **of_x),
        torch.zeros(4, 3, **({"device": of_x.get("device", "cpu"), "dtype": of_x.get("dtype")} | of_weight)),
    )
    assert part in onednn.unsupported_reason(x, weight)


@needs_onednn
def test_gradients_of_float32_on_intel(monkeypatch):
    monkeypatch.setattr(onednn, "ON_INTEL", True)
    x, weight, bias = (each.requires_grad_() for each in tensors((2, 3), 4))
    assert onednn.unsupported_reason(x, weight) == "gradients of float32 are faster through MKL on Intel"
    assert "Addmm" in type(onednn.linear(x, weight, bias).grad_fn).__name__  # F.linear's
    with torch.no_grad():
        assert onednn.unsupported_reason(x, weight) is None


@needs_onednn
def test_under_autocast():
    x, weight, _ = tensors((2, 3), 4)
    assert onednn.unsupported_reason(x, weight) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in onednn.unsupported_reason(x, weight)
        assert onednn.linear(x, weight).dtype == torch.bfloat16
    assert onednn.unsupported_reason(x, weight) is None
