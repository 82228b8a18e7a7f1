"""Train, evaluate and time Twins on pictures: the published command lines, on one GPU, many, or a CPU.

python main.py --help lists the options; README.md has a command for each model of the paper.
"""

import sys

from training import errors, files, launcher, options

if (
    __name__ == "__main__"
):  # before torch is imported, so that --help, a wrong option and a folder in use are answered at once
    ARGS, WRITTEN = options.parse_args(sys.argv[1:])
    if launcher.launched():
        launcher.end_with_launcher()
    elif not (ARGS.eval or ARGS.throughout) and (taken_by := files.owner(ARGS.output_dir or ARGS.model)):
        print(f"main.py: error: {files.in_use(ARGS.output_dir or ARGS.model, taken_by)}", file=sys.stderr)
        sys.exit(2)

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import argparse
import contextlib
import datetime
import difflib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import datasets
import gvt
import utils
from engine import evaluate, train_one_epoch
from losses import build_criterion
from samplers import RASampler, ShuffleSampler, eval_indices
from training import checkpoint, processes, resume, run_folder
from training.errors import NonFiniteError, Preempted, UserError
from training.files import BEST, CHECKPOINT, LOG
from utils import say

# The global batches that the published logs were made with (from their learning rates).
RECIPE_BATCH = dict.fromkeys(gvt.MODEL_NAMES, 1024) | {
    "pcpvt_small_v0": 1280,
    "alt_gvt_small": 2048,
    "alt_gvt_demo": None,
}
FUSED = (
    "adam",
    "adamw",
)  # optimizers that torch can run in one kernel, and skip on the device (sgd's skips leave momentum unset)
NON_FINITE = "non_finite.json"  # in a run's folder: which pictures a step had whose loss was not finite
RUN_FILES = (CHECKPOINT, BEST, LOG)  # a folder with one of them holds a run


def main(args: argparse.Namespace, written: set[str]) -> None:
    check_model_name(args.model)
    check_folder(args)
    set_determinism(args.deterministic)
    device = utils.init_device(
        args.device, written="device" in written, dist_url=args.dist_url, timeout=args.dist_timeout
    )
    processes.meet_peers()
    with utils.process_group():
        for name, reason in options.without_effect(args, written).items():
            utils.warn(f"--{name.replace('_', '-')} has no effect ({reason})")
        say(args)
        if args.throughout:
            throughput(args, written, device)
        elif args.eval:
            evaluate_checkpoint(args, written, device)
        else:
            Run(args, written, device).train()


# ---------------------------------------------------------------- what all modes share


def check_model_name(name: str) -> None:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, gvt.MODEL_NAMES, n=3, cutoff=0.4) or difflib.get_close_matches(
            name, timm.list_models(), n=3
        )
        raise UserError(f"unknown model (--model {name}): did you mean {' or '.join(close or list(gvt.MODEL_NAMES))}?")


def check_folder(args: argparse.Namespace) -> None:
    """Before anything is made: a run is not written over by accident, and what is asked for has what it needs."""
    if args.eval and not args.resume:
        raise UserError("nothing to evaluate (--eval): give the weights as --resume FILE")
    if args.input_size < gvt.SMALLEST and args.model in gvt.MODEL_NAMES:
        raise UserError(
            f"too small (--input-size {args.input_size}): Twins needs pictures of at least {gvt.SMALLEST} x "
            f"{gvt.SMALLEST}"
        )
    if args.sched == "plateau":
        raise UserError(
            "a schedule that needs scores (--sched plateau): the rate is set by the epoch alone, choose cosine or step"
        )
    if not (args.eval or args.throughout or args.resume or args.overwrite):
        check_no_run(args)


def set_determinism(wanted: bool) -> None:
    """Kernels that give the same bits each time, where they have to be asked for: on a GPU, at some cost in speed."""
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def check_no_run(args: argparse.Namespace) -> None:
    held = [name for name in RUN_FILES if (output_dir(args) / name).exists()]
    if held:
        raise UserError(
            f"the folder holds a run ({output_dir(args) / held[0]}): --resume it, or --overwrite it, or choose another "
            "--output_dir"
        )


def output_dir(args: argparse.Namespace) -> Path:
    return Path(args.output_dir or args.model)


