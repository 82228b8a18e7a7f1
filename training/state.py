"""The state of a run: what its checkpoints hold, how it is saved, and how it is resumed."""

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from training import checkpoint, config, resume
from training.checkpoint import Checkpoint
from training.errors import INTERRUPTED, PREEMPTED, Preempted, UserError, short_reason
from training.files import BEST, CHECKPOINT, candidates, no_checkpoint, older_name, prune
from training.options import Options
from training.processes import StopSignals
from training.run_folder import RunFolder
from utils import (
    all_gather,
    any_process,
    environment,
    get_random_state,
    get_rank,
    get_world_size,
    in_main_process,
    log,
    set_random_state,
    warn,
)


@contextlib.contextmanager
def must_fit(source: str) -> Iterator[None]:
    """Turn whatever a stored state makes fail into one line."""
    try:
        yield
    except Exception as error:
        what = f"the training state does not fit ({source}): {short_reason(error, 140)}"
        raise UserError(f"{what}; --finetune takes its weights alone") from error


@dataclass
class TrainingState:
    """What a run consists of, and how far it is: `epoch` is the last one trained, -1 for none.

    progress: inside an epoch, what EpochHooks.progress takes and the number of updates; else None.
    """

    args: Options
    classes: list[str]
    recipe: dict
    device: torch.device
    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    n_parameters: int
    updates_per_epoch: int
    epoch: int
    evaluated: bool = True
    best: float = 0.0
    best_epoch: int = -1
    train_stats: dict = field(default_factory=dict)
    progress: dict | None = None

    def __post_init__(self):
        self.initial_rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def position(self) -> tuple[int, int]:
        """Whole epochs, and updates of the next one."""
        return self.epoch + 1, self.progress["updates"] if self.progress else 0

    @property
    def updates(self) -> int:
        """Updates from the first epoch on."""
        epochs, updates = self.position
        return epochs * self.updates_per_epoch + updates

    @property
    def stopped_early(self) -> bool:
        """Return True if --early-stop ends the run here."""
        args, scored = self.args, (self.epoch + 1) % self.args.eval_interval == 0
        return bool(args.early_stop) and scored and self.epoch - self.best_epoch >= args.early_stop

    def records(self) -> dict[str, object]:
        """Return what the run is made with, by file name: text, or values for JSON."""
        record = environment(self.device, self.args.seed)
        records = {"args.json": self.args.stored, "environment.json": record, "class_names.json": self.classes}
        return records | {config.NAME: self.args.as_yaml}

    def state_dict(self) -> dict:
        """Return what a checkpoint holds: the official keys first, then what an exact resume needs.

        Every process must call it.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "scaler": self.scaler.state_dict(),
            "args": self.args.stored,
            "max_accuracy": self.best,
            "evaluated": self.evaluated,
            "progress": self.progress,
            "train_stats": self.train_stats,
            "class_names": self.classes,
            "recipe": self.recipe,
            "threads": torch.get_num_threads(),
            "random_states": all_gather(get_random_state()),
        }
        state |= {"best_epoch": self.best_epoch} if self.args.early_stop else {}
        return state | ({"model_ema": self.ema.module.state_dict()} if self.ema else {})

    def check_uncorrupted(self, file: Checkpoint) -> None:
        """Raise UserError if a file of this run has corrupt weights or optimizer state. Ignores files of other runs."""
        with must_fit(file.source):
            another_run = resume.changes(resume.stored_recipe(file.payload), self.recipe)
        if another_run:
            return
        kinds = checkpoint.differences(self.model, file.weights()).items()
        if counts := ", ".join(f"{len(names)} {kind}" for kind, names in kinds if names):
            raise UserError(f"corrupt weights ({file.source}): {counts}")
        with must_fit(file.source):
            resume.optimizer_state(file.payload, self.model, self.optimizer)

    def load_weights(self, file: Checkpoint) -> None:
        """Start a new schedule from bare weights, as the official code does."""
        file.load_into(self.model, report=self.args.report)
        if self.ema:
            self.ema.set(self.model)
        log(f"resume: weights only in {file.source}, the schedule starts at epoch {self.args.start_epoch}")

    def load(self, file: Checkpoint) -> None:
        """Resume from a training state; raise UserError if it does not fit, and the run then must not go on."""
        payload, source = file.payload, file.source
        resume.check_complete(file)
        with must_fit(source):
            changed = resume.changes(resume.stored_recipe(payload), self.recipe)
            changed = changed or resume.schedule_changes(payload["lr_scheduler"], self.scheduler, self.args.epochs)
        if changed and not self.args.resume_changed:
            advice = "run it as it was, or pass --resume-changed"
            raise UserError(f"another run than the checkpoint's ({source}): {', '.join(changed)}; {advice}")
        if changed:
            log(f"resume: changed by --resume-changed: {', '.join(changed)}")
        with must_fit(source):
            optimizer_state = resume.optimizer_state(payload, self.model, self.optimizer)
        file.load_into(self.model, report=self.args.report)
        if self.ema:
            file.load_into(self.ema.module, key="model_ema" if "model_ema" in payload else None)
            if self.ema.use_warmup and "model_ema_warmup" not in resume.stored_recipe(payload):
                log("resume: --model-ema-warmup from here on, the checkpoint's average is without")
        with must_fit(source):
            groups = payload["optimizer"]["param_groups"]
            resume.load_optimizer_state(self.optimizer, self.model, optimizer_state, groups)
            if payload.get("scaler") and self.scaler.is_enabled():
                resume.check_scale(payload["scaler"])
                self.scaler.load_state_dict(payload["scaler"])
            self.epoch, self.best = payload["epoch"], payload.get("max_accuracy", 0.0)
            self.best_epoch = payload.get("best_epoch", self.epoch)
            self.evaluated, self.train_stats = bool(payload.get("evaluated", True)), payload.get("train_stats") or {}
            self.progress = payload.get("progress")
            self.set_rates([group["lr"] for group in groups] if "recipe" in payload and not changed else None)
            if self.progress:
                updates = self.progress["updates"]
                if updates > self.updates_per_epoch:
                    raise ValueError(f"{updates} updates of an epoch that has {self.updates_per_epoch} here")
                # In batches of this process, which may be another share of the global batch than before.
                self.progress["batches"] = updates * self.args.grad_accum_steps
            self.restore_random(payload.get("random_states") or [], threads=payload.get("threads"))

    def set_rates(self, stored: list[float] | None) -> None:
        """Set the rates of the next epoch: as stored, or by the schedule, a function of the epochs trained."""
        if stored is None and self.epoch >= 0:
            return self.scheduler.step(self.epoch)
        rates = self.initial_rates if stored is None else stored
        resume.check_rates(rates, len(self.initial_rates))
        for group, rate in zip(self.optimizer.param_groups, rates):  # with its lr_scale already
            group["lr"] = rate

    def restore_random(self, states: list[dict], *, threads: int | None) -> None:
        """Restore the random states, or log why the bits may differ from an uninterrupted run's."""
        world, current, reason = get_world_size(), torch.get_num_threads(), ""
        if len(states) == world:
            set_random_state(states[get_rank()])
            if self.device.type == "cpu" and threads != current:
                reason = f"{threads or 'other'} threads a process then, {current} now"
        else:
            counts = f"{len(states) or 'other'} processes then, {world} now"
            same = "each update has the same images, augmented the same, if the global batch is equal"
            reason = f"{counts}: {same}; Mixup and drop path draw anew"
        if reason:
            log(f"resume: {reason}; sums round differently, so the bits may differ from an uninterrupted run's")


