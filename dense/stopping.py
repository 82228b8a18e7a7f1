"""Stop a training run at a signal, with everything saved, and start one inside an epoch."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from dense.work_folder import LAST
from engine import LateValues
from training import files
from training.errors import INTERRUPTED, PREEMPTED, Preempted
from training.processes import StopSignals, loading_process
from utils import all_reduce_sum, get_world_size, in_main_process


class StopRun(Hook):
    """Save and raise Preempted when any process got a signal; all learn of it before the same step.

    Before an iteration everything about the one before is done, its validation too. A validation that was begun is
    repeated by the resumed run.
    """

    priority = "HIGHEST"  # before other hooks count this iteration

    def __init__(self, signals: StopSignals):
        self.signals, self.stopping, self.late = signals, False, LateValues(self.read)
        self.device = get_device() if get_world_size() > 1 else "cpu"

    def read(self, _step: int, values: list[float]) -> None:
        self.stopping = self.stopping or values[0] > 0

    def poll(self, runner: Runner, phase: str) -> bool:
        """Return in every process whether any was asked to stop; on a GPU, one call later."""
        asked = torch.tensor([float(self.signals.poll(phase, runner))], device=self.device)
        self.late.put(runner.iter, all_reduce_sum(asked))
        return self.stopping

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        # Gradients that are being accumulated are not saved.
        if self.poll(runner, "train") and runner.optim_wrapper.should_update():
            self.stop(runner)

    def before_val(self, runner: Runner) -> None:
        if self.poll(runner, "val"):
            self.stop(runner, validate=True)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None) -> None:
        loader = runner.val_dataloader
        shared = len(loader.dataset) // (get_world_size() * (loader.batch_size or 1))  # batches that every process has
        if batch_idx < shared and self.poll(runner, "val"):
            self.stop(runner, validate=True)

    def stop(self, runner: Runner, *, validate: bool = False) -> None:
        path = Path(runner.work_dir, f"iter_{runner.iter}.pth")

        def save() -> None:
            meta = dict(epoch=runner.epoch, iter=runner.iter, validate=validate)
            runner.save_checkpoint(runner.work_dir, path.name, meta=meta)
            files.write_text(path.with_name(LAST), str(path))

        in_main_process(save)
        by = self.signals.received or "a signal to another process"
        where = f"after {runner.iter} iterations"
        code = INTERRUPTED if by == "SIGINT" else PREEMPTED
        raise Preempted(f"stopped by {by} {where}, all saved: continue with --resume-from {path}", code)


def start_worker(inner: partial | None, index: int) -> None:
    """Start a loader worker as mmengine does, away from the launcher's signals."""
    if inner is not None:
        inner(index)
    loading_process(index)


def rest_of_epoch(loader: DataLoader, done: int) -> DataLoader:
    """Return a loader of an epoch's batches after the first `done`, without loading those."""
    names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor")
    options = {name: getattr(loader, name) for name in (*names, "multiprocessing_context")}
    batches: Iterator = itertools.islice(loader.batch_sampler, done, None)
    return DataLoader(loader.dataset, batch_sampler=batches, **options)


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop, which starts inside an epoch if `_iter` is beyond the epoch's beginning."""

    def run_epoch(self) -> None:
        done = self._iter - self._epoch * len(self.dataloader)
        self.runner.call_hook("before_train_epoch")  # sets the epoch of the order
        self.runner.model.train()
        batches = rest_of_epoch(self.dataloader, done) if done else self.dataloader
        for index, batch in enumerate(batches, start=done):
            self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1
