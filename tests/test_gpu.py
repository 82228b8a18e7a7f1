"""What only a GPU can show. Without one, these tests are skipped."""

import pytest
import timm
import torch
import torch.nn.functional as F
from checkpoint_hash import digest
from conftest import log_lines
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import engine
import main
import options

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


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


@pytest.mark.parametrize("words", [[], ["--amp-dtype", "bfloat16", "--channels-last", "--model-ema"]], ids=["float16", "bfloat16"])
def test_a_run(words, toy, tmp_path, capsys):
    run = ["--model", "alt_gvt_demo", "--input-size", "64", "--batch-size", "8", "--num_workers", "1", "--epochs", "2", "--warmup-epochs", "0"]
    assert main.run(*options.parse_args([*run, "--data-path", str(toy), "--output_dir", str(tmp_path), *words])) == 0
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0, 1]
    assert "device cuda" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--amp-dtype", "bfloat16"]], ids=["float16", "bfloat16"])
def test_a_stopped_run_ends_with_the_same_bits(words, toy, tmp_path, monkeypatch):
    """With --deterministic: twice the same, and the same after a stop inside an epoch."""
    run = ["--model", "alt_gvt_demo", "--input-size", "64", "--batch-size", "8", "--num_workers", "1", "--epochs", "2", "--model-ema"]
    run = [*run, "--deterministic", "--data-path", str(toy), *words, "--output_dir"]
    for name in ("a", "b"):
        assert main.run(*options.parse_args([*run, str(tmp_path / name)])) == 0
    steps = []
    monkeypatch.setattr(main.Run, "wants_to_stop", lambda self: steps.append(1) or len(steps) == 3)
    assert main.run(*options.parse_args([*run, str(tmp_path / "c")])) == 143
    monkeypatch.undo()
    assert main.run(*options.parse_args([*run, str(tmp_path / "c"), "--resume", "auto"])) == 0
    found = [digest(checkpoint.load(tmp_path / name / "checkpoint.pth")) for name in "abc"]
    assert found[0] == found[1] == found[2]
