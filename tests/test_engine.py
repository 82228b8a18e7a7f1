"""Training steps equal to the published ones, updates that do not happen, and an evaluation that counts every image
once.
"""

import csv
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, golden, golden_images, golden_weights, relative
from timm.data import Mixup
from timm.scheduler import create_scheduler
from torch import nn

import engine
import main
from losses import build_criterion
from training import options

CPU = torch.device("cpu")
OFF = torch.amp.GradScaler("cpu", enabled=False)


def arguments(*words):
    return options.parse_args([str(word) for word in words])


def optimizer_of(args, model, global_batch):
    """The optimizer as main.py builds it."""
    return main.build_optimizer(args, model, args.lr * global_batch / 512)


# ---------------------------------------------------------------- the published training


@pytest.mark.slow
@pytest.mark.parametrize("compile_backend", [None, "eager"])
def test_the_published_trajectory(compile_backend):
    """Twelve steps in float64: losses, rates, groups and final weights."""
    expected = golden("training")["alt_gvt_small"]
    args = arguments("--batch-size", 2, "--epochs", 10, "--lr", 0.05, "--drop-path", 0, "--mixup", 0, "--cutmix", 0)
    model = golden_weights(main.build_model(args, 10))
    trained = torch.compile(model, backend=compile_backend, dynamic=False) if compile_backend else model
    optimizer = optimizer_of(args, model, 2)
    scheduler, _ = create_scheduler(args, optimizer)
    groups = [
        {"n": len(g["params"]), "numel": sum(p.numel() for p in g["params"]), "weight_decay": g["weight_decay"]}
        for g in optimizer.param_groups
    ]
    assert groups == expected["groups"]
    assert (
        list(optimizer.param_groups[0]["betas"]) == expected["betas"]
        and optimizer.param_groups[0]["eps"] == expected["eps"]
    )
    images, labels = golden_images(6, 224, 224), torch.tensor([3, 1, 4, 1, 5, 9])
    criterion, losses, rates = build_criterion(mixing=False, smoothing=args.smoothing), [], []

    def watched(logits, targets):
        loss = criterion(logits, targets)
        losses.append(loss.item())
        return loss

    for epoch in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        batches = [(images[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]
        settings = engine.StepSettings(clip_grad=args.clip_grad)
        stats = engine.train_one_epoch(trained, watched, batches, optimizer, CPU, epoch, OFF, settings)
        assert stats["loss"] == pytest.approx(sum(losses[-3:]) / 3, rel=1e-12) and stats["lr"] == pytest.approx(
            rates[-1], rel=1e-12
        )
        scheduler.step(epoch)
    assert relative(losses, expected["losses"]) < 1e-11
    assert relative(rates, expected["lrs"]) < 1e-11
    parameters = [p.detach().flatten() for p in model.parameters()]
    assert (
        relative(
            sum((p * torch.cos(torch.arange(len(p), dtype=torch.float64) * 0.31)).sum() for p in parameters),
            expected["probe"],
        )
        < 1e-9
    )
    assert relative(sum(p.square().sum() for p in parameters) ** 0.5, expected["l2"]) < 1e-11


PUBLISHED_RUNS = {  # the log's name: model, global batch, warm-up epochs
    "pcpvt_s": ("pcpvt_small_v0", 1280, 5),
    "pcpvt_b": ("pcpvt_base_v0", 1024, 5),
    "pcpvt_l": ("pcpvt_large_v0", 1024, 5),
    "svt_s": ("alt_gvt_small", 2048, 5),
    "svt_b": ("alt_gvt_base", 1024, 5),
    "svt_l": ("alt_gvt_large", 1024, 20),
}


@pytest.mark.parametrize("log", PUBLISHED_RUNS)
def test_learning_rates_of_the_published_logs(log):
    """Epoch by epoch, with the scheduler stepped after the epoch."""
    model, batch, warmup = PUBLISHED_RUNS[log]
    assert main.RECIPE_BATCH[model] == batch
    args = arguments("--warmup-epochs", warmup)
    optimizer = optimizer_of(args, nn.Linear(2, 2), batch)
    scheduler, _ = create_scheduler(args, optimizer)
    rates = []
    for epoch in range(args.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    with open(ROOT / "logs/published/classification.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == log]
    assert len(rows) == (296 if log == "pcpvt_l" else 300)
    assert relative([rates[int(row["epoch"])] for row in rows], [float(row["train_lr"]) for row in rows]) < 1e-12


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("pcpvt_small_v0", (206, 98)),
        ("pcpvt_base_v0", (350, 170)),
        ("pcpvt_large_v0", (506, 248)),
        ("alt_gvt_small", (197, 93)),
        ("alt_gvt_base", (260, 124)),
        ("alt_gvt_large", (260, 124)),
    ],
)
def test_two_groups_first_without_decay(name, counts):
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = optimizer_of(arguments(), model, 512).param_groups
    assert tuple(len(group["params"]) for group in groups) == counts
    assert [group["weight_decay"] for group in groups] == [0.0, 0.05]


# ---------------------------------------------------------------- steps


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.GELU(), nn.Linear(5, 3))


def batches(count=4, size=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 2, 2, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


OPTIMIZERS = {
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
    "plain": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=False),
}


def train(model, data, optimizer, *, criterion=F.cross_entropy, scaler=OFF, after_step=None, **settings):
    hooks = engine.EpochHooks(after_step=after_step)
    return engine.train_one_epoch(
        model, criterion, data, optimizer, CPU, 0, scaler, engine.StepSettings(**settings), hooks
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("clip_grad", [0.0, 5.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(kind, clip_grad, value):
    """The update of the step is without effect, and the error names step and loss."""
    model = small()
    optimizer, seen = OPTIMIZERS[kind](model), []

    def criterion(logits, targets):
        loss = F.cross_entropy(logits, targets)
        seen.append({name: p.clone() for name, p in model.state_dict().items()})
        return loss * value if len(seen) == 3 else loss

    with pytest.raises(engine.NonFiniteError, match=rf"the loss is {value} \(epoch 0, step 2\)"):
        train(model, batches(), optimizer, criterion=criterion, clip_grad=clip_grad)
    assert len(seen) == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen[-1][name]) and not torch.equal(value, seen[0][name])
    assert all(state["step"] == 2 for state in optimizer.state.values())


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("clip_grad", [0.0, 5.0])
def test_gradients_that_are_not_finite_change_nothing(kind, clip_grad):
    model = small()
    before = {name: p.clone() for name, p in model.state_dict().items()}

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    criterion = lambda logits, targets: F.cross_entropy(Bad.apply(logits), targets)  # noqa: E731
    with pytest.raises(engine.NonFiniteError, match=r"the gradients are not finite \(epoch 0, step 0\)"):
        train(model, batches(), OPTIMIZERS[kind](model), criterion=criterion, clip_grad=clip_grad)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_that_is_not_finite_spoils_its_whole_group():
    """Gradient accumulation: nothing of the group is applied, also without clipping and where the host would learn of
    it late.
    """
    model = small()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    calls = []

    def criterion(logits, targets):
        calls.append(1)
        return F.cross_entropy(logits, targets) * (float("nan") if len(calls) == 1 else 1.0)

    late = engine.LateValues.put
    try:
        engine.LateValues.put = lambda self, step, values: setattr(self, "last", (step, values))  # as if on a slow GPU
        train(model, batches(2), OPTIMIZERS["fused"](model), criterion=criterion, accum_steps=2)
    finally:
        engine.LateValues.put = late
    assert len(calls) == 2 and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_float16_overflow_is_skipped_and_the_scale_halved():
    model, scaler = small(), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = OPTIMIZERS["fused"](model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    stats = train(model, batches(1), optimizer, scaler=scaler, amp_dtype=torch.float16, clip_grad=5.0)
    assert scaler.get_scale() == 2.0**39 and stats["loss"] > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for _ in range(12):
        train(model, batches(4), optimizer, scaler=scaler, amp_dtype=torch.float16, clip_grad=5.0)
    assert not torch.equal(model.state_dict()["1.weight"], before["1.weight"])
    with pytest.raises(engine.NonFiniteError):
        train(
            model,
            batches(1),
            optimizer,
            scaler=scaler,
            amp_dtype=torch.float16,
            criterion=lambda a, b: F.cross_entropy(a, b) * float("nan"),
        )


def test_accumulation_equals_a_larger_batch():
    one, two = small(), small()
    data = batches(1, size=8)
    halves = [(images[i : i + 4], labels[i : i + 4]) for images, labels in data for i in (0, 4)]
    train(one, data, torch.optim.SGD(one.parameters(), lr=0.1), clip_grad=1.0)
    train(
        two, [*halves, halves[0]], torch.optim.SGD(two.parameters(), lr=0.1), clip_grad=1.0, accum_steps=2
    )  # the last is left over
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.allclose(a, b, atol=1e-7)


def test_clipping_and_its_absence():
    for clip, expected in ((0.001, 0.001), (0.0, None)):
        model = small()
        before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        train(model, batches(1), torch.optim.SGD(model.parameters(), lr=1.0), clip_grad=clip)
        moved = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item()
        assert moved == pytest.approx(expected, rel=1e-3) if expected else moved > 0.01


def test_mixup_and_what_follows_a_step():
    model, steps = small(), []
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=3)
    criterion = build_criterion(mixing=True, smoothing=0.1)
    train(
        model,
        batches(4),
        OPTIMIZERS["fused"](model),
        criterion=criterion,
        mixup=mixup,
        after_step=lambda: steps.append(1),
    )
    assert len(steps) == 4


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 9])
def test_evaluation_equals_counting_by_hand(classes, capsys):
    torch.manual_seed(0)
    logits, labels = torch.randn(23, classes), torch.randint(0, classes, (23,))

    class Table(nn.Module):
        def forward(self, x):
            return logits[x.flatten().long()]

    data = [(torch.arange(i, min(i + 5, 23)).reshape(-1, 1).float(), labels[i : i + 5]) for i in range(0, 23, 5)]
    stats = engine.evaluate(data, Table(), CPU)
    ranks = [sorted(row.tolist(), reverse=True).index(row[label].item()) for row, label in zip(logits, labels)]
    assert (stats["count"], stats["correct1"], stats["correct5"]) == (
        23,
        sum(r < 1 for r in ranks),
        sum(r < 5 for r in ranks),
    )
    assert stats["loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}"


def test_scores_of_logits_that_are_not_finite_are_warned_of(capsys):
    """The accuracy looks like any other: here 100."""
    batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))]
    scaled = nn.Module()
    scaled.forward = lambda images: images + torch.tensor([1e30, 0.0, float("-inf")]) * 1e30
    stats = engine.evaluate(batches, scaled, CPU)
    assert not math.isfinite(stats["loss"]) and "the loss is not finite" in capsys.readouterr().err


def test_throughput_waits_for_any_device_but_the_cpu(monkeypatch, capsys):
    """Without that, a number is of how fast work is queued."""
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    for kind, expected in (("mps", 4), ("cpu", 0)):
        images = type("Images", (), {"device": torch.device(kind), "__len__": lambda self: 2})()
        waits.clear()
        engine.throughput(lambda images: None, images, torch.float32)
        assert len(waits) == expected
