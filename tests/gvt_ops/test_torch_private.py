"""The private parts of torch that are used: each does what is counted on."""

import pytest
import torch
import torch.nn.functional as F
from exact import needs_onednn
from torch import nn
from torch.autograd import forward_ad

from gvt_ops import torch_private
from gvt_ops.torch_private import has_hooks, in_transform


@needs_onednn
@pytest.mark.parametrize(("after", "algorithm"), [("none", ""), ("gelu", "none"), ("gelu", "tanh")])
def test_the_operator_of_onednn(after, algorithm):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 2, 8), torch.randn(5, 8), torch.randn(5)
    expected = F.linear(x, weight, bias)
    if after == "gelu":
        expected = F.gelu(expected, approximate=algorithm)
    assert torch.allclose(torch_private.LINEAR_POINTWISE(x, weight, bias, after, [], algorithm), expected, atol=1e-5)


def test_transforms_of_torch_func():
    seen, x = [], torch.ones(3)

    def look(x):
        seen.append(in_transform())
        return x.sum()

    look(x)
    torch.func.grad(look)(x)
    torch.func.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    look(x)
    assert seen == [False, True, True, True, False]


def test_forward_mode_differentiation():
    assert not in_transform()
    with forward_ad.dual_level():
        assert in_transform()
    assert not in_transform()


@pytest.mark.parametrize("inside", [True, False])
def test_transforms_are_seen_inside_the_compiler(inside):
    """While it traces, the transforms that the traced code enters are entered."""

    def look(x):
        return x + 1 if in_transform() else x

    function = torch.func.vmap(look) if inside else look
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [inside, inside]


KINDS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_a_module(kind):
    module = nn.Linear(2, 2)
    assert not has_hooks(module)
    handle = getattr(module, f"register_{kind}")(lambda *_: None)
    assert has_hooks(module)
    handle.remove()
    assert not has_hooks(module)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_all_modules(kind):
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda *_: None)
    try:
        assert has_hooks(nn.Linear(2, 2))
    finally:
        handle.remove()
    assert not has_hooks(nn.Linear(2, 2))


def test_a_replaced_forward():
    module = nn.Linear(2, 2)
    module.forward = lambda x: x
    assert has_hooks(module)


def test_export_with_sizes_that_vary(tmp_path):
    """Each size inside is 1 for the smallest image, and batches of one and of three are taken."""
    network = nn.Sequential(nn.Conv2d(3, 2, 4, stride=4), nn.Conv2d(2, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1))
    torch.export.save(torch_private.export(network, torch.zeros(2, 3, 40, 52), (0, 2, 3), 4), tmp_path / "x.pt2")
    run = torch.export.load(tmp_path / "x.pt2").module(check_guards=False)
    for shape in [(1, 3, 4, 4), (3, 3, 5, 32), (2, 3, 64, 64)]:
        x = torch.randn(shape)
        assert torch.equal(run(x), network(x))
    with pytest.raises(RuntimeError, match="to be >= 4, but got 3"):
        run(torch.zeros(1, 3, 8, 3))
