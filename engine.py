"""One epoch of training, and an exact evaluation."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.errors import NonFiniteError
from utils import MetricLogger, all_reduce_sum, get_world_size, say


class LateValues:
    """Brings small tensors to the host without making it wait: from a GPU, each is read when the next one is put in."""

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
            step, copy, arrived = self.waiting
            self.waiting = None
            arrived.synchronize()
            self.read(step, copy.tolist())


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """An optimizer step that happens only where `finite`, a 0-d tensor on the device, is true."""
    if (
        scaler.is_enabled()
    ):  # a loss that is not finite has poisoned the gradients, and the scaler skips those by itself
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's fused optimizers: decided on the device
        optimizer.grad_scale, optimizer.found_inf = None, 1.0 - finite.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif finite.item():
        optimizer.step()


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    scaler: torch.amp.GradScaler,
    *,
    amp_dtype: torch.dtype = torch.float32,
    clip_grad: float = 0.0,
    mixup: Callable | None = None,
    accum_steps: int = 1,
    after_step: Callable[[], None] | None = None,
    after_update: Callable[[int, Callable[[], dict], bool], None] | None = None,
    wants_to_stop: Callable[[], bool] = lambda: False,
    progress: Mapping | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, float]:
    """Train on the batches of `loader`; an update takes accum_steps of them, and a last partial group is dropped.

    Returns the learning rate and loss averaged over the steps and processes, and the loop's times and memory. Raises
    NonFiniteError in every process at the same step where the loss of any is not finite, or a gradient without a loss
    scale; the update of that step has no effect, and the host learns of it one step later at most.

    after_update is called with the number of updates of this epoch, a function that gives the epoch's progress, and
    whether any process wants to stop, which all learn at the same update. progress: what that function gave, to go on
    from there; `loader` has the rest.
    """
    model.train()
    log = MetricLogger(lr="{value:.6f}", loss="{median:.4f} ({mean:.4f})")
    world, start, stopping = get_world_size(), 0, False
    if progress is not None:
        start = progress["batches"]
        log.load_state_dict(progress["meters"])

    def read(step: int, values: list[float]) -> None:
        nonlocal stopping
        loss, finite, stop = values
        stopping = stopping or stop > 0
        if not finite:
            what = "the gradients are not finite" if math.isfinite(loss) else f"the loss is {loss}"
            where = f"epoch {epoch}, step {step}"
            raise NonFiniteError(
                f"{what} ({where}): stopped; try a lower --lr or --amp-dtype bfloat16, the last checkpoint is intact",
                step,
            )
        log.update(loss=loss)

    late = LateValues(read)
    optimizer.zero_grad()
    steps = (start + len(loader)) // accum_steps * accum_steps
    group_finite = torch.ones((), dtype=torch.bool, device=device)  # of all batches of the present update
    for step, (images, targets) in enumerate(log.log_every(loader, steps, f"Epoch: [{epoch}]", start=start), start):
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        targets = targets.to(device, non_blocking=True)
        if mixup is not None:
            images, targets = mixup(images, targets)
        updates = (step + 1) % accum_steps == 0
        # Processes add up their gradients only for the batch that an update follows.
        with contextlib.nullcontext() if updates or world == 1 else model.no_sync():
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
                loss = criterion(model(images), targets)
            # Sums over all processes: of the loss, which is finite where the losses of all are, and of those that want
            # to stop.
            stop = torch.full_like(loss.detach(), float(wants_to_stop()))
            total, stop = all_reduce_sum(torch.stack([loss.detach(), stop])).unbind()
            finite = torch.isfinite(total)
            group_finite = group_finite & finite
            poison = torch.where(finite, 1.0, float("nan")).to(loss.dtype)
            scaler.scale(loss * poison / accum_steps).backward()
        if updates:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad if clip_grad > 0 else math.inf)
            if (
                not scaler.is_enabled()
            ):  # with a loss scale, an overflow of the gradients is skipped and the scale halved
                finite = finite & torch.isfinite(norm)
            step_if(group_finite & finite, optimizer, scaler)
            group_finite = torch.ones_like(group_finite)
            optimizer.zero_grad()
            if after_step is not None:
                after_step()
        log.update(lr=optimizer.param_groups[0]["lr"])
        late.put(step, torch.stack([total / world, finite.to(total.dtype), stop]))
        if updates and after_update is not None:

            def reached(batches: int = step + 1) -> dict:
                late.flush()  # the meters have this step too, and no state is kept after a loss that is not finite
                return {"batches": batches, "meters": log.state_dict()}

            after_update((step + 1) // accum_steps, reached, stopping)
    late.flush()
    say("Averaged stats:", log)
    return {"lr": log.meters["lr"].mean, "loss": log.meters["loss"].mean} | log.rates()


@torch.inference_mode()
def evaluate(
    loader: Iterable,
    model: nn.Module,
    device: torch.device,
    *,
    amp_dtype: torch.dtype = torch.float32,
    shared: bool = False,
    between: Callable[[], None] = lambda: None,
    rounds: int = 0,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, float]:
    """Top-1 and top-5 in percent and the mean cross entropy over every picture once.

    shared: each process has a part of the pictures, and the counts of all are added up. With fewer than five classes,
    top-5 is over all. between is called after each batch, and where this process has fewer batches than `rounds`, so
    many times in all.
    """
    model.eval()
    log = MetricLogger(**dict.fromkeys(("loss", "acc1", "acc5"), "{median:.4f} ({mean:.4f})"))
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # pictures, right, right among five
    loss_sum = torch.zeros((), dtype=torch.float64)
    for images, targets in log.log_every(loader, len(loader), "Test:"):
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        targets = targets.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
            logits = model(images)
        losses = F.cross_entropy(
            logits.double() if logits.dtype == torch.float64 else logits.float(), targets, reduction="none"
        )
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        n, loss = len(targets), losses.double().sum().item()
        right = torch.stack([targets.new_tensor(n), best[:, 0].sum(), best.sum()])
        counts += right
        loss_sum += loss
        log.update(n, loss=loss / n, acc1=100 * right[1].item() / n, acc5=100 * right[2].item() / n)
        between()
    for _ in range(rounds - len(loader)):
        between()
    if shared:
        all_reduce_sum(counts)
        loss_sum = all_reduce_sum(loss_sum.to(device))
    total, right1, right5 = counts.tolist()
    stats = {"loss": loss_sum.item() / total, "acc1": 100 * right1 / total, "acc5": 100 * right5 / total}
    say(f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}")
    return stats | {"count": total, "correct1": right1, "correct5": right5}
