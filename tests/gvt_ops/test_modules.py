"""accelerate: what it swaps, what survives it, what it leaves alone; and the modules that it puts in."""

import copy
import io
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from exact import calls, compiled_graphs, needs_onednn
from timm.layers import Mlp
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import gvt
from gvt_ops import accelerate, describe, modules, onednn

NAMES = ["alt_gvt_demo", "pcpvt_small_v0"]
X = torch.sin(torch.arange(2 * 3 * 64 * 72).float()).reshape(2, 3, 64, 72)


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    """One on which gradients go through oneDNN too."""
    monkeypatch.setattr(onednn, "ON_INTEL", False)


def build(name="alt_gvt_demo"):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).eval()


def types(model):
    return {name: type(module) for name, module in model.named_modules()}


def is_accelerated(model):
    found = list(model.modules())
    attentions = [module for module in found if isinstance(module, (gvt.LocalAttention, gvt.GlobalAttention))]
    ours = [type(module) in (modules.Linear, modules.Mlp) for module in found if isinstance(module, (nn.Linear, Mlp))]
    told = [module.accelerated for module in attentions]
    assert len({*ours, *told}) == 1
    return told[0]


# ---------------------------------------------------------------- accelerate


@pytest.mark.parametrize("name", NAMES)
def test_it_swaps_classes_and_back(name):
    model = build(name)
    before, state, order = types(model), copy.deepcopy(model.state_dict()), [id(each) for each in model.modules()]
    with torch.inference_mode():
        plain = model(X)
        assert not is_accelerated(model)
        assert accelerate(model) is model and is_accelerated(model)
        once = types(model)
        fast = model(X)
        assert types(accelerate(model)) == once  # twice is as once
        assert torch.equal(model(X), fast) and torch.allclose(fast, plain, atol=1e-5)
        assert [id(each) for each in model.modules()] == order
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert accelerate(model, enable=False) is model and types(model) == before and not is_accelerated(model)
        assert torch.equal(model(X), plain)


def test_only_exact_types_are_swapped():
    class Other(nn.Linear):
        pass

    model = nn.Sequential(Other(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2), Mlp(4, 8))
    accelerate(model)
    assert [type(each) for each in model] == [Other, modules.Linear, nn.MultiheadAttention, modules.Mlp]
    assert type(model[2].out_proj) is not modules.Linear


@pytest.mark.parametrize("value", ["0", "1", None])
def test_the_switch(value, monkeypatch):
    """TWINS_ACCELERATE=0 leaves a model plain, and makes plain one that was accelerated."""
    model = accelerate(build())
    if value is not None:
        monkeypatch.setenv("TWINS_ACCELERATE", value)
    assert is_accelerated(accelerate(model)) == is_accelerated(accelerate(build())) == (value != "0")


def test_a_copy_is_accelerated_too():
    model = accelerate(build())
    other = copy.deepcopy(model)
    assert is_accelerated(other)
    with torch.inference_mode():
        expected = model(X)
        assert torch.equal(other(X), expected)
        accelerate(other, enable=False)
        assert is_accelerated(model) and torch.equal(model(X), expected)


