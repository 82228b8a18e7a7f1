"""Linear layers through oneDNN: as near to the exact result as torch's own, differentiable twice, and refused for a
reason.
"""

import contextlib
import copy
import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import gvt
from gvt_ops import onednn

SHAPES = [((2, 5, 6, 64), 256), ((3, 49, 96), 32), ((7, 64), 64), ((1, 64), 5)]
serves = pytest.mark.skipif(
    onednn.refusal(torch.zeros(1, 1), torch.zeros(1, 1)) is not None, reason="no oneDNN with AVX-512 on this machine"
)


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
    own = getattr(onednn, function)
    with torch.no_grad():
        result = own(*given)
        exact = own(*doubled(*given))
        with onednn.by_torch_alone():
            plain = own(*given)
    assert result.shape == plain.shape == (*shape[:-1], out) and result.dtype == dtype and result.is_contiguous()
    assert error(result, exact) <= 2 * error(plain, exact)


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
        assert error(a, c) <= 2 * error(b, c) + 1e-7


def test_second_derivatives():
    given = [x.requires_grad_() for x in tensors((3, 8), 5)]
    second = []
    for function in (onednn.linear, F.linear):
        (first,) = torch.autograd.grad(function(*given).square().sum(), given[1], create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), given[1])[0])
    assert torch.allclose(*second, rtol=1e-5)


