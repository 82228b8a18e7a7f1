"""Linear layers through oneDNN: as near to the exact result as torch's own, differentiable twice, and refused for a reason."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import gvt
import products

SHAPES = [((2, 5, 6, 64), 256), ((3, 49, 96), 32), ((7, 64), 64), ((1, 64), 5)]
serves = pytest.mark.skipif(products.refusal(torch.zeros(1, 1), torch.zeros(1, 1)) is not None, reason="no oneDNN with AVX-512 on this machine")


def tensors(shape, out, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, dtype=dtype), torch.randn(out, shape[-1], dtype=dtype)
    return x, weight, torch.randn(out, dtype=dtype) if bias else None


def error(value, exact):
    return (value.double() - exact).square().mean().sqrt()


def doubled(*tensors):
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "out"), SHAPES)
@pytest.mark.parametrize("function", ["linear", "linear_gelu"])
def test_as_near_to_the_exact_result_as_torch(function, shape, out, dtype, bias):
    given = tensors(shape, out, dtype, bias)
    own = getattr(products, function)
    with torch.no_grad():
        result = own(*given)
        exact = own(*doubled(*given))
        with products.by_torch_alone():
            plain = own(*given)
    assert result.shape == plain.shape == (*shape[:-1], out) and result.dtype == dtype and result.is_contiguous()
    assert error(result, exact) <= 2 * error(plain, exact)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_gradients_are_as_near_too(shape, out, bias):
    given = [x.requires_grad_() for x in tensors(shape, out, bias=bias) if x is not None]
    grad = torch.randn(*shape[:-1], out)
    found = torch.autograd.grad(products.linear(*given), given, grad)
    plain = torch.autograd.grad(F.linear(*given), given, grad)
    precise = doubled(*given)
    exact = torch.autograd.grad(F.linear(*precise), precise, grad.double())
    for a, b, c in zip(found, plain, exact, strict=True):
        assert a.shape == c.shape
        assert error(a, c) <= 2 * error(b, c) + 1e-7


def test_second_derivatives():
    given = [x.requires_grad_() for x in tensors((3, 8), 5)]
    second = []
    for function in (products.linear, F.linear):
        (first,) = torch.autograd.grad(function(*given).square().sum(), given[1], create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), given[1])[0])
    assert torch.allclose(*second, rtol=1e-5)


def test_only_the_gradients_that_are_asked_for():
    x, weight, bias = tensors((3, 8), 5)
    (grad,) = torch.autograd.grad(products.linear(x, weight, bias.requires_grad_()).sum(), [bias])
    assert torch.equal(grad, torch.full((5,), 3.0))


@serves
def test_rows_that_do_not_lie_one_behind_the_other():
    x, weight, bias = tensors((4, 32, 6), 5)
    x, weight = x.transpose(1, 2), tensors((1, 32), 5)[1]
    assert products.refusal(x, weight) is None
    assert torch.allclose(products.linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-5)


@serves
@pytest.mark.parametrize("grad", [True, False])
def test_compiled_without_a_break(grad):
    given = tensors((2, 7, 16), 24)
    if grad:
        given = [x.requires_grad_() for x in given]
    compiled = torch.compile(products.linear, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.allclose(compiled(*given), F.linear(*given), atol=1e-5)


REFUSED = {
    "meta": (dict(device="meta"), {}, "x is on meta"),
    "float64": (dict(dtype=torch.float64), {}, "torch.float64"),
    "two dtypes": ({}, dict(dtype=torch.bfloat16), "torch.float32 and torch.bfloat16"),
    "gradients in bfloat16": (dict(dtype=torch.bfloat16, requires_grad=True), dict(dtype=torch.bfloat16), "gradients of bfloat16"),
}


@serves
@pytest.mark.parametrize(("of_x", "of_weight", "part"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why(of_x, of_weight, part):
    x, weight = torch.zeros(2, 3, **of_x), torch.zeros(4, 3, **({"device": of_x.get("device", "cpu"), "dtype": of_x.get("dtype")} | of_weight))
    assert part in products.refusal(x, weight)


@serves
def test_off_and_under_autocast():
    x, weight, _ = tensors((2, 3), 4)
    assert products.refusal(x, weight) is None
    with products.by_torch_alone():
        assert "is off" in products.refusal(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in products.refusal(x, weight)
        assert products.linear(x, weight).dtype == torch.bfloat16
    assert products.refusal(x, weight) is None


def test_hooks_and_other_modules_in_the_mlp_are_honoured():
    """The fused way would go past a hook on fc1 or act, and past what took their place."""
    mlp, x, seen = gvt.Mlp(8, 16, drop=0.0).eval(), torch.randn(2, 8), []
    with torch.inference_mode():
        plain = mlp(x)
        for module in (mlp.fc1, mlp.act):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        assert torch.allclose(mlp(x), plain, atol=1e-6) and len(seen) == 2
        assert torch.equal(F.gelu(seen[0]), seen[1])
        other = copy.deepcopy(mlp)
        other.act = nn.ReLU()
        assert torch.equal(other(x), other.fc2(F.relu(other.fc1(x))))


@pytest.mark.parametrize("name", ["alt_gvt_demo", "pcpvt_small_v0"])
def test_half_precision_trains_as_torch_alone_does(name):
    """Attention goes through float32 on a CPU, where gradients are wanted: no farther from the exact gradients than in bfloat16."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])

    def gradients(model, x, dtype):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            F.cross_entropy(model(x), labels).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact = gradients(copy.deepcopy(model).double(), x.double(), torch.float64)
    fused = gradients(model, x, torch.bfloat16)
    model.set_fused_attn(False)
    assert error(fused, exact) <= 2 * error(gradients(model, x, torch.bfloat16), exact)
