"""One epoch of training, an exact evaluation, and the throughput of inference."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.errors import NonFiniteError
from utils import MetricLogger, all_reduce_sum, get_world_size, log, warn


@dataclass(frozen=True)
class StepSettings:
    """How a training step is computed. An update takes accum_steps batches; clip_grad=0: no limit of the norm."""

    amp_dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    clip_grad: float = 0.0
    accum_steps: int = 1
    mixup: Callable | None = None
    train_mode: Callable[[nn.Module], object] = nn.Module.train


@dataclass
class EpochHooks:
    """What the caller does at fixed points of an epoch, and where the epoch starts.

    wants_to_stop gets each batch's number; after_update the number of updates of this epoch, a function that returns
    the epoch's progress, and whether any process wants to stop, which all learn at the same update. progress: what that
    function returned, to start there; the loader then has the remaining batches.
    """

    after_step: Callable[[], None] | None = None
    wants_to_stop: Callable[[int], bool] = lambda batch: False
    after_update: Callable[[int, Callable[[], dict], bool], None] | None = None
    progress: Mapping | None = None


class LateValues:
    """Copy small tensors to the host asynchronously: from a GPU, each is read when the next one is put in."""

    def __init__(self, read: Callable[[int, list[float]], None]):
        self.read, self.waiting = read, None

    def put(self, step: int, values: Tensor) -> None:
        if not values.is_cuda:
            return self.read(step, values.tolist())
        copy = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.flush()
        self.waiting = step, copy, arrived

    def flush(self) -> None:
        if self.waiting is not None:
            (step, copy, arrived), self.waiting = self.waiting, None
            arrived.synchronize()
            self.read(step, copy.tolist())


class EpochLog:
    """The meters of an epoch, which raise NonFiniteError at a step whose loss or gradients are not finite."""

    def __init__(self, epoch: int, progress: Mapping | None):
        self.epoch, self.stopping, self.late = epoch, False, LateValues(self.read)
        self.meters = MetricLogger(lr="{value:.6f}", loss="{median:.4f} ({mean:.4f})")
        self.start = progress["batches"] if progress else 0
        if progress:
            self.meters.load_state_dict(progress["meters"])

    def read(self, step: int, values: list[float]) -> None:
        loss, finite, stop = values
        self.stopping = self.stopping or stop > 0
        if not finite:
            what = "the gradients are not finite" if math.isfinite(loss) else f"the loss is {loss}"
            advice = "stopped; try a lower --lr or --amp-dtype bfloat16, the last checkpoint is intact"
            raise NonFiniteError(f"{what} (epoch {self.epoch}, step {step}): {advice}", step)
        self.meters.update(loss=loss)

    def progress(self, batches: int) -> dict:
        """Return where the epoch is, with the meters of all steps: nothing is saved after a loss that is not finite."""
        self.late.flush()
        return {"batches": batches, "meters": self.meters.state_dict()}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    scaler: torch.amp.GradScaler,
    settings: StepSettings = StepSettings(),  # noqa: B008  frozen
    hooks: EpochHooks | None = None,
) -> dict[str, float]:
    """Train on the batches of `loader`; a last group of fewer than accum_steps batches is dropped.

    Returns learning rate and loss averaged over steps and processes, and times and memory. Raises NonFiniteError in
    every process at the same step if the loss of any is not finite, or a gradient without a loss scale; the update of
    that step has no effect, and the host learns of it one step later at most.
    """
    settings.train_mode(model)
    optimizer.zero_grad()
    hooks, accum_steps = hooks or EpochHooks(), settings.accum_steps
    epoch_log = EpochLog(epoch, hooks.progress)
    meters, start = epoch_log.meters, epoch_log.start
    steps = (start + len(loader)) // accum_steps * accum_steps
    group_finite = torch.ones((), dtype=torch.bool, device=device)  # of all batches of the present update
    for step, (images, targets) in enumerate(meters.log_every(loader, steps, f"Epoch: [{epoch}]", start=start), start):
        images = images.to(device, non_blocking=True, memory_format=settings.memory_format)
        targets = targets.to(device, non_blocking=True)
        if settings.mixup is not None:
            images, targets = settings.mixup(images, targets)
        is_last_of_group = (step + 1) % accum_steps == 0
        # Processes sum their gradients only for the batch that an update follows.
        with contextlib.nullcontext() if is_last_of_group or get_world_size() == 1 else model.no_sync():
            with autocast(device, settings.amp_dtype):
                loss = criterion(model(images), targets)
            # Sums over all processes: of the loss, finite if the losses of all are, and of those that want to stop.
            stop = torch.full_like(loss.detach(), float(hooks.wants_to_stop(step)))
            total, stop = all_reduce_sum(torch.stack([loss.detach(), stop])).unbind()
            finite = torch.isfinite(total)
            group_finite = group_finite & finite
            poison = torch.where(finite, 1.0, float("nan")).to(loss.dtype)
            scaler.scale(loss * poison / accum_steps).backward()
        if is_last_of_group:
            finite = finite & update(model, optimizer, scaler, settings.clip_grad, group_finite)
            group_finite = torch.ones_like(group_finite)
            if hooks.after_step is not None:
                hooks.after_step()
        meters.update(lr=max(group["lr"] for group in optimizer.param_groups))
        epoch_log.late.put(step, torch.stack([total / get_world_size(), finite.to(total.dtype), stop]))
        if is_last_of_group and hooks.after_update is not None:
            hooks.after_update((step + 1) // accum_steps, lambda n=step + 1: epoch_log.progress(n), epoch_log.stopping)
    epoch_log.late.flush()
    log("Averaged stats:", meters)
    return {"lr": meters.meters["lr"].mean, "loss": meters.meters["loss"].mean} | meters.rates()


def update(model: nn.Module, optimizer, scaler: torch.amp.GradScaler, clip_grad: float, finite: Tensor) -> Tensor:
    """Clip and apply the gradients if `finite` (0-d) and they are; return whether they are, true with a loss scale."""
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad if clip_grad > 0 else math.inf)
    # With a loss scale, an overflow of the gradients is skipped and the scale halved.
    finite_norm = torch.isfinite(norm) | scaler.is_enabled()
    if scaler.is_enabled():  # a loss that is not finite has made the gradients so, and the scaler skips those by itself
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's fused optimizers: decided on the device
        optimizer.grad_scale, optimizer.found_inf = None, 1.0 - (finite & finite_norm).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif finite & finite_norm:
        optimizer.step()
    optimizer.zero_grad()
    return finite_norm


@torch.inference_mode()
def evaluate(
    loader: Iterable,
    model: nn.Module,
    device: torch.device,
    *,
    amp_dtype: torch.dtype = torch.float32,
    shared: bool = False,
    observe: Callable[[Tensor, Tensor, Tensor], None] = lambda *batch: None,
    between: Callable[[], None] = lambda: None,
    rounds: int = 0,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, float]:
    """Return top-1 and top-5 (of fewer classes, over all) in percent and the mean cross entropy over every image once.

    shared: each process has a part of the images; counts are summed over all. observe: gets each batch's logits, top-5
    classes, and targets. between: called after each batch, and at least `rounds` times, in all processes as often.
    """
    model.eval()
    meters = MetricLogger(**dict.fromkeys(("loss", "acc1", "acc5"), "{median:.4f} ({mean:.4f})"))
    sums = torch.zeros(4, dtype=torch.float64)  # of images, correct ones, correct among five, losses
    for images, targets in meters.log_every(loader, len(loader), "Test:"):
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        targets = targets.to(device, non_blocking=True)
        with autocast(device, amp_dtype):
            logits = model(images)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits, targets, reduction="none").cpu().double().sum().item()
        n, hits = len(targets), (top == targets[:, None]).sum(0).tolist()  # at each rank
        sums += torch.tensor([n, hits[0], sum(hits), loss], dtype=torch.float64)
        meters.update(n, loss=loss / n, acc1=100 * hits[0] / n, acc5=100 * sum(hits) / n)
        observe(logits, top, targets)
        between()
    for _ in range(rounds - len(loader)):
        between()
    if shared:
        sums = all_reduce_sum(sums.to(device))
    total, correct1, correct5 = map(int, sums[:3].tolist())
    stats = {"loss": sums[3].item() / total, "acc1": 100 * correct1 / total, "acc5": 100 * correct5 / total}
    log(f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}")
    if not math.isfinite(stats["loss"]):
        warn("the loss is not finite (above), so the accuracy means nothing: try --amp-dtype float32")
    return stats | {"count": total, "correct1": correct1, "correct5": correct5}


@torch.inference_mode()
def throughput(model: nn.Module, images: Tensor, amp_dtype: torch.dtype) -> None:
    """Log images per second of inference: the mean of 30 runs on one batch, after 50 runs of warm-up (CPU: 2)."""
    synchronize = (lambda: None) if images.device.type == "cpu" else torch.accelerator.synchronize

    def seconds(runs: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(runs):
            with autocast(images.device, amp_dtype):
                model(images)
        synchronize()
        return time.perf_counter() - start

    seconds(2 if images.device.type == "cpu" else 50)
    log(f"throughput averaged with 30 times\nbatch_size {len(images)} throughput {30 * len(images) / seconds(30)}")
