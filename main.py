"""Train, evaluate and time Twins on pictures: the published command lines, on one GPU, many, or a CPU.

python main.py --help lists the options; README.md has a command for each model of the paper.
"""

import sys

import options

if __name__ == "__main__":
    ARGS, WRITTEN = options.parse_args(sys.argv[1:])  # before torch is imported, so that --help and a wrong option are answered at once

import torchvision_cpu  # noqa: F401  before timm, see there

# isort: split
import argparse
import datetime
import difflib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import datasets
import gvt
import utils
from engine import evaluate, train_one_epoch
from losses import build_criterion
from samplers import RASampler, ShuffleSampler, eval_indices
from utils import NonFiniteError, UserError, say

# The global batches that the published logs were made with (from their learning rates).
RECIPE_BATCH = dict.fromkeys(gvt.MODEL_NAMES, 1024) | {"pcpvt_small_v0": 1280, "alt_gvt_small": 2048, "alt_gvt_demo": None}
FUSED = ("adam", "adamw")  # optimizers that torch can run in one kernel, and skip on the device (sgd's skips leave momentum unset)
RUN_FILES = ("checkpoint.pth", "checkpoint_best.pth", "log.txt")  # a folder with one of them holds a run


def main(args: argparse.Namespace, written: set[str]) -> None:
    check_model_name(args.model)
    check_folder(args)
    device = utils.init_device(args.device, written="device" in written, dist_url=args.dist_url)
    torch.backends.cudnn.benchmark = True
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
        close = difflib.get_close_matches(name, gvt.MODEL_NAMES, n=3, cutoff=0.4) or difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"unknown model (--model {name}): did you mean {' or '.join(close or list(gvt.MODEL_NAMES))}?")


def check_folder(args: argparse.Namespace) -> None:
    """Before anything is made: a run is not written over by accident, and what is asked for has what it needs."""
    if args.eval and not args.resume:
        raise UserError("nothing to evaluate (--eval): give the weights as --resume FILE")
    if args.input_size < gvt.SMALLEST and args.model in gvt.MODEL_NAMES:
        raise UserError(f"too small (--input-size {args.input_size}): Twins needs pictures of at least {gvt.SMALLEST} x {gvt.SMALLEST}")
    if args.sched == "plateau":
        raise UserError("a schedule that needs scores (--sched plateau): the rate is set by the epoch alone, choose cosine or step")
    if not (args.eval or args.throughout or args.resume or args.overwrite):
        check_no_run(args)


def check_no_run(args: argparse.Namespace) -> None:
    held = [name for name in RUN_FILES if (output_dir(args) / name).exists()]
    if held:
        raise UserError(f"the folder holds a run ({output_dir(args) / held[0]}): --resume it, or --overwrite it, or choose another --output_dir")


def output_dir(args: argparse.Namespace) -> Path:
    return Path(args.output_dir or args.model)


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
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model.to(device, memory_format=memory_format(args))


