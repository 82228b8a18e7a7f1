"""Window attention without its kernel: the plain version, the reasons not to take the kernel, and a process that
interprets it.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, golden_weights
from exact import reference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

import gvt
from gvt_ops import accelerate, window_attention
from gvt_ops.window_attention import attend_in_windows, unsupported_reason
from tools.kernel_report import compile_kernel


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernel_in_tritons_interpreter(chosen):
    """In a process of its own: Triton decides while it is imported whether it compiles or interprets, and compiling
    needs a GPU.
    """
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-m", chosen, "tests/gvt_ops/test_window_kernel.py"]
    settings = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=settings)
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(("H", "W"), [(14, 7), (9, 16), (3, 5)])
def test_the_reference_is_lsa(H, W):
    torch.manual_seed(0)
    attention, x = gvt.LocalAttention(8, 2, window=7).double(), torch.randn(2, H, W, 8, dtype=torch.float64)
    assert (attention.proj(reference(attention.qkv(x), 2, 7)) - attention(x)).abs().max() < 1e-14


def test_the_references_gradient():
    qkv = torch.randn(1, 3, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference(x, 2, 2), qkv)


H100 = SimpleNamespace(major=9, shared_memory_per_block_optin=227 * 1024)
RTX4090 = SimpleNamespace(major=8, shared_memory_per_block_optin=99 * 1024)
V100 = SimpleNamespace(major=7, shared_memory_per_block_optin=96 * 1024)
# What is asked for, on which device, and a word of the reason.
ASKED = [
    (dict(), H100, None),
    (dict(), RTX4090, None),
    (dict(dtype=torch.bfloat16, window=14, shape=(1, 8, 8, 128)), H100, None),
    (dict(dtype=torch.float16, window=14), RTX4090, None),
    (dict(window=14, shape=(1, 8, 8, 128)), RTX4090, "shared memory"),
    (dict(), V100, "capability 8.0"),
    (dict(is_cuda=False), H100, "not on a CUDA device"),
    (dict(dtype=torch.float64), H100, "none of float32"),
    (dict(dropout=0.1), H100, "drops no weights"),
    (dict(window=17), H100, "289 tokens, the kernel takes 256"),
    (dict(shape=(1, 8, 8, 160)), H100, "80 channels, the kernel takes 64"),
]


@pytest.mark.parametrize(("asked", "device", "reason"), ASKED)
def test_reasons_not_to_take_the_kernel(asked, device, reason, monkeypatch):
    monkeypatch.setattr(window_attention, "WANTED", True)
    monkeypatch.setattr(window_attention, "TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.float32, shape=(1, 8, 8, 64))
    x = SimpleNamespace(**vars(x) | {key: value for key, value in asked.items() if key in vars(x)})
    found = unsupported_reason(x, heads=2, window=asked.get("window", 7), dropout=asked.get("dropout", 0.0))
    assert found is None if reason is None else reason in found


def test_dropout_of_weights_matters_in_training_only(monkeypatch):
    asked = []
    monkeypatch.setattr(
        window_attention, "unsupported_reason", lambda x, dropout, **sizes: asked.append(dropout) or "to look"
    )
    attention = accelerate(gvt.LocalAttention(8, 2, window=7, attn_drop=0.2))
    for mode in (True, False):
        attention.train(mode)(torch.randn(1, 7, 7, 8))
    assert asked == [0.2, 0.0]


REASON = "w.unsupported_reason(torch.zeros(1, 7, 7, 8), heads=2, window=7, dropout=0.0)"


def python(program, **environment):
    command = dict(args=[sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    return subprocess.run(**command, env=os.environ | environment)


def test_without_triton_all_but_the_kernel_works():
    """CPU builds of torch bring none."""
    program = "import sys; sys.modules['triton'] = None; import gvt, torch, gvt_ops, gvt_ops.window_attention as w; "
    program += "lsa = gvt_ops.accelerate(gvt.LocalAttention(8, 2, window=7)); "
    result = python(program + f"print(lsa(torch.randn(1, 7, 7, 8)).shape, {REASON})", TWINS_WINDOW_KERNEL="1")
    assert result.stdout == "torch.Size([1, 7, 7, 8]) Triton is not installed\n", result.stderr


@pytest.mark.parametrize("value", ["0", "", "1"])
def test_the_switch(value):
    """Off unless TWINS_WINDOW_KERNEL=1."""
    result = python(f"import torch, gvt_ops.window_attention as w; print({REASON})", TWINS_WINDOW_KERNEL=value)
    off = "TWINS_WINDOW_KERNEL=1 is not set\n"
    assert (result.stdout == off) == (value != "1") and result.stdout not in ("", "None\n"), result.stderr


def test_a_plain_model_never_asks_for_the_kernel(monkeypatch):
    monkeypatch.setattr(window_attention, "unsupported_reason", lambda *args, **sizes: pytest.fail("asked"))
    gvt.LocalAttention(8, 2, window=7)(torch.randn(1, 9, 7, 8))


@pytest.mark.parametrize(("window", "operator"), [(7, True), (17, False)])
def test_torch_compile_sees_through_the_choice(window, operator, monkeypatch):
    """On a CUDA device that is not there: tensors without memory, and properties of our making."""
    monkeypatch.setattr(window_attention, "WANTED", True)
    monkeypatch.setattr(window_attention, "TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: H100)
    graphs = []

    def choose(x, qkv):
        taken = unsupported_reason(x, heads=2, window=window, dropout=0.0) is None
        return attend_in_windows(qkv, 2, window) if taken else x.new_empty(3)

    with FakeTensorMode(), torch.no_grad():
        maps = (torch.empty(2, 8, 8, channels, device="cuda") for channels in (64, 192))
        out = torch.compile(choose, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(*maps)
    assert out.shape == ((2, 8, 8, 64) if operator else (3,))
    assert [node.target == torch.ops.twins.attend_in_windows.default for node in graphs[0].graph.nodes].count(
        True
    ) == operator


# Compute capability, dtype, window, channels of a head: what the models have, and the largest that each kind of device
# may be asked for.
MODELS = [(90, "bf16", 7, 32), (80, "fp16", 7, 32), (100, "bf16", 7, 32), (90, "fp32", 7, 32)]
LARGEST = [(90, "bf16", 14, 64), (80, "bf16", 14, 64), (86, "bf16", 11, 64), (86, "bf16", 14, 32), (86, "fp32", 14, 32)]


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize(
    "case", [MODELS[0], *(pytest.param(case, marks=pytest.mark.slow) for case in (*MODELS[1:], *LARGEST))], ids=str
)
def test_the_kernels_compile_for_gpus_that_are_not_here(case, pass_, tmp_path, monkeypatch):
    """The interpreter is more lenient than the compiler; and each program has to fit into the memory that
    unsupported_reason counts on.
    """
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    capability, dtype, window, channels = case
    program = compile_kernel(pass_, capability=capability, dtype=dtype, window=window, channels=channels)
    largest = window**2 > 128 and channels > 32
    assert program.metadata.shared <= (
        window_attention.MAX_MEMORY if largest else RTX4090.shared_memory_per_block_optin
    )


# ---------------------------------------------------------------- export with sizes that vary

SIZES = [(32, 32), (33, 200), (40, 56), (63, 65), (64, 64), (70, 104), (96, 32), (128, 128), (224, 224), (230, 130)]


def always_symbolic(monkeypatch):
    monkeypatch.setattr(window_attention, "has_symbolic_sides", lambda *sides: True)


@torch.inference_mode()
def test_the_form_for_export_equals_the_model_at_ten_sizes(monkeypatch):
    torch.manual_seed(0)
    model = golden_weights(gvt.Twins(gvt.VARIANTS["alt_gvt_demo"], num_classes=5)).float().eval()
    images = [torch.randn(2, 3, *size) for size in SIZES]
    expected = [model(x) for x in images]
    always_symbolic(monkeypatch)
    assert all((model(x) - logits).abs().max() < 1e-6 for x, logits in zip(images, expected))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pad", ["mask", "zero"])
def test_the_form_for_export_of_lsa(pad, fused, monkeypatch):
    torch.manual_seed(0)
    lsa, x = gvt.LocalAttention(8, 2, window=7, pad=pad).double(), torch.randn(2, 9, 16, 8, dtype=torch.float64)
    lsa.fused_attn = fused
    expected = lsa(x)
    always_symbolic(monkeypatch)
    assert (lsa(x) - expected).abs().max() < 1e-14


def test_what_masks_some_sizes_only_has_no_form_for_export(monkeypatch):
    always_symbolic(monkeypatch)
    with pytest.raises(ValueError, match="fixed sizes"):
        gvt.LocalAttention(8, 2, window=7, pad="published")(torch.randn(1, 9, 9, 8))


def test_only_sides_that_vary_are_exported_in_that_form():
    """A program of fixed sides pads no windows that fit."""
    lsa, x = gvt.LocalAttention(8, 2, window=7).eval(), torch.zeros(2, 14, 21, 8)
    batch, sides = {0: Dim.AUTO}, {1: Dim.AUTO, 2: Dim.AUTO}
    pads = ["pad" in str(torch.export.export(lsa, (x,), dynamic_shapes=(dims,)).graph) for dims in (batch, sides)]
    assert pads == [False, True]