def test_derivatives_of_torch_func_and_of_forward_mode():
    torch.manual_seed(0)
    mlp, x, tangent = gvt.Mlp(4, 8, drop=0.0), torch.randn(3, 4), torch.randn(3, 4)
    frozen = gvt.Linear(4, 5).requires_grad_(False)

    def derivatives():
        yield torch.func.jvp(mlp, (x,), (tangent,))[1]
        yield torch.func.hessian(lambda x: mlp(x).square().sum())(x)
        yield torch.func.vmap(torch.func.grad(lambda x: mlp(x).sum()))(x)
        with forward_ad.dual_level():
            yield forward_ad.unpack_dual(frozen(forward_ad.make_dual(x, tangent))).tangent
        given = x.clone().requires_grad_()
        yield torch.autograd.grad(mlp(given), given, torch.ones(2, 3, 4), is_grads_batched=True)[0]

    found = list(derivatives())
    with onednn.by_torch_alone():
        for ours, plain in zip(found, derivatives(), strict=True):
            assert plain.any() and torch.allclose(ours, plain, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_operations_are_counted(grad):
    mlp, x, counts = gvt.Mlp(8, 16, drop=0.0), torch.randn(3, 5, 8), []
    for way in (contextlib.nullcontext, onednn.by_torch_alone):
        with way(), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            result = mlp(x).sum()
            if grad:
                result.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


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


@serves
def test_rows_that_do_not_lie_one_behind_the_other():
    x, weight, bias = tensors((4, 32, 6), 5)
    x, weight = x.transpose(1, 2), tensors((1, 32), 5)[1]
    assert onednn.refusal(x, weight) is None
    assert torch.allclose(onednn.linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-5)


@serves
@pytest.mark.parametrize("grad", [True, False])
def test_compiled_without_a_break(grad):
    given = tensors((2, 7, 16), 24)
    if grad:
        given = [x.requires_grad_() for x in given]
    compiled = torch.compile(onednn.linear, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.allclose(compiled(*given), F.linear(*given), atol=1e-5)


REFUSED = {
    "meta": (dict(device="meta"), {}, "x is on meta"),
    "float64": (dict(dtype=torch.float64), {}, "torch.float64"),
    "two dtypes": ({}, dict(dtype=torch.bfloat16), "torch.float32 and torch.bfloat16"),
    "gradients in bfloat16": (
        dict(dtype=torch.bfloat16, requires_grad=True),
        dict(dtype=torch.bfloat16),
        "gradients of bfloat16",
    ),
}


@serves
@pytest.mark.parametrize(("of_x", "of_weight", "part"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why(of_x, of_weight, part):
    x, weight = (
        torch.zeros(2, 3, **of_x),
        torch.zeros(4, 3, **({"device": of_x.get("device", "cpu"), "dtype": of_x.get("dtype")} | of_weight)),
    )
    assert part in onednn.refusal(x, weight)


@serves
def test_off_and_under_autocast():
    x, weight, _ = tensors((2, 3), 4)
    assert onednn.refusal(x, weight) is None
    with onednn.by_torch_alone():
        assert "is off" in onednn.refusal(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in onednn.refusal(x, weight)
        assert onednn.linear(x, weight).dtype == torch.bfloat16
    assert onednn.refusal(x, weight) is None


def queries_keys_values(batch, heads, queries, keys, dtype=torch.bfloat16):
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, count, heads, 32).to(dtype).transpose(1, 2) for count in (queries, keys, keys))
    return q, k, v, torch.rand(batch, 1, 1, keys) > 0.3


@serves
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"), [(512, 2, 49, 49), (1, 1, 3136, 49), (2, 3, 5, 256), (3, 1, 1, 1)]
)
def test_attention_in_bfloat16(batch, heads, queries, keys, masked):
    """As near to the exact one as torch's own products of this dtype; batches that go in parts lose nothing."""
    *given, mask = queries_keys_values(batch, heads, queries, keys)
    mask = mask | (torch.arange(keys) == 0) if masked else None  # each query has a key
    attend = functools.partial(gvt.attend, mask=mask, dropout=nn.Dropout(0.1).eval())
    with torch.no_grad():
        assert onednn.attention_refusal(*given[:2]) is None
        result = attend(*given, fused=True)
        exact = attend(*doubled(*given), fused=True)
        plain = attend(*given, fused=False)
    assert result.shape == plain.shape and result.dtype == torch.bfloat16
    assert error(result, exact) <= 2 * error(plain, exact)


@serves
def test_one_mask_for_all_rows(monkeypatch):
    q, k, v, mask = queries_keys_values(9, 2, 49, 49)
    attend = functools.partial(gvt.attend, q, k, v, mask[:1], dropout=nn.Dropout(0.0), fused=True)
    with torch.no_grad():
        whole = attend()
        monkeypatch.setattr(onednn, "MOST_WEIGHTS", 4 * 2 * 49 * 49)
        assert onednn.rows_at_once(q, k) == 4
        assert torch.equal(attend(), whole)


@serves
def test_attention_that_is_refused_says_why():
    q, k, v, _ = queries_keys_values(1, 1, 2, 257)
    assert "257 keys" in onednn.attention_refusal(q, k)
    assert "torch.float32" in onednn.attention_refusal(q.float(), k.float())
    assert "gradients" in onednn.attention_refusal(q.requires_grad_(), k[:, :, :9])
    torch.manual_seed(0)
    with torch.no_grad():  # dropout of weights, where nothing asks for gradients
        dropped = gvt.attend(q, k[:, :, :9], v[:, :, :9], None, dropout=nn.Dropout(0.9), fused=True)
        kept = gvt.attend(q, k[:, :, :9], v[:, :, :9], None, dropout=nn.Dropout(0.0), fused=True)
    assert not torch.allclose(dropped, kept, atol=0.1)


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


def test_other_ways_to_watch_the_mlp_are_honoured():
    """Hooks of the backward pass and of all modules, and a function put in the place of forward."""
    torch.manual_seed(0)
    plain, x, seen = gvt.Mlp(8, 16, drop=0.0), torch.randn(2, 8), []
    mlp = copy.deepcopy(plain)
    for module in (mlp.fc1, mlp.act, mlp.fc2):
        module.register_full_backward_hook(lambda *_: seen.append(1))
    mlp(x.clone().requires_grad_()).sum().backward()
    assert len(seen) == 3
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        plain(x)
    finally:
        everywhere.remove()
    assert plain.fc1 in seen and plain.act in seen
    other = copy.deepcopy(plain)
    other.fc1.forward = lambda x: torch.zeros(2, 16)
    assert torch.equal(other(x), other.fc2(torch.zeros(2, 16)))


@serves
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_takes_many_rows_in_parts(dtype, monkeypatch):
    mlp, x, sizes = gvt.Mlp(8, 16, drop=0.0).eval().to(dtype), torch.randn(3, 5, 7, 8).to(dtype), []
    own = onednn.linear_gelu
    monkeypatch.setattr(
        gvt, "linear_gelu", lambda x, *rest, **options: sizes.append(len(x)) or own(x, *rest, **options)
    )
    with torch.no_grad():
        whole = mlp(x)
        monkeypatch.setattr(onednn, "MOST_HIDDEN", 50 * 16 * x.element_size())
        parts = mlp(x)
    assert sizes == [3, 50, 50, 5]
    assert parts.shape == whole.shape and torch.allclose(
        parts, whole, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )
    assert mlp(x).requires_grad and len(sizes) == 5  # with gradients in one go
    calls = []
    mlp.fc2.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    with torch.no_grad():
        mlp(x)
    assert calls == [x.shape]  # a hook sees the whole


@pytest.mark.parametrize("name", ["alt_gvt_demo", "pcpvt_small_v0"])
def test_half_precision_trains_as_torch_alone_does(name):
    """Attention goes through float32 on a CPU, where gradients are wanted: no farther from the exact gradients than in
    bfloat16.
    """
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
