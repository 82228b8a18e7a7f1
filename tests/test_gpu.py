"""What only a GPU can show. Without one, these tests are skipped."""

import signal

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import log_lines, run_main
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

import datasets
import engine
import main
from gvt_ops import accelerate, window_attention
from gvt_ops.window_attention import attend_in_windows
from tools.checkpoint_hash import digest
from training import checkpoint, options
from training.batches import Uint8Transform, collate, seed_by

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def _restored_settings():
    """--deterministic and the like must not decide which path the next test takes."""
    deterministic, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn
    benchmark, cudnn_deterministic = cudnn.benchmark, cudnn.deterministic
    yield
    torch.use_deterministic_algorithms(deterministic)
    cudnn.benchmark, cudnn.deterministic = benchmark, cudnn_deterministic


@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
@pytest.mark.parametrize("size", [(224, 224), (200, 168)])
def test_logits_equal_the_cpus(name, size):
    torch.manual_seed(0)
    model, x = timm.create_model(name).double().eval(), torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(x)
        assert (model.cuda()(x.cuda()).cpu() - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
def test_fused_kernels_serve_every_block(name):
    """At a size that needs no mask, flash attention takes every tensor: with it alone allowed, nothing is refused."""
    model = timm.create_model(name).cuda().half().eval()
    with torch.inference_mode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert model(torch.randn(2, 3, 224, 224, device="cuda", dtype=torch.half)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(224, 224), (200, 168)])
def test_every_lsa_takes_the_window_kernel(size, dtype, monkeypatch):
    monkeypatch.setattr(window_attention, "WANTED", True)
    model = accelerate(timm.create_model("alt_gvt_small")).cuda().eval()
    with (
        torch.inference_mode(),
        torch.autocast("cuda", dtype, enabled=dtype != torch.float32),
        profile(acc_events=True) as trace,
    ):
        assert model(torch.randn(2, 3, *size, device="cuda")).isfinite().all()
    calls = {event.key: event.count for event in trace.key_averages()}
    assert calls["twins::attend_in_windows"] == 1 + 1 + 5 + 2


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_with_the_window_kernel(monkeypatch):
    monkeypatch.setattr(window_attention, "WANTED", True)
    torch.manual_seed(0)
    model, x = (
        accelerate(timm.create_model("alt_gvt_demo", num_classes=5)).cuda(),
        torch.randn(2, 3, 72, 104, device="cuda"),
    )
    results = []
    for run in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        logits = run(x)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(*results))


def test_the_window_kernel_in_a_cuda_graph():
    qkv = torch.randn(2, 14, 16, 192, device="cuda")
    expected, graph = (
        attend_in_windows(qkv, 2, 7),
        torch.cuda.CUDAGraph(),
    )  # chooses its warps in the first call, which a graph cannot hold
    with torch.cuda.graph(graph):
        out = attend_in_windows(qkv, 2, 7)
    qkv.copy_(qkv.flip(0))
    graph.replay()
    assert torch.equal(out, expected.flip(0))


@pytest.mark.parametrize("window", [7, 14])
def test_autotuned_launches_equal_deterministic_ones(window):
    """Up to rounding: another number of warps adds in another order."""
    qkv = torch.randn(2, 17, 16, 192, device="cuda", requires_grad=True)
    results = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        out = attend_in_windows(qkv, 2, window)
        results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(*results))


def test_the_window_kernel_beyond_32_bits():
    """4 GiB of qkv, with more numbers than 2^31 and more windows than a grid's second side has."""
    qkv = torch.zeros(3600, 56, 56, 192, device="cuda", dtype=torch.bfloat16)
    qkv[-1].normal_()
    assert torch.equal(attend_in_windows(qkv, 2, 7)[-1:], attend_in_windows(qkv[-1:], 2, 7))


