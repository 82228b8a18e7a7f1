"""The dtype of the residual stream, and how close gradients stay to those in float64."""

import copy

import pytest
import timm
import torch
from torch import nn

import gvt  # noqa: F401  its models
from training import precision
from training.errors import UserError


def build(residual: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("alt_gvt_demo", num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # in float32, as under autocast on a GPU
            module.register_forward_pre_hook(lambda norm, inputs: (inputs[0].to(norm.weight.dtype),))
    if residual == "autocast":
        precision.autocast_residuals(model)
    return model


@pytest.mark.parametrize(("residual", "dtype"), [("float32", torch.float32), ("autocast", torch.bfloat16)])
def test_the_dtype_between_blocks(residual, dtype):
    model, seen = build(residual), []
    for block in (block for stage in model.blocks for block in stage[1:]):
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    x = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert len(seen) == 4 and set(seen) == {dtype}
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_without_autocast_nothing_changes():
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(build("autocast")(x), build("float32")(x))


def test_gradients_lose_at_most_twice_as_much():
    """Beside float64: the option is for speed, and what it costs is bounded."""
    x, labels = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5

    def gradients(model, dtype=torch.float32):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            nn.functional.cross_entropy(model(x.to(dtype)).to(dtype), labels).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()

    exact = gradients(copy.deepcopy(build("float32")).double(), torch.float64)
    errors = {name: (gradients(build(name)) - exact).square().mean().sqrt() for name in ("float32", "autocast")}
    assert 0 < errors["float32"] < errors["autocast"] < 2 * errors["float32"], errors


def test_another_model_has_no_peg():
    with pytest.raises(UserError, match="--residual-dtype autocast"):
        precision.autocast_residuals(timm.create_model("resnet18"))