class CheckpointManager:
    """Save a run's state into its folder and resume it from there. Every process must call save and resume."""

    def __init__(self, state: TrainingState, folder: RunFolder, signals: StopSignals):
        self.state, self.folder, self.signals = state, folder, signals
        self.saved_at = None  # the position of the run that CHECKPOINT holds

    # ------------------------------------------------------------ saving

    def save(self, *, best: bool = False) -> bool:
        """Return True if saved; raise UserError on failure, or with --keep-going warn."""
        payload, position, keep = self.state.state_dict(), self.state.position, self.state.args.checkpoint_hist
        path = self.folder.path

        def write() -> None:
            if best:
                checkpoint.save(path / BEST, payload)
            keep_old = self.saved_at not in (None, position) and keep > 1
            keep_as = path / older_name(*self.saved_at) if keep_old else None
            checkpoint.save(path / CHECKPOINT, payload, keep_as=keep_as)
            for error in prune(path, keep, position):  # of files that nobody needs: the state is saved
                warn(f"cannot delete an old checkpoint ({error.filename}): {error.strerror}")

        if not self.folder.attempt(write):
            return False
        self.saved_at = position
        self.report_progress()
        return True

    def report_progress(self) -> None:
        self.folder.status.progress = {"epoch": self.state.epoch, "updates": self.state.position[1]}

    def after_update(self, updates: int, progress: Callable[[], dict], stopping: bool) -> None:
        """Save the state inside an epoch if --checkpoint-interval or a signal asks for it."""
        state, every = self.state, self.state.args.checkpoint_interval
        if stopping or (every and updates % every == 0 and updates < state.updates_per_epoch):
            state.progress = progress() | {"updates": updates}
            saved = self.save()
            if stopping and not saved:
                advice = "make room, --resume auto continues from the one before"
                raise UserError(f"stopped, and the state could not be saved ({self.folder.path}): {advice}")
            if stopping:
                raise self.preempted()
            state.progress = None

    def stop_if_asked(self) -> None:
        """Stop inside an evaluation, whose beginning is saved."""
        if any_process(self.signals.poll("eval", self.state)):
            raise self.preempted()

    def preempted(self) -> Preempted:
        epochs, updates = self.state.position
        by = self.signals.received or "a signal to another process"
        where = f"after {epochs} epochs and {updates} updates"
        code = INTERRUPTED if by == "SIGINT" else PREEMPTED
        return Preempted(f"stopped by {by} {where}, all saved: continue with --resume auto", code)

    # ------------------------------------------------------------ resuming

    def resume(self, source: str) -> None:
        """Resume from a file or a folder's newest, "auto": the run's folder; bare weights start a new schedule."""
        state, path = self.state, self.folder.path
        if not source:
            return
        if source == "auto" or os.path.isdir(source):
            folder = path if source == "auto" else Path(source)
            if newest := in_main_process(lambda: self.newest(folder)):
                source = newest
            elif source == "auto":
                return log(f"resume: no checkpoint in {path}, the run starts")
            else:
                raise no_checkpoint(source)
        self.folder.resumed = Path(source).parent.resolve() == path.resolve()
        if not self.folder.resumed:
            self.folder.check_no_run()
        file = Checkpoint.open(source)
        if file.class_names not in (None, state.classes):
            counts = f"{len(state.classes)} here, {len(file.class_names)} in {source}"
            raise UserError(f"other classes than the checkpoint's ({state.args.data_path}): {counts}")
        if not resume.is_training_state(file.payload):
            self.folder.check_no_run()  # a new schedule starts
            return state.load_weights(file)
        state.load(file)
        if Path(source).resolve() == (path / CHECKPOINT).resolve():
            self.saved_at = state.position
        best, epoch = in_main_process(self.best_of_folder) if self.folder.resumed else (0.0, -1)
        if best > state.best:
            state.best, state.best_epoch = best, epoch
        self.report_progress()
        inside = f" and {state.position[1]} updates" if state.progress else ""
        log(f"resume: {source}, after {state.epoch + 1} epochs{inside}, max accuracy {state.best:.2f}%")

    def newest(self, folder: Path) -> str:
        """Return the newest usable checkpoint of a folder, "" if it has none; warn of corrupt ones, and keep them."""
        found = candidates(folder)
        for path in found:
            try:
                file = Checkpoint.open(path)
                resume.check_complete(file)
                self.state.check_uncorrupted(file)
                return file.source
            except UserError as error:
                warn(f"{error}; trying the checkpoint before it")
        if found:
            state = f"all {len(found)} are broken, nothing was deleted"
            raise UserError(f"no checkpoint to resume from ({folder}): {state}; --overwrite starts again")
        return ""

    def best_of_folder(self) -> tuple[float, int]:
        """Return score and epoch of the folder's best checkpoint, which a worse one must not replace; 0 without one."""
        path = self.folder.path / BEST
        if not path.is_file():
            return 0.0, -1
        try:
            file = Checkpoint.open(path)
            resume.check_complete(file)
            return file.payload.get("max_accuracy", 0.0), file.payload["epoch"]
        except UserError as error:
            warn(f"{error}; the next best epoch will replace it")
            return 0.0, -1
