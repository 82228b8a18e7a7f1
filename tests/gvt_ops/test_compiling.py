"""compile: torch.compile's settings, read in the code that Inductor generates."""

import re

import pytest
import timm
import torch
import torch._inductor.config
from torch._inductor.utils import run_and_get_code
from torch.nn import Conv2d

import gvt_ops
from gvt_ops.modules import Linear

X = torch.sin(torch.arange(2 * 3 * 128 * 96).float()).reshape(2, 3, 128, 96)
BUFFER = re.compile(r"empty_strided_cpu\(\((\d+), (\d+), (\d+), (\d+)\), \((\d+), (\d+), (\d+), (\d+)\)")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the compiler's own


def build():
    torch.manual_seed(0)
    return gvt_ops.accelerate(timm.create_model("alt_gvt_demo", num_classes=5).eval())


@pytest.fixture
def process_settings():
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=False):
        yield
    torch._dynamo.reset()


def transposed(code, model):
    """Return the maps (B, H, W, C) with H innermost: buffers with stride 1 in a dimension that has no convolution's
    number of channels.
    """
    channels = {width for m in model.modules() if isinstance(m, Conv2d) for width in (m.in_channels, m.out_channels)}
    buffers = [tuple(map(int, found)) for found in BUFFER.findall(code)]
    assert buffers
    return [buffer for buffer in buffers if buffer[5] == 1 < buffer[1] and buffer[1] not in channels]


@pytest.mark.parametrize("inference", [True, False])
def test_no_map_is_stored_transposed(inference, process_settings):
    model = build()
    with torch.no_grad():
        expected = model(X)
        out, (code,) = run_and_get_code(gvt_ops.compile(model, inference=inference), X)
        assert torch.allclose(out, expected, atol=1e-5) and not transposed(code, model)
        assert ("mkl_linear" in code or "linear_pointwise" in code or "packed" in code) == inference
        assert any(type(module) is Linear for module in model.modules()) != inference


def test_layout_optimization_would_store_maps_transposed(process_settings):
    model = build()
    with torch.no_grad():
        _, (code,) = run_and_get_code(gvt_ops.compile(model, layout_optimization=True), X)
    assert transposed(code, model)