def test_a_saved_model_is_accelerated_in_a_new_process(tmp_path):
    model = accelerate(build())
    with torch.inference_mode():
        torch.save((model, X, model(X)), tmp_path / "model.pt")
    program = "import torch; model, x, expected = torch.load('model.pt', weights_only=False); "
    program += "from gvt_ops import modules; assert type(model.blocks[0][0].attn.qkv) is modules.Linear; "
    program += "print(torch.allclose(model(x), expected, atol=1e-5))"
    command = dict(args=[sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    result = subprocess.run(**command, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert result.stdout == "True\n", result.stderr


def test_weights_go_either_way():
    plain, fast = build(), accelerate(timm.create_model("alt_gvt_demo", num_classes=5)).eval()
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    fast.load_state_dict(torch.load(file, weights_only=True))
    plain.load_state_dict(fast.state_dict())
    with torch.inference_mode():
        assert torch.allclose(plain(X), fast(X), atol=1e-5)


def test_other_dtypes_are_computed_as_before():
    model = build()
    with torch.inference_mode():
        plain = model.to(torch.float64)(X.double())
        assert torch.equal(accelerate(model)(X.double()), plain)
        assert torch.allclose(model.to(torch.float32)(X), plain.float(), atol=1e-5)


def test_hooks_stay():
    model, seen = build(), []
    names = ["blocks.0.0.attn.qkv", "blocks.1.1.mlp", "blocks.2.0.mlp.act", "head"]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.inference_mode():
        accelerate(model)(X)
        accelerate(model, enable=False)(X)
    assert seen == names * 2


def test_the_plain_model_is_exported_and_traced_after_undoing():
    model = build()
    with torch.no_grad():
        expected = model(X)
        accelerate(accelerate(model), enable=False)
        assert torch.equal(torch.export.export(model, (X,)).module()(X), expected)
        assert torch.equal(torch.fx.symbolic_trace(model)(X), expected)


@needs_onednn
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_holds_onednn_in_every_linear_layer(name, grad):
    model = accelerate(build(name))
    layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert name != "alt_gvt_demo" or layers == 37
    with torch.set_grad_enabled(grad):
        result, (graph,) = compiled_graphs(model, X)
        assert torch.allclose(result, accelerate(model, enable=False)(X), atol=1e-5)
    assert calls(graph, torch.ops.twins.linear) == layers
    assert calls(graph, F.linear, torch._C._nn.linear) == 0


# ---------------------------------------------------------------- the linear layer and the MLP


def test_derivatives_of_torch_func_and_of_forward_mode():
    torch.manual_seed(0)
    mlp, x, tangent = accelerate(Mlp(4, 8)), torch.randn(3, 4), torch.randn(3, 4)
    frozen = accelerate(nn.Linear(4, 5)).requires_grad_(False)

    def derivatives():
        yield torch.func.jvp(mlp, (x,), (tangent,))[1]
        yield torch.func.hessian(lambda x: mlp(x).square().sum())(x)
        yield torch.func.vmap(torch.func.grad(lambda x: mlp(x).sum()))(x)
        with forward_ad.dual_level():
            yield forward_ad.unpack_dual(frozen(forward_ad.make_dual(x, tangent))).tangent
        given = x.clone().requires_grad_()
        yield torch.autograd.grad(mlp(given), given, torch.ones(2, 3, 4), is_grads_batched=True)[0]

    found = list(derivatives())
    for module in (mlp, frozen):
        accelerate(module, enable=False)
    for ours, plain in zip(found, derivatives(), strict=True):
        assert plain.any() and torch.allclose(ours, plain, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_operations_are_counted(grad):
    mlp, x, counts = Mlp(8, 16), torch.randn(3, 5, 8), []
    for enable in (True, False):
        accelerate(mlp, enable=enable)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            result = mlp(x).sum()
            if grad:
                result.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_derivatives_of_torch_func_inside_the_compiler():
    """The operator has no rules for them there either."""
    torch.manual_seed(0)
    mlp, x = accelerate(Mlp(4, 8)), torch.randn(3, 4)

    def derivatives(x):
        per_row = torch.func.vmap(torch.func.grad(lambda row: mlp(row).sum()))(x)
        return per_row + torch.func.jvp(mlp, (x,), (torch.ones_like(x),))[1]

    assert torch.allclose(torch.compile(derivatives, backend="eager")(x), derivatives(x), atol=1e-6)


def test_hooks_and_other_modules_in_the_mlp_are_honoured():
    """The fused way would go past a hook on fc1 or act, and past what took their place."""
    mlp, x, seen = accelerate(Mlp(8, 16)).eval(), torch.randn(2, 8), []
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
    plain, x, seen = accelerate(Mlp(8, 16)), torch.randn(2, 8), []
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


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_takes_many_rows_in_parts(dtype, monkeypatch):
    mlp, x, sizes = accelerate(Mlp(8, 16)).eval().to(dtype), torch.randn(3, 5, 7, 8).to(dtype), []
    own = onednn.linear_gelu
    monkeypatch.setattr(
        onednn, "linear_gelu", lambda x, *rest, **options: sizes.append(len(x)) or own(x, *rest, **options)
    )
    with torch.no_grad():
        whole = mlp(x)
        monkeypatch.setattr(onednn, "MAX_HIDDEN", 50 * 16 * x.element_size())
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


def test_what_computes_is_described():
    model = build()
    assert describe(model) == ["operators: PyTorch's own (not accelerated)"]
    linear, attention = describe(accelerate(model))
    assert linear.startswith("37 linear layers: ") and attention.startswith("8 attentions: ")
    assert ("oneDNN, timed" in linear) == onednn.AVAILABLE
    assert "PyTorch's (x and weight are torch.float64" in describe(model.double())[0] or not onednn.AVAILABLE


@needs_onednn
def test_what_depends_on_the_compiler_and_on_autocast_is_described(monkeypatch):
    model = accelerate(build())
    for with_amx, condition in ((False, ""), (True, " if compiled (fused attention is faster on processors with AMX")):
        monkeypatch.setattr(onednn, "WITH_AMX", with_amx)
        assert f"; bfloat16 without gradients through batched GEMMs{condition}" in describe(model)[1]
    with torch.autocast("cpu", torch.bfloat16):
        linear, attention = describe(model)
    assert "PyTorch's (autocast chooses" in linear and attention.endswith("PyTorch's fused kernel")


@needs_onednn
def test_other_ways_with_gradients_are_described(monkeypatch):
    model = accelerate(build())
    assert "with gradients" not in describe(model)[0]
    monkeypatch.setattr(onednn, "ON_INTEL", True)
    assert describe(model)[0].endswith(
        "; with gradients PyTorch's (gradients of float32 are faster through MKL on Intel)"
    )