def compiled(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    # dynamic=False: the last, smaller batch compiles once more, which takes much less than one graph for any size.
    try:
        return torch.compile(model, backend=args.torchcompile, dynamic=False) if args.torchcompile else model
    except RuntimeError as error:
        raise UserError(f"no such compiler (--torchcompile {args.torchcompile}): write it without a name for inductor") from error


def build_eval_loader(args: argparse.Namespace, written: set[str], dataset, device: torch.device) -> Iterable:
    shares = dict(rank=utils.get_rank(), world=utils.get_world_size()) if args.dist_eval else {}
    indices = eval_indices(len(dataset), **shares)
    if missing := getattr(dataset, "missing", []):
        say(f"val has no pictures of {len(missing)} of {len(dataset.classes)} classes ({', '.join(missing[:3])}): scored with training's indices")
    pin = args.pin_mem and device.type == "cuda"
    batch = int(1.5 * args.batch_size)
    return datasets.build_loader(dataset, indices, batch_size=batch, workers=workers(args, written), pin_memory=pin, drop_last=False)


# ---------------------------------------------------------------- evaluation and throughput


def evaluate_checkpoint(args: argparse.Namespace, written: set[str], device: torch.device) -> None:
    payload = checkpoint.load(args.resume)
    state = checkpoint.weights(payload, source=args.resume, key="model_ema" if args.model_ema else None)
    head = state.get("head.weight")
    if head is None:
        raise UserError(f"no classifier in the weights ({args.resume}): expected head.weight, --finetune can add one")
    classes, stored = None, payload.get("class_names")
    if args.data_set == "IMNET":
        classes = datasets.match_classes(datasets.class_folders(Path(args.data_path) / "val"), stored, len(head))
    elif stored is not None:
        classes = stored
    dataset = datasets.build_dataset("val", args, transform=datasets.build_transform(False, args), classes=classes)
    if len(dataset.classes) != len(head):
        raise UserError(f"other classes than the weights' ({args.data_path}): {len(dataset.classes)}, the classifier has {len(head)}")
    model = build_model(args, len(head))
    checkpoint.load_into(model, state, source=args.resume)
    model = compiled(ready(model, args, device), args)
    loader = build_eval_loader(args, written, dataset, device)
    stats = evaluate(loader, model, device, shared=args.dist_eval, **numerics(args, device))
    say(f"Accuracy of the network on the {len(dataset)} test images: {stats['acc1']:.1f}%")


@torch.inference_mode()
def throughput(args: argparse.Namespace, written: set[str], device: torch.device) -> None:
    """Pictures per second in float32 unless --amp-dtype says otherwise, at the evaluation's batch size (1.5 x --batch-size)."""
    batch = int(1.5 * args.batch_size)
    if "data_path" in written:
        dataset = datasets.build_dataset("val", args, transform=datasets.build_transform(False, args))
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
        rank, world = utils.get_rank(), utils.get_world_size()
        utils.seed_everything(args.seed + rank)
        train_set = datasets.build_dataset("train", args, transform=datasets.build_transform(True, args))
        self.classes = list(train_set.classes)
        val_set = datasets.build_dataset("val", args, transform=datasets.build_transform(False, args), classes=self.classes)
        kind = RASampler if args.repeated_aug else ShuffleSampler
        self.sampler = kind(len(train_set), seed=args.seed, rank=rank, world=world)
        pin = args.pin_mem and device.type == "cuda"
        loading = dict(batch_size=args.batch_size, workers=workers(args, written), pin_memory=pin, drop_last=True)
        self.loader = datasets.build_loader(datasets.Keyed(train_set, args.seed), self.sampler, **loading)
        self.val_loader = build_eval_loader(args, written, val_set, device)
        self.val_size = len(val_set)
        if len(self.loader) < args.grad_accum_steps:
            shares = f"--batch-size {args.batch_size} x {world} processes x --grad-accum-steps {args.grad_accum_steps}"
            raise UserError(f"a global batch larger than the data set ({shares}, {len(train_set)} pictures): make it smaller")

        mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
        if mixing and args.batch_size % 2:
            raise UserError(f"an odd batch with Mixup (--batch-size {args.batch_size}): make it even, or --mixup 0 --cutmix 0")
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
            raise UserError(f"no such schedule (--sched {args.sched}): {str(error).splitlines()[0]}, the published one is cosine") from error
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision(args, device) == torch.float16)
        self.epoch, self.evaluated, self.best, self.stats = args.start_epoch - 1, True, 0.0, {}
        if args.resume:
            self.restore()

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
            raise UserError(f"cannot make the optimizer (--opt {self.args.opt}): {str(error).splitlines()[0]}") from error

    def load_finetune(self, source: str) -> None:
        """Weights of another training; a classifier of another size is left as it is, new."""
        state, own, may_lack = checkpoint.weights(checkpoint.load(source), source=source), self.model.state_dict(), ()
        if "head.weight" in state and state["head.weight"].shape != own["head.weight"].shape:
            say(f"finetune: the classifier of {source} has {len(state['head.weight'])} classes, this data set {len(self.classes)}: made anew")
            state = {name: value for name, value in state.items() if not name.startswith("head.")}
        if "head.weight" not in state:
            may_lack = ("head.",)
        checkpoint.load_into(self.model, state, source=source, may_lack=may_lack)
        lacking = sorted(set(own) - set(state))
        say(f"finetune: {len(state)} of {len(own)} tensors loaded from {source}; not loaded: {', '.join(lacking) or 'none'}")

    # ------------------------------------------------------------ state

    def state(self) -> dict:
        """What a checkpoint holds: the published keys first, then what an exact continuation needs. Every process must call it."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "scaler": self.scaler.state_dict(),
            "args": vars(self.args),
            "max_accuracy": self.best,
            "evaluated": self.evaluated,
            "train_stats": self.stats,
            "class_names": self.classes,
            "random_states": utils.gather_random_states(),
        }
        return state | ({"model_ema": self.ema.module.state_dict()} if self.ema else {})

    def save(self, *names: str) -> None:
        state = self.state()
        if utils.is_main_process():
            for name in names:
                checkpoint.save(self.folder / name, state)

    def restore(self) -> None:
        """Continue from a checkpoint; bare weights start a new schedule from them, as published."""
        args = self.args
        payload = checkpoint.load(args.resume)
        stored = payload.get("class_names")
        if stored is not None and stored != self.classes:
            raise UserError(f"other classes than the checkpoint's ({args.data_path}): {len(self.classes)} here, {len(stored)} in {args.resume}")
        state = checkpoint.weights(payload, source=args.resume)
        if not {"optimizer", "lr_scheduler", "epoch"} <= set(payload):
            if not args.overwrite:
                check_no_run(args)
            checkpoint.load_into(self.model, state, source=args.resume)
            if self.ema:
                self.ema.set(self.model)
            return say(f"resume: weights only in {args.resume}, the schedule starts at epoch {args.start_epoch}")
        earlier = payload.get("args")
        for name in ("opt", "sched"):
            was = earlier.get(name) if isinstance(earlier, dict) else getattr(earlier, name, None)
            if was not in (None, getattr(args, name)):
                raise UserError(f"another --{name} than the run's ({args.resume}): {was} there, {getattr(args, name)} here")
        checkpoint.load_into(self.model, state, source=args.resume)
        if self.ema:
            average = checkpoint.weights(payload, source=args.resume, key="model_ema") if "model_ema" in payload else state
            checkpoint.load_into(self.ema.module, average, source=args.resume)
        try:
            self.load_optimizer(payload["optimizer"])
            self.scheduler.load_state_dict(payload["lr_scheduler"])
            if payload.get("scaler") and self.scaler.is_enabled():
                self.scaler.load_state_dict(payload["scaler"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"the optimizer's state does not fit ({args.resume}): {str(error).splitlines()[0]}, resume as trained") from error
        self.epoch, self.best = payload["epoch"], payload.get("max_accuracy", 0.0)
        self.evaluated, self.stats = payload.get("evaluated", True), payload.get("train_stats", {})
        states = payload.get("random_states", [])
        if len(states) == utils.get_world_size():
            utils.set_random_state(states[utils.get_rank()])
        say(f"resume: {args.resume}, after epoch {self.epoch}, max accuracy {self.best:.2f}%")

    def load_optimizer(self, state: dict) -> None:
        """The optimizer's state; how it is computed (fused or not, and settings that older files lack) stays this optimizer's."""
        for saved, own in zip(state["param_groups"], self.optimizer.param_groups):
            for name in own.keys() - {"params"}:
                saved.setdefault(name, own[name])
            for name in own.keys() & {"fused", "foreach", "capturable"}:
                saved[name] = own[name]
        self.optimizer.load_state_dict(state)

    # ------------------------------------------------------------ the loop

    def train(self) -> None:
        args = self.args
        self.open_folder()
        self.banner()
        if not self.evaluated:
            say(f"epoch {self.epoch} was trained but not evaluated: evaluating it")
            self.finish_epoch()
        say(f"Start training for {args.epochs} epochs")
        start = time.perf_counter()
        after_step = (lambda: self.ema.update(self.model)) if self.ema else None
        for epoch in range(self.epoch + 1, args.epochs):
            self.sampler.set_epoch(epoch)
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
                **numerics(args, self.device),
            )
            # After the epoch, as published: epochs 0 and 1 both train at the first rate, and the last one at that of epochs - 2.
            self.scheduler.step(epoch)
            self.epoch, self.evaluated = epoch, False
            self.save("checkpoint.pth")
            self.finish_epoch()
        say(f"Training time {datetime.timedelta(seconds=int(time.perf_counter() - start))}")

    def finish_epoch(self) -> None:
        """Evaluate the epoch that was trained last, keep it if it is the best, and write its line."""
        score = dict(shared=self.args.dist_eval, **numerics(self.args, self.device))
        test = evaluate(self.val_loader, self.compiled, self.device, **score)
        say(f"Accuracy of the network on the {self.val_size} test images: {test['acc1']:.1f}%")
        ema = {}
        if self.ema:
            stats = evaluate(self.val_loader, self.ema.module, self.device, **score)
            ema = {f"ema_test_{name}": stats[name] for name in ("loss", "acc1", "acc5")}
            say(f"Accuracy of the EMA network on the {self.val_size} test images: {stats['acc1']:.1f}%")
        best = test["acc1"] > self.best
        self.best, self.evaluated = max(self.best, test["acc1"]), True
        say(f"Max accuracy: {self.best:.2f}%")
        self.write_log(test, ema)
        # The best first: after a kill between the two, the epoch counts as not evaluated, and both are written again.
        self.save(*(["checkpoint_best.pth"] if best else []), "checkpoint.pth")

    def write_log(self, test: dict, ema: dict) -> None:
        """One JSON line an epoch, the published keys first. An epoch that was logged before a restart is not logged twice."""
        line = {f"train_{name}": self.stats[name] for name in ("lr", "loss")}
        line |= {f"test_{name}": test[name] for name in ("loss", "acc1", "acc5")}
        line |= {"epoch": self.epoch, "n_parameters": self.n_parameters}
        line |= ema | {name: self.stats[name] for name in ("time", "data_time", "images_per_s", "max_memory_mb")}
        path = self.folder / "log.txt"
        if utils.is_main_process():
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            lines = [earlier for earlier in lines if json.loads(earlier)["epoch"] < self.epoch]
            utils.write_text(path, "".join([*lines, json.dumps(line) + "\n"]))

    def open_folder(self) -> None:
        """The run's folder, and beside the checkpoints what the run was made with."""
        if utils.is_main_process():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make the folder (--output_dir {self.folder}): {error.strerror}") from error
            if self.args.overwrite and not self.args.resume:
                for name in RUN_FILES:
                    (self.folder / name).unlink(missing_ok=True)
            records = {
                "args.json": vars(self.args),
                "environment.json": utils.environment(self.device, self.args.seed),
                "class_names.json": self.classes,
            }
            for name, record in records.items():
                utils.write_text(self.folder / name, json.dumps(record, indent=1) + "\n")

    def banner(self) -> None:
        args, world = self.args, utils.get_world_size()
        product = f"{args.batch_size} x {world} processes x {args.grad_accum_steps} steps"
        say(f"global batch {self.global_batch} ({product}), lr {self.lr:.6g} ({args.lr:g} x {self.global_batch} / 512)")
        updates = len(self.loader) // args.grad_accum_steps
        where = f"device {self.device}, {str(precision(args, self.device)).removeprefix('torch.')}, {self.loader.num_workers} workers a process"
        say(f"{updates} updates an epoch, {self.n_parameters} parameters, {where}, output in {self.folder}")
        recipe = RECIPE_BATCH.get(args.model)
        if recipe and recipe != self.global_batch:
            utils.warn(f"the published {args.model} was trained with a global batch of {recipe}, not {self.global_batch}: expect another result")


def run(args: argparse.Namespace, written: set[str]) -> int:
    """main as a program: errors of the user are one line and exit code 2, a loss that is not finite is one line and 1."""
    try:
        main(args, written)
        return 0
    except (UserError, NonFiniteError) as error:
        if os.environ.get("TWINS_DEBUG") == "1":
            raise
        print(f"main.py: error: {utils.one_line(error)}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1
    except RuntimeError as error:
        if not utils.is_lost_process(error):
            raise
        print("main.py: error: another process of this run has stopped (see its message): stopped too", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(run(ARGS, WRITTEN))