@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_that_is_not_finite_changes_nothing(amp_dtype):
    """Decided on the device; the host learns of it one step later at most."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).cuda()
    optimizer, weights = torch.optim.AdamW(model.parameters(), fused=True), []
    scaler = torch.amp.GradScaler("cuda", enabled=amp_dtype == torch.float16, init_scale=1.0)

    def criterion(logits, targets):
        weights.append(model[1].weight.detach().clone())
        return F.cross_entropy(logits, targets) * (float("nan") if len(weights) == 3 else 1.0)

    batches = [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])) for _ in range(6)]
    with pytest.raises(engine.NonFiniteError, match=r"the loss is nan \(epoch 0, step 2\)"):
        settings = dict(amp_dtype=amp_dtype, clip_grad=5.0)
        engine.train_one_epoch(model, criterion, batches, optimizer, torch.device("cuda"), 0, scaler, **settings)
    assert 3 <= len(weights) <= 4
    if len(weights) == 4:
        assert torch.equal(weights[3], weights[2])
    assert not torch.equal(weights[1], weights[0]) and model[1].weight.isfinite().all()


@pytest.mark.parametrize(
    "words", [[], ["--amp-dtype", "bfloat16", "--channels-last", "--model-ema"]], ids=["float16", "bfloat16"]
)
def test_a_run(words, toy, tmp_path, capsys):
    run = [
        "--model",
        "alt_gvt_demo",
        "--input-size",
        "64",
        "--batch-size",
        "8",
        "--num_workers",
        "1",
        "--epochs",
        "2",
        "--warmup-epochs",
        "0",
    ]
    assert main.run(options.parse_args([*run, "--data-path", str(toy), "--output_dir", str(tmp_path), *words])) == 0
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0, 1]
    assert "device cuda" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--amp-dtype", "bfloat16"]], ids=["float16", "bfloat16"])
def test_a_stopped_run_ends_with_the_same_bits(words, toy, tmp_path, monkeypatch):
    """With --deterministic: twice the same, and the same after a stop inside an epoch."""
    run = [
        "--model",
        "alt_gvt_demo",
        "--input-size",
        "64",
        "--batch-size",
        "8",
        "--num_workers",
        "1",
        "--epochs",
        "2",
        "--model-ema",
    ]
    run = [*run, "--deterministic", "--data-path", str(toy), *words, "--output_dir"]
    for name in ("a", "b"):
        assert main.run(options.parse_args([*run, str(tmp_path / name)])) == 0
    steps = []
    stop = lambda *where: steps.append(1) or (len(steps) == 3 and signal.raise_signal(signal.SIGTERM))  # noqa: E731
    assert main.run(options.parse_args([*run, str(tmp_path / "c")]), on_poll=stop) == 143
    monkeypatch.undo()
    assert main.run(options.parse_args([*run, str(tmp_path / "c"), "--resume", "auto"])) == 0
    found = [digest(checkpoint.load(tmp_path / name / "checkpoint.pth")) for name in "abc"]
    assert found[0] == found[1] == found[2]


# ---------------------------------------------------------------- what a batch and a step do on the device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("fast_augment", [False, True])
def test_a_batch_has_the_cpus_bits(fast_augment):
    """Augmented, normalized and erased: each operation is one that both devices compute alike."""
    args = options.parse_args(["--input-size", "64", "--reprob", "1"])
    transform = Uint8Transform(datasets.build_transform(True, args), fast_augment=fast_augment)
    items = []
    for position in range(16):
        seed_by((0, position))
        pixels = torch.randint(256, (80, 96, 3), dtype=torch.uint8).numpy()
        items.append((transform(Image.fromarray(pixels)), 0))
    # Augmentation writes into its pixels: each device gets a batch of its own.
    batches = [collate(items)[0].to(device).cpu() for device in (CPU, CUDA)]
    assert torch.equal(*batches) and batches[0].std() > 0.1


def test_an_evaluation_counts_as_on_the_cpu():
    torch.manual_seed(0)
    model = timm.create_model("alt_gvt_demo", num_classes=4).eval()
    batches = [(torch.randn(5, 3, 64, 64), torch.tensor([0, 1, 2, 3, 0])) for _ in range(3)]
    stats = [engine.evaluate(batches, model.to(device), device, amp_dtype=torch.float32) for device in (CPU, CUDA)]
    assert stats[0]["acc1"] == stats[1]["acc1"] and stats[0]["loss"] == pytest.approx(stats[1]["loss"], abs=1e-4)


def test_late_values_come_in_order_and_all():
    seen = []
    late = engine.LateValues(lambda step, values: seen.append((step, *values)))
    for step in range(5):
        late.put(step, torch.full((1,), float(step), device=CUDA))
        assert len(seen) == step  # each is read when the next is there
    late.flush()
    late.flush()
    assert seen == [(step, float(step)) for step in range(5)]


def test_an_overflow_in_float16_skips_the_step_and_halves_the_scale():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).cuda()
    optimizer, before = torch.optim.AdamW(model.parameters(), fused=True), model[1].weight.detach().clone()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    settings = dict(amp_dtype=torch.float16, clip_grad=5.0)
    batches = [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))]
    engine.train_one_epoch(model, F.cross_entropy, batches, optimizer, CUDA, 0, scaler, **settings)
    assert torch.equal(model[1].weight, before) and scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("words", [[], ["--channels-last"], ["--residual-dtype", "autocast"]], ids=str)
def test_a_prepared_model_trains_in_bfloat16(words):
    args = options.parse_args(["--model", "alt_gvt_demo", "--amp-dtype", "bfloat16", *words])
    model = main.prepare_model(main.build_model(args, 3), args, CUDA)
    weight = model.pos_block[0].proj[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(model(torch.randn(2, 3, 64, 64, device=CUDA)), torch.tensor([0, 1], device=CUDA))
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert weight.grad.stride() == weight.stride()


def test_what_attention_takes_by_itself_is_fused():
    """Whichever kernel PyTorch prefers: flash, memory-efficient or cuDNN, but not products and softmax of its own."""
    model = timm.create_model("alt_gvt_small").cuda().bfloat16().eval()
    with torch.inference_mode(), profile(acc_events=True) as trace:
        model(torch.randn(2, 3, 224, 224, device="cuda", dtype=torch.bfloat16))
    taken = {event.key for event in trace.key_averages() if "_scaled_dot_product_" in event.key}
    assert taken and not [name for name in taken if "math" in name], taken


def test_one_process_of_torchrun(toy, tmp_path):
    words = ["--model", "alt_gvt_demo", "--input-size", 32, "--batch-size", 8, "--epochs", 1, "--data-path", toy]
    done = run_main(*words, "--output_dir", tmp_path, launcher=("-m", "torch.distributed.run", "--nproc_per_node=1"))
    assert done.returncode == 0 and "Training time" in done.stdout, done.stderr
    assert "Guessing device ID" not in done.stderr and "destroy_process_group" not in done.stderr