def eval_batch(args: argparse.Namespace) -> int:
    return int(1.5 * args.batch_size)  # as published


def workers(args: argparse.Namespace, written: set[str]) -> int:
    """As written; else the published 10, but no more than this process's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return args.num_workers if "num_workers" in written else min(args.num_workers, max(share, 1))


def precision(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    return getattr(torch, args.amp_dtype or ("float16" if device.type == "cuda" else "float32"))


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def numerics(args: argparse.Namespace, device: torch.device) -> dict:
    """What training and evaluation take alike."""
    return dict(amp_dtype=precision(args, device), memory_format=memory_format(args))


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    say(f"Creating model: {args.model}")
    return timm.create_model(args.model, num_classes=num_classes, drop_rate=args.drop, drop_path_rate=args.drop_path)


def ready(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model on its device, as the options want it laid out."""
    say(f"number of params: {count_parameters(model)}")
    if args.grad_checkpointing == "mlp":
        if not isinstance(model, gvt.Twins):
            raise UserError(
                f"MLPs alone can be recomputed in models of gvt.py (--grad-checkpointing mlp, --model {args.model}): "
                "leave mlp away"
            )
        model.set_grad_checkpointing(part="mlp")
    elif args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model.to(device, memory_format=memory_format(args))


def compiled(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    # dynamic=False: the last, smaller batch compiles once more, which takes much less than one graph for any size.
    try:
        return torch.compile(model, backend=args.torchcompile, dynamic=False) if args.torchcompile else model
    except RuntimeError as error:
        raise UserError(
            f"no such compiler (--torchcompile {args.torchcompile}): write it without a name for inductor"
        ) from error


def loading(args: argparse.Namespace, written: set[str], device: torch.device) -> dict:
    """What all loaders take alike."""
    return dict(
        workers=workers(args, written), pin_memory=args.pin_mem and device.type == "cuda", timeout=args.loader_timeout
    )


def val_pictures(args: argparse.Namespace, classes: list[str] | None = None):
    return datasets.build_dataset(
        "val", args, transform=datasets.InBytes(datasets.build_transform(False, args)), classes=classes
    )


def build_eval_loader(args: argparse.Namespace, written: set[str], dataset, device: torch.device) -> Iterable:
    shares = dict(rank=utils.get_rank(), world=utils.get_world_size()) if args.dist_eval else {}
    indices = eval_indices(len(dataset), **shares)
    if missing := getattr(dataset, "missing", []):
        say(
            f"val has no pictures of {len(missing)} of {len(dataset.classes)} classes ({', '.join(missing[:3])}): "
            "scored with training's indices"
        )
    return datasets.build_loader(
        dataset, indices, batch_size=eval_batch(args), drop_last=False, **loading(args, written, device)
    )


# ---------------------------------------------------------------- evaluation and throughput


def evaluate_checkpoint(args: argparse.Namespace, written: set[str], device: torch.device) -> None:
    payload = checkpoint.load(args.resume)
    state = checkpoint.weights(payload, source=args.resume, key="model_ema" if args.model_ema else None)
    head = state.get("head.weight")
    if head is None or head.ndim != 2:
        raise UserError(f"no classifier in the weights ({args.resume}): expected head.weight, --finetune can add one")
    classes, stored = None, checkpoint.class_names(payload, source=args.resume)
    if args.data_set == "IMNET":
        classes = datasets.match_classes(datasets.class_folders(Path(args.data_path) / "val"), stored, len(head))
    elif stored is not None:
        classes = stored
    dataset = val_pictures(args, classes)
    if len(dataset.classes) != len(head):
        raise UserError(
            f"other classes than the weights' ({args.data_path}): {len(dataset.classes)}, the classifier has "
            f"{len(head)}"
        )
    model = build_model(args, len(head))
    checkpoint.load_into(model, state, source=args.resume, report=args.report)
    model = compiled(ready(model, args, device), args)
    loader = build_eval_loader(args, written, dataset, device)
    stats = evaluate(loader, model, device, shared=args.dist_eval, **numerics(args, device))
    say(f"Accuracy of the network on the {len(dataset)} test images: {stats['acc1']:.1f}%")


@torch.inference_mode()
def throughput(args: argparse.Namespace, written: set[str], device: torch.device) -> None:
    """Pictures per second in float32 unless --amp-dtype says otherwise, at the evaluation's batch size (1.5 x
    --batch-size).
    """
    batch = eval_batch(args)
    if "data_path" in written:
        dataset = val_pictures(args)
        images = next(iter(build_eval_loader(args, written, dataset, device)))[0]
        batch = len(images)
    else:
        say("pictures: random numbers (no --data-path)")
        images = torch.randn(batch, 3, args.input_size, args.input_size)
    model = compiled(ready(build_model(args, 1000), args, device).eval(), args)
    images = images.to(device, memory_format=memory_format(args))
    dtype = getattr(torch, args.amp_dtype or "float32")

    def run(times: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                model(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run(50 if device.type == "cuda" else 2)
    say("throughput averaged with 30 times")
    say(f"batch_size {batch} throughput {30 * batch / run(30)}")


# ---------------------------------------------------------------- training


class Run:
    """A training run: what it is built from, and the epoch it is at."""

    def __init__(self, args: argparse.Namespace, written: set[str], device: torch.device):
        self.args, self.device, self.folder = args, device, output_dir(args)
        self.signals = processes.StopSignals()
        self.status = run_folder.Status(self.folder, utils.in_main_process(run_folder.now))
        rank, world = utils.get_rank(), utils.get_world_size()
        utils.seed_everything(args.seed + rank)
        transform = datasets.InBytes(datasets.build_transform(True, args), fast_augment=args.fast_augment)
        train_set = datasets.build_dataset("train", args, transform=transform)
        self.classes = list(train_set.classes)
        val_set = val_pictures(args, self.classes)
        kind = RASampler if args.repeated_aug else ShuffleSampler
        self.sampler = kind(len(train_set), seed=args.seed, rank=rank, world=world)
        self.keyed = datasets.Keyed(train_set, args.seed)
        self.loader = datasets.build_loader(
            self.keyed, self.sampler, batch_size=args.batch_size, drop_last=True, **loading(args, written, device)
        )
        self.val_loader = build_eval_loader(args, written, val_set, device)
        self.val_size = len(val_set)
        self.updates = len(self.loader) // args.grad_accum_steps
        if not self.updates:
            shares = f"--batch-size {args.batch_size} x {world} processes x --grad-accum-steps {args.grad_accum_steps}"
            raise UserError(
                f"a global batch larger than the data set ({shares}, {len(train_set)} pictures): make it smaller"
            )

        mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
        if mixing and args.batch_size % 2:
            raise UserError(
                f"an odd batch with Mixup (--batch-size {args.batch_size}): make it even, or --mixup 0 --cutmix 0"
            )
        self.mixup = self.build_mixup() if mixing else None
        self.criterion = build_criterion(mixing=mixing, smoothing=args.smoothing)

        self.model = build_model(args, len(self.classes))
        if args.finetune:
            self.load_finetune(args.finetune)
        ready(self.model, args, device)
        self.n_parameters = count_parameters(self.model)
        self.compiled = compiled(self.model, args)
        ids = [device.index] if device.type == "cuda" else None
        self.parallel = DistributedDataParallel(self.compiled, device_ids=ids) if world > 1 else self.compiled
        # After DistributedDataParallel has given all processes the weights of the first.
        self.ema = ModelEmaV3(self.model, decay=args.model_ema_decay) if args.model_ema else None

        self.global_batch = args.batch_size * world * args.grad_accum_steps
        self.lr = args.lr * self.global_batch / 512
        self.optimizer = self.build_optimizer()
        try:
            self.scheduler, _ = create_scheduler(args, self.optimizer)
        except ValueError as error:
            raise UserError(
                f"no such schedule (--sched {args.sched}): {str(error).splitlines()[0]}, the published one is cosine"
            ) from error
        self.initial_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision(args, device) == torch.float16)
        self.recipe = resume.recipe(
            vars(args),
            amp_dtype=str(precision(args, device)).removeprefix("torch."),
            lr=self.lr,
            global_batch=self.global_batch,
            data=datasets.fingerprint(train_set, val_set, root=args.data_path),
        )
        self.epoch, self.evaluated, self.best, self.stats = args.start_epoch - 1, True, 0.0, {}
        self.progress = None  # inside an epoch: how far it is
        self.inside = False  # whether the run continues from a checkpoint of its own folder
        self.kept = None  # the place of the run that CHECKPOINT holds: whole epochs, updates of the next one
        self.order_buckets()
        if args.resume:
            self.restore()

    def order_buckets(self) -> None:
        """Two steps without effect, after which DistributedDataParallel adds gradients up in its final order.

        It orders its buckets anew after a first backward pass. A continued run would otherwise add up in another order
        in its first step than the uninterrupted one did, and from three processes on end with other bits.
        """
        if utils.get_world_size() == 1:
            return
        states, buffers = utils.get_random_state(), [buffer.clone() for buffer in self.model.buffers()]
        pictures = torch.zeros(self.args.batch_size, 3, self.args.input_size, self.args.input_size, device=self.device)
        dtype = precision(self.args, self.device)
        for _ in range(2):
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                logits = self.parallel(pictures.contiguous(memory_format=memory_format(self.args)))
            logits.float().sum().backward()
        self.model.zero_grad(set_to_none=True)
        for buffer, value in zip(self.model.buffers(), buffers):
            buffer.copy_(value)
        utils.set_random_state(states)

    def build_mixup(self) -> Mixup:
        args = self.args
        return Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=len(self.classes),
        )

    def build_optimizer(self) -> torch.optim.Optimizer:
        settings = optimizer_kwargs(self.args) | {"lr": self.lr}
        if self.args.opt.lower() in FUSED:
            settings["fused"] = True
        try:
            return create_optimizer_v2(self.model, **settings)
        except (ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"cannot make the optimizer (--opt {self.args.opt}): {str(error).splitlines()[0]}"
            ) from error

    def load_finetune(self, source: str) -> None:
        """Weights of another training; a classifier of another size is left as it is, new."""
        state, own, may_lack = checkpoint.weights(checkpoint.load(source), source=source), self.model.state_dict(), ()
        if "head.weight" in state and state["head.weight"].shape != own["head.weight"].shape:
            there = "x".join(map(str, state["head.weight"].shape[:1]))
            say(
                f"finetune: the classifier of {source} has {there} classes, this data set {len(self.classes)}: made "
                "anew"
            )
            state = {name: value for name, value in state.items() if not name.startswith("head.")}
        if "head.weight" not in state:
            may_lack = ("head.",)
        # The norms of a segmentor's or detector's maps have no place in a classifier.
        load = dict(may_lack=may_lack, may_have=("norm_list.",), report=self.args.report)
        lacking, surplus = checkpoint.load_into(self.model, state, source=source, **load).values()
        used = f"{len(state) - len(surplus)} of {len(own)} tensors loaded from {source}"
        say(
            f"finetune: {used}; not loaded: {', '.join(sorted(lacking)) or 'none'}; not used: "
            f"{', '.join(surplus) or 'none'}"
        )

    # ------------------------------------------------------------ state

    def state(self) -> dict:
        """What a checkpoint holds: the published keys first, then what an exact continuation needs. Every process must
        call it.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "scaler": self.scaler.state_dict(),
            "args": vars(self.args),
            "max_accuracy": self.best,
            "evaluated": self.evaluated,
            "progress": self.progress,
            "train_stats": self.stats,
            "class_names": self.classes,
            "recipe": self.recipe,
            "threads": torch.get_num_threads(),
            "random_states": utils.all_gather(utils.get_random_state()),
        }
        return state | ({"model_ema": self.ema.module.state_dict()} if self.ema else {})

    def place(self) -> tuple[int, int]:
        """How far the run is: whole epochs, and updates of the next one."""
        return self.epoch + 1, self.progress["updates"] if self.progress else 0

    def save(self, *, best: bool = False) -> bool:
        """Whether it could be written; where not, that is an error without --keep-going. Every process must call it."""
        state, place = self.state(), self.place()

        def write() -> None:
            if best:
                checkpoint.save(self.folder / BEST, state)
            another = self.kept is not None and self.kept != place and self.args.checkpoint_hist > 1
            checkpoint.save(
                self.folder / CHECKPOINT,
                state,
                keep_as=self.folder / files.earlier_name(*self.kept) if another else None,
            )
            files.prune(self.folder, self.args.checkpoint_hist, place)

        if not self.written(write):
            return False
        self.kept = place
        self.status.place = {"epoch": self.epoch, "updates": place[1]}
        return True

    def written(self, write: Callable[[], None]) -> bool:
        """Let the first process write; what cannot be written is an error in all, or with --keep-going a warning."""
        try:
            utils.in_main_process(write)
            return True
        except UserError as error:
            if not self.args.keep_going:
                raise
            utils.warn(f"going on (--keep-going): {error}")
            return False

    def newest(self) -> str:
        """The newest checkpoint of the folder that can be read; broken ones are named and left as they are. "" for an
        empty folder.
        """
        found = files.candidates(self.folder)
        for path in found:
            try:
                payload = checkpoint.load(path)
                resume.check_complete(payload, source=path)
                self.check_fits(payload, str(path))
                return str(path)
            except UserError as error:
                utils.warn(f"{error}; trying the checkpoint before it")
        if found:
            raise UserError(
                f"no checkpoint to go on from ({self.folder}): all {len(found)} are broken, nothing was deleted; "
                "--overwrite starts anew"
            )
        return ""

    def check_fits(self, payload: dict, source: str) -> None:
        """Refuse a file of this run whose weights or optimizer's state are spoiled. One of another run is another
        matter.
        """
        try:
            another = resume.changes(resume.stored_recipe(payload), self.recipe)
        except Exception as error:
            raise self.unfit(source, error) from error
        if not another:
            kinds = checkpoint.differences(self.model, checkpoint.weights(payload, source=source))
            if any(kinds.values()):
                raise UserError(
                    f"spoiled weights ({source}): "
                    f"{', '.join(f'{len(names)} {kind}' for kind, names in kinds.items() if names)}"
                )
            self.moments(payload, source)

    def restore(self) -> None:
        """Continue from a checkpoint; bare weights start a new schedule from them, as published."""
        args = self.args
        source = utils.in_main_process(self.newest) if args.resume == "auto" else args.resume
        if not source:
            return say(f"resume: no checkpoint in {self.folder}, the run starts")
        self.inside = Path(source).parent.resolve() == self.folder.resolve()
        if not self.inside and not args.overwrite:
            check_no_run(args)
        payload = checkpoint.load(source)
        stored = checkpoint.class_names(payload, source=source)
        if stored is not None and stored != self.classes:
            raise UserError(
                f"other classes than the checkpoint's ({args.data_path}): {len(self.classes)} here, {len(stored)} in "
                f"{source}"
            )
        if resume.COMPLETE - set(payload):
            return self.restore_weights(payload, source)
        resume.check_complete(payload, source=source)
        try:
            changed = resume.changes(resume.stored_recipe(payload), self.recipe)
            changed += [] if changed else resume.schedule_changes(payload["lr_scheduler"], self.scheduler, args.epochs)
        except Exception as error:  # of whatever a file may hold there
            raise self.unfit(source, error) from error
        if changed and not args.resume_changed:
            raise UserError(
                f"another run than the checkpoint's ({source}): {', '.join(changed)}; as it was, or --resume-changed"
            )
        if changed:
            say(f"resume: changed by --resume-changed: {', '.join(changed)}")
        found = self.moments(payload, source)  # everything is checked before anything is changed
        state = checkpoint.weights(payload, source=source)
        checkpoint.load_into(self.model, state, source=source, report=args.report)
        if self.ema:
            average = checkpoint.weights(payload, source=source, key="model_ema") if "model_ema" in payload else state
            checkpoint.load_into(self.ema.module, average, source=source)
        try:
            groups = payload["optimizer"]["param_groups"]
            resume.load_moments(self.optimizer, self.model, found, groups)
            if payload.get("scaler") and self.scaler.is_enabled():
                resume.check_scale(payload["scaler"])
                self.scaler.load_state_dict(payload["scaler"])
            self.epoch, self.best, self.progress = (
                payload["epoch"],
                payload.get("max_accuracy", 0.0),
                payload.get("progress"),
            )
            self.evaluated, self.stats = bool(payload.get("evaluated", True)), payload.get("train_stats") or {}
            self.restore_rate([group["lr"] for group in groups] if "recipe" in payload and not changed else None)
            if self.progress and self.progress["updates"] > self.updates:
                raise ValueError(f"{self.progress['updates']} updates of an epoch that has {self.updates} here")
            if self.progress:  # in batches of this process, which may be another share of the global batch than before
                self.progress["batches"] = self.progress["updates"] * args.grad_accum_steps
            self.restore_random(payload.get("random_states") or [], threads=payload.get("threads"))
        except Exception as error:
            raise self.unfit(source, error) from error
        if Path(source).resolve() == (self.folder / CHECKPOINT).resolve():
            self.kept = self.place()
        self.best = max(self.best, utils.in_main_process(self.best_of_folder) if self.inside else 0.0)
        self.status.place = {"epoch": self.epoch, "updates": self.place()[1]}
        inside = f" and {self.place()[1]} updates" if self.progress else ""
        say(f"resume: {source}, after epoch {self.epoch}{inside}, max accuracy {self.best:.2f}%")

    def restore_weights(self, payload: dict, source: str) -> None:
        if not self.args.overwrite:  # this schedule begins anew
            check_no_run(self.args)
        checkpoint.load_into(
            self.model, checkpoint.weights(payload, source=source), source=source, report=self.args.report
        )
        if self.ema:
            self.ema.set(self.model)
        say(f"resume: weights only in {source}, the schedule starts at epoch {self.args.start_epoch}")

    def moments(self, payload: dict, source: str) -> dict[str, dict]:
        try:
            return resume.moments(payload, self.model)
        except Exception as error:
            raise self.unfit(source, error) from error

    @staticmethod
    def unfit(source: str, error: Exception) -> UserError:
        reason = " ".join((str(error).splitlines() or [""])[0].split())[:140]
        return UserError(
            f"the training state does not fit ({source}): {reason or type(error).__name__}; --finetune takes its "
            "weights alone"
        )

    def restore_rate(self, stored: list[float] | None) -> None:
        """The rates of the epoch to come: as stored, or of the schedule, which is a function of the epochs trained."""
        if stored is not None:
            resume.check_rates(stored, len(self.initial_rates))
            for group, rate in zip(self.optimizer.param_groups, stored):
                group["lr"] = rate
        elif self.epoch >= 0:
            self.scheduler.step(self.epoch)
        else:
            self.scheduler.update_groups(self.initial_rates)

    def restore_random(self, states: list[dict], *, threads: int | None) -> None:
        world, own = utils.get_world_size(), torch.get_num_threads()
        if len(states) == world:
            utils.set_random_state(states[utils.get_rank()])
        then = f"{len(states) or 'other'} processes then, {world} now" if len(states) != world else ""
        if not then and self.device.type == "cpu" and threads != own:
            then = f"{threads or 'other'} threads a process then, {own} now"
        if then:
            say(f"resume: {then}: sums round differently, so the bits may differ from an uninterrupted run's")

    def best_of_folder(self) -> float:
        """The score of the folder's best checkpoint, which a worse one must not replace; 0 if there is none to be
        read.
        """
        path = self.folder / BEST
        if not path.is_file():
            return 0.0
        try:
            payload = checkpoint.load(path)
            resume.check_complete(payload, source=path)
            return payload.get("max_accuracy", 0.0)
        except UserError as error:
            utils.warn(f"{error}; the next best epoch will replace it")
            return 0.0

    # ------------------------------------------------------------ the loop

    def train(self) -> None:
        self.open_folder()
        with self.signals, self.reported():
            self.banner()
            self.train_epochs()

    def train_epochs(self) -> None:
        args = self.args
        if not self.evaluated:
            say(f"epoch {self.epoch} was trained but not evaluated: evaluating it")
            self.finish_epoch()
        say(f"Start training for {args.epochs} epochs")
        start = time.perf_counter()
        after_step = (lambda: self.ema.update(self.model)) if self.ema else None
        for epoch in range(self.epoch + 1, args.epochs):
            progress, self.progress = self.progress, None
            self.sampler.set_epoch(epoch, progress["batches"] * args.batch_size if progress else 0)
            try:
                self.stats = train_one_epoch(
                    self.parallel,
                    self.criterion,
                    self.loader,
                    self.optimizer,
                    self.device,
                    epoch,
                    self.scaler,
                    clip_grad=args.clip_grad,
                    mixup=self.mixup,
                    accum_steps=args.grad_accum_steps,
                    after_step=after_step,
                    after_update=self.after_update,
                    wants_to_stop=self.wants_to_stop,
                    progress=progress,
                    **numerics(args, self.device),
                )
            except NonFiniteError as error:
                self.write_pictures(epoch, error.step)
                raise NonFiniteError(f"{error}; its pictures are in {self.folder / NON_FINITE}", error.step) from None
            # After the epoch, as published: epochs 0 and 1 both train at the first rate, and the last one at that of
            # epochs - 2.
            self.scheduler.step(epoch)
            self.epoch, self.evaluated = epoch, False
            self.save()
            self.finish_epoch()
        say(f"Training time {datetime.timedelta(seconds=int(time.perf_counter() - start))}")

    def write_pictures(self, epoch: int, step: int) -> None:
        """Which pictures each process had in a step that failed, beside the checkpoints. All processes fail at the same
        one.
        """
        size = self.args.batch_size
        self.sampler.set_epoch(epoch, step * size)
        shares = utils.all_gather([self.keyed.name(index) for _, _, index in itertools.islice(self.sampler, size)])
        record = {"epoch": epoch, "step": step, "pictures": shares}
        utils.in_main_process(lambda: self.write(NON_FINITE, json.dumps(record, indent=1) + "\n"))

    def wants_to_stop(self) -> bool:
        return self.signals.received is not None

    def after_update(self, updates: int, reached: Callable[[], dict], stopping: bool) -> None:
        """Keep the state inside an epoch where --checkpoint-interval or a signal asks for it."""
        every = self.args.checkpoint_interval
        if stopping or (every and updates % every == 0 and updates < self.updates):
            self.progress = reached() | {"updates": updates}
            saved = self.save()
            if stopping and not saved:
                raise UserError(
                    f"stopped, and the state could not be saved ({self.folder}): make room, --resume auto goes on from "
                    "the one before"
                )
            if stopping:
                raise self.preempted()
            self.progress = None

    def between_batches(self) -> None:
        """In an evaluation, whose beginning is saved."""
        if utils.any_process(self.wants_to_stop(), self.device):
            raise self.preempted()

    def preempted(self) -> Preempted:
        epochs, updates = self.place()
        by = self.signals.received or "a signal to another process"
        return Preempted(
            f"stopped by {by} after {epochs} epochs and {updates} updates, all saved: continue with --resume auto"
        )

    def finish_epoch(self) -> None:
        """Evaluate the epoch that was trained last, keep it if it is the best, and write its line."""
        shares = utils.get_world_size() if self.args.dist_eval else 1
        rounds = math.ceil(math.ceil(self.val_size / shares) / eval_batch(self.args))
        score = dict(
            shared=self.args.dist_eval, between=self.between_batches, rounds=rounds, **numerics(self.args, self.device)
        )
        test = evaluate(self.val_loader, self.compiled, self.device, **score)
        say(f"Accuracy of the network on the {self.val_size} test images: {test['acc1']:.1f}%")
        ema = {}
        if self.ema:
            stats = evaluate(self.val_loader, self.ema.module, self.device, **score)
            ema = {f"ema_test_{name}": stats[name] for name in ("loss", "acc1", "acc5")}
            say(f"Accuracy of the EMA network on the {self.val_size} test images: {stats['acc1']:.1f}%")
        before, best = self.best, test["acc1"] > self.best
        self.best, self.evaluated = max(self.best, test["acc1"]), True
        say(f"Max accuracy: {self.best:.2f}%")
        self.written(lambda: self.write_log(test, ema))
        # The best first: after a kill between the two, the epoch counts as not evaluated, and is evaluated again.
        if not self.save(best=best):
            self.best = before  # the best on disk is still the one before

    def write_log(self, test: dict, ema: dict) -> None:
        """One JSON line an epoch, the published keys first. An epoch that was logged before a restart is not logged
        twice.
        """
        line = {f"train_{name}": self.stats[name] for name in ("lr", "loss")}
        line |= {f"test_{name}": test[name] for name in ("loss", "acc1", "acc5")}
        line |= {"epoch": self.epoch, "n_parameters": self.n_parameters}
        line |= ema | {name: self.stats[name] for name in ("time", "data_time", "images_per_s", "max_memory_mb")}
        path = self.folder / LOG
        lines = [earlier for earlier in resume.log_lines(path) if earlier["epoch"] < self.epoch]
        self.write(LOG, "".join(json.dumps(each) + "\n" for each in [*lines, line]))

    def write(self, name: str, text: str) -> None:
        try:
            files.write_text(self.folder / name, text)
        except OSError as error:
            raise UserError(
                f"cannot write ({self.folder / name}): {error.strerror}; make room and continue with --resume auto"
            ) from error

    def open_folder(self) -> None:
        """The run's folder, and beside the checkpoints what the run was made with."""
        utils.in_main_process(self.make_folder)

    def make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = files.Lock(self.folder)
            if self.lock.taken_by is None:
                files.remove_unfinished(self.folder)
        except OSError as error:
            raise UserError(f"cannot make the folder (--output_dir {self.folder}): {error.strerror}") from error
        if self.lock.taken_by is not None:
            raise UserError(files.in_use(self.folder, self.lock.taken_by))
        if self.args.overwrite and not self.inside:
            for path in [*(self.folder / name for name in RUN_FILES), *files.earlier(self.folder)]:
                path.unlink(missing_ok=True)
        records = {
            "args.json": vars(self.args),
            "environment.json": utils.environment(self.device, self.args.seed),
            "class_names.json": self.classes,
        }
        for name, record in records.items():
            self.write(name, json.dumps(record, indent=1) + "\n")

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """What becomes of the run, in its status.json; the folder is free again afterwards."""
        status, first = self.status, utils.is_main_process()
        if first:
            status.write("running")
        try:
            yield
            if first:
                status.write("finished")
        except Preempted as error:
            if first:
                status.write("preempted", str(error))
            raise
        except BaseException as error:
            _, reason = explain(error) or (1, repr(error))
            status.fail(reason, echo=isinstance(error, RuntimeError) and processes.is_lost_process(error))
            raise
        finally:
            if first:
                self.lock.release()

    def banner(self) -> None:
        args, world = self.args, utils.get_world_size()
        product = f"{args.batch_size} x {world} processes x {args.grad_accum_steps} steps"
        say(f"global batch {self.global_batch} ({product}), lr {self.lr:.6g} ({args.lr:g} x {self.global_batch} / 512)")
        dtype = str(precision(args, self.device)).removeprefix("torch.")
        where = f"device {self.device}, {dtype}, {self.loader.num_workers} workers a process"
        say(f"{self.updates} updates an epoch, {self.n_parameters} parameters, {where}, output in {self.folder}")
        recipe = RECIPE_BATCH.get(args.model)
        if recipe and recipe != self.global_batch:
            utils.warn(
                f"the published {args.model} was trained with a global batch of {recipe}, not {self.global_batch}: "
                "expect another result"
            )


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those during whose handling it came: a loading process's death is raised anywhere, and others follow
    from it.
    """
    while error is not None:
        yield error
        error = error.__context__


def explain(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the line of an error that is not ours to mend, or None."""
    if isinstance(error, Preempted):
        return errors.PREEMPTED, str(error)
    if isinstance(error, (UserError, NonFiniteError)):
        return 2 if isinstance(error, UserError) else 1, errors.one_line(error)
    if isinstance(error, RuntimeError) and processes.is_lost_process(error):
        return (
            1,
            f"no answer from another process of this run ({processes.lost_processes()}): stopped too, continue with "
            "--resume auto",
        )
    if (loading := next(filter(processes.is_loading_error, chain(error)), None)) is not None:
        reason = errors.one_line(loading)
        return (
            1,
            f"data loading failed ({reason[:120]} [{processes.loading_processes()}]): look for lack of memory or a "
            "stuck disk, then --resume auto",
        )
    return None


def run(args: argparse.Namespace, written: set[str]) -> int:
    """main as a program: errors of the user are one line and exit code 2, a loss that is not finite is one line and
    1.
    """
    try:
        main(args, written)
        return 0
    except (Preempted, UserError, NonFiniteError, RuntimeError) as error:
        known = explain(error)
        if known is None or os.environ.get("TWINS_DEBUG") == "1":
            raise
        code, line = known
        processes.end_stopped_processes()
        errors.print_error(line, kind="stopped" if code == errors.PREEMPTED else "error")
        return code


if __name__ == "__main__":
    utils.leave(run(ARGS, WRITTEN))
