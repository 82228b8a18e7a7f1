"""Train, evaluate and time Twins on images: the official command lines, on one GPU, many, or a CPU.

python main.py --help lists the options; README.md has a command for each model of the paper.
"""

import os
import sys

from training import errors, files, launcher, options

if __name__ == "__main__":
    # Before torch is imported, so that --help, a wrong option and a folder in use are answered at once. Not the last
    # under Slurm: its tasks would take each other for the folder's owner.
    errors.end_at_interrupt("main.py")
    ARGS = options.parse_args(sys.argv[1:])
    if launcher.launched():
        launcher.end_with_launcher()
    elif not (ARGS.eval or ARGS.throughout or launcher.launcher_variables(os.environ)) and (
        taken_by := files.owner(ARGS.run_folder)
    ):
        print(f"main.py: error: {files.in_use(ARGS.run_folder, taken_by)}", file=sys.stderr)
        sys.exit(2)

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import datetime
import difflib
import functools
import itertools
import math
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

import datasets
import engine
import gvt
import utils
from losses import build_criterion, build_mixup, class_weights, class_weights_recipe
from training import dry_run, processes, recipe_options, reports, resume
from training.checkpoint import Checkpoint, load_into, number_of_classes
from training.errors import NonFiniteError, Preempted, UserError, print_error
from training.loggers import Loggers, check_packages
from training.network import build_model, build_networks, compile_model, count_parameters, prepare_model
from training.optimizer import build_optimizer, build_schedule, train_mode
from training.options import Options
from training.precision import amp_dtype, memory_format, precision_kwargs
from training.processes import StopSignals
from training.progress import LIVE, Pace
from training.run_folder import NON_FINITE, RunFolder, record_images
from training.state import CheckpointManager, TrainingState
from utils import log

# The global batches that the official logs were made with (from their learning rates).
RECIPE_BATCH = dict.fromkeys(gvt.MODEL_NAMES, 1024)
RECIPE_BATCH |= {"pcpvt_small_v0": 1280, "alt_gvt_small": 2048, "alt_gvt_demo": None}


def main(args: Options, on_poll: Callable[..., None] = lambda *where: None) -> None:
    """Do what the options ask for. on_poll: see StopSignals."""
    set_determinism(args.deterministic)
    check_options(args)
    without_effect, given = options.without_effect(args), "device" in args.given
    device = utils.init_device(args.device, given=given, dist_url=args.dist_url, timeout=args.dist_timeout)
    utils.seed_everything(args.seed + utils.get_rank())
    recipe_options.derive_accumulation(args, utils.get_world_size())
    processes.meet_peers()
    with utils.process_group():
        for name, reason in without_effect.items():
            utils.warn(f"{options.flag(name)} has no effect ({reason})")
        log(args)
        if args.throughout:
            throughput(args, device)
        elif args.eval:
            evaluate(args, device)
        else:
            train(args, device, on_poll)


def check_options(args: Options) -> None:
    """Raise UserError, before anything is made, for what cannot work or would overwrite a run."""
    if not timm.is_model(args.model):
        close = difflib.get_close_matches(args.model, gvt.MODEL_NAMES, n=3, cutoff=0.4)
        close = close or difflib.get_close_matches(args.model, timm.list_models(), n=3) or list(gvt.MODEL_NAMES)
        raise UserError(f"unknown model (--model {args.model}): did you mean {' or '.join(close)}?")
    if args.eval and not args.resume:
        raise UserError("nothing to evaluate (--eval): pass the weights as --resume FILE")
    if min(args.sides) < gvt.SMALLEST and args.model in gvt.MODEL_NAMES:
        smallest, size = f"{gvt.SMALLEST} x {gvt.SMALLEST}", " ".join(map(str, dict.fromkeys(args.sides)))
        raise UserError(f"too small (--input-size {size}): Twins needs images of at least {smallest}")
    if args.sched == "plateau":
        what = "a schedule that needs scores (--sched plateau)"
        raise UserError(f"{what}: the rate is set by the epoch alone, use cosine or step")
    if args.eval or args.throughout:
        return
    if args.start_epoch >= args.epochs:
        raise UserError(f"no epoch is left (--start_epoch {args.start_epoch}, --epochs {args.epochs}): raise --epochs")
    check_packages(args)
    if args.dry_run:
        dry_run.check_output(args)
    elif not args.resume:
        RunFolder(args.run_folder, args.overwrite).check_no_run()


def set_determinism(wanted: bool) -> None:
    """Ask for kernels that give the same bits each time, on a GPU at some cost in speed."""
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


# ---------------------------------------------------------------- evaluation and throughput


def evaluate(args: Options, device: torch.device) -> None:
    """Score the weights of --resume on val."""
    record, kwargs = reports.EvalRecord(args), precision_kwargs(args, device)
    file = Checkpoint.open(files.best_checkpoint(args.run_folder) if args.resume == "auto" else args.resume)
    state, stored = file.weights("model_ema" if args.model_ema else None), dict(file.options)
    if not timm.is_model(str(stored.get("model"))):
        stored.pop("model", None)
    for line in (f"evaluating {file.source}", *options.take_stored(args, stored)):
        log(line)
    number, classes = number_of_classes(state, file.source), file.class_names
    val_set = datasets.build_val_set(args, classes, head=number)
    if len(val_set.classes) != number:
        counts = f"{len(val_set.classes)}, the classifier has {number}"
        raise UserError(f"other classes than the weights' ({args.data_path}): {counts}")
    model = build_model(args, number)
    load_into(model, state, source=file.source, report=args.report)
    model = compile_model(prepare_model(model, args, device), args, inference=True)
    loader = datasets.build_val_loader(args, val_set, device)
    stats = engine.evaluate(loader, model, device, shared=args.dist_eval, observe=record.add, **kwargs)
    log(f"Accuracy of the network on the {len(val_set)} test images: {stats['acc1']:.1f}%")
    record.write(val_set)


def throughput(args: Options, device: torch.device) -> None:
    """Time inference at the evaluation's batch size (1.5 x --batch-size), in float32 unless --amp-dtype is given."""
    if "data_path" in args.given:
        images = next(iter(datasets.build_val_loader(args, datasets.build_val_set(args), device)))[0]
    else:
        log("images: random numbers (no --data-path)")
        images = torch.randn(args.eval_batch_size, args.in_chans, *args.sides)
    model = prepare_model(build_model(args, 1000), args, device).eval()
    model = compile_model(model, args, inference=True)
    images = images.to(device, memory_format=memory_format(args))
    engine.throughput(model, images, getattr(torch, args.amp_dtype or "float32"))


# ---------------------------------------------------------------- training


def train(args: Options, device: torch.device, on_poll: Callable[..., None]) -> None:
    folder, signals = RunFolder(args.run_folder, args.overwrite, args.keep_going), StopSignals(on_poll)
    train_set, val_set = datasets.build_datasets(args)
    train_loader = datasets.build_train_loader(args, train_set, device)
    val_loader = datasets.build_val_loader(args, val_set, device)
    mixup, criterion = build_mixup(args, len(train_set.classes)), build_loss(args, train_set, device)
    model, network, parallel, ema = build_networks(args, train_set.classes, device)
    state = build_state(args, device, model, ema, train_set, val_set, train_loader)
    if args.dry_run:
        log_run(state, train_loader, folder)
        datasets.check_sizes(train_set, val_set)
        return dry_run.report(state, train_loader, mixup, datasets.labels(train_set), len(val_set))
    if parallel is not network:
        images = torch.zeros(args.batch_size, args.in_chans, *args.sides, device=device)
        images = images.contiguous(memory_format=memory_format(args))
        processes.settle_gradient_buckets(parallel, model, images, amp_dtype(args, device))
    saver = CheckpointManager(state, folder, signals)
    saver.resume(args.resume)
    settings = engine.StepSettings(
        clip_grad=args.clip_grad,
        accum_steps=args.grad_accum_steps,
        mixup=mixup,
        train_mode=train_mode(args, model),
        **precision_kwargs(args, device),
    )
    with signals, folder.open(lambda: state.records() | datasets.records(args, train_set, val_set)):
        log_run(state, train_loader, folder)
        datasets.check_sizes(train_set, val_set)
        loggers = Loggers(folder, args, first_epoch=state.epoch + (1 if state.evaluated else 0))
        score = functools.partial(evaluate_epoch, state, saver, val_loader, network, loggers)
        one = functools.partial(train_epoch, state, saver, train_loader, parallel, criterion, settings)
        train_epochs(state, saver, one, score)
        loggers.close()


def train_epochs(state: TrainingState, saver: CheckpointManager, train: Callable, score: Callable[[], None]) -> None:
    """Train and score the epochs that are left, unless --early-stop ends the run before."""
    args, folder = state.args, saver.folder
    if not state.evaluated:
        log(f"epoch {state.epoch} was trained but not evaluated: evaluating it")
        score()
    log(f"Start training for {args.epochs} epochs")
    start, pace, updates = time.perf_counter(), Pace(), itertools.count(state.updates + 1)
    for epoch in range(state.epoch + 1, args.epochs):
        if args.early_stop and utils.in_main_process(lambda: state.stopped_early):
            folder.reason = f"no better top-1 since epoch {state.best_epoch} (--early-stop {args.early_stop})"
            log(f"stopped after epoch {state.epoch}: {folder.reason}")
            break
        begin = time.perf_counter()
        train(epoch, updates)
        score()
        pace.add(time.perf_counter() - begin)
        left = datetime.timedelta(seconds=int(pace.left(args.epochs - 1 - epoch)))
        log(f"Epoch: [{epoch}] of {args.epochs} done, the run's eta: {left}")
    log(f"Training time {datetime.timedelta(seconds=int(time.perf_counter() - start))}")


def train_epoch(state: TrainingState, saver, loader, parallel, criterion, settings, epoch: int, updates) -> None:
    """Train an epoch, or what is left of it, and save the state. updates: counts them for the moving average."""
    args, model, ema, mixup = state.args, state.model, state.ema, settings.mixup
    hooks = engine.EpochHooks(
        after_step=(lambda: ema.update(model, next(updates) if ema.use_warmup else None)) if ema else None,
        wants_to_stop=lambda batch: saver.signals.poll("train", state, batch),
        after_update=saver.after_update,
        progress=state.progress,
    )
    state.progress = None
    if mixup is not None:
        mixup.mixup_enabled = not args.mixup_off_epoch or epoch < args.mixup_off_epoch
    loader.sampler.set_epoch(epoch, hooks.progress["batches"] * args.batch_size if hooks.progress else 0)
    try:
        state.train_stats = engine.train_one_epoch(
            parallel, criterion, loader, state.optimizer, state.device, epoch, state.scaler, settings, hooks
        )
    except NonFiniteError as error:
        record_images(saver.folder, loader, args.batch_size, epoch, error.step)
        raise NonFiniteError(f"{error}; its images are in {saver.folder.path / NON_FINITE}", error.step) from None
    # After the epoch, as in the official code: epochs 0 and 1 both train at the first rate.
    state.scheduler.step(epoch)
    state.epoch, state.evaluated = epoch, False
    saver.save()


def build_loss(args: Options, train_set, device: torch.device) -> nn.Module:
    weights = class_weights(args.class_weights, train_set.classes, datasets.labels(train_set))
    weighted = {} if weights is None else {"weights": weights.to(device)}
    return build_criterion(mixing=args.mixing, smoothing=args.smoothing, **weighted)


def build_state(args: Options, device, model, ema, train_set, val_set, train_loader) -> TrainingState:
    """Return the state of a run that has not started."""
    global_batch = args.batch_size * utils.get_world_size() * args.grad_accum_steps
    lr, dtype = args.lr * (1 if args.unscale_lr else global_batch / 512), amp_dtype(args, device)
    optimizer = build_optimizer(args, model, lr)
    scheduler = build_schedule(args, optimizer)
    resolved = dict(
        amp_dtype=str(dtype).removeprefix("torch."),
        lr=lr,
        global_batch=global_batch,
        data=datasets.fingerprint(train_set, val_set, root=args.data_path),
        **class_weights_recipe(args.class_weights),
    )
    return TrainingState(
        args=args,
        classes=list(train_set.classes),
        recipe=resume.recipe(vars(args), **resolved),
        device=device,
        model=model,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        n_parameters=count_parameters(model),
        updates_per_epoch=len(train_loader) // args.grad_accum_steps,
        epoch=args.start_epoch - 1,
    )


def log_run(state: TrainingState, train_loader, folder: RunFolder) -> None:
    args, global_batch = state.args, state.recipe["global_batch"]
    product = f"{args.batch_size} x {utils.get_world_size()} processes x {args.grad_accum_steps} steps"
    scaling = "--unscale-lr" if args.unscale_lr else f"{args.lr:g} x {global_batch} / 512"
    log(f"global batch {global_batch} ({product}), lr {state.recipe['lr']:.6g} ({scaling})")
    counts = f"{state.updates_per_epoch} updates an epoch, {state.n_parameters} parameters"
    where = f"device {state.device}, {state.recipe['amp_dtype']}, {train_loader.num_workers} workers a process"
    log(f"{counts}, {where}, output in {folder.path}")
    for line in options.schedule_warnings(args, state.recipe["lr"]):
        utils.warn(line)
    recipe = RECIPE_BATCH.get(args.model)
    if recipe and recipe != global_batch:
        what = f"the official {args.model} was trained with a global batch of {recipe}, not {global_batch}"
        utils.warn(f"{what}: expect another result")


def score_epoch(state: TrainingState, saver: CheckpointManager, val_loader, network: nn.Module) -> tuple[dict, dict]:
    """Return the figures of the epoch that was trained last, and of the moving average if there is one."""
    args, size = state.args, len(val_loader.dataset)
    shares = utils.get_world_size() if args.dist_eval else 1
    rounds = math.ceil(math.ceil(size / shares) / args.eval_batch_size)
    kwargs = dict(shared=args.dist_eval, between=saver.stop_if_asked, rounds=rounds)
    kwargs |= precision_kwargs(args, state.device)
    test, ema = engine.evaluate(val_loader, network, state.device, **kwargs), {}
    log(f"Accuracy of the network on the {size} test images: {test['acc1']:.1f}%")
    if state.ema:
        stats = engine.evaluate(val_loader, state.ema.module, state.device, **kwargs)
        ema = {f"ema_test_{name}": stats[name] for name in ("loss", "acc1", "acc5")}
        log(f"Accuracy of the EMA network on the {size} test images: {stats['acc1']:.1f}%")
    return test, ema


def evaluate_epoch(
    state: TrainingState, saver: CheckpointManager, val_loader, network: nn.Module, loggers: Loggers
) -> None:
    """Score the epoch that was trained last if it is its turn, log its line, and save it as the best if it is."""
    args, number, old_best, is_best = state.args, state.epoch + 1, (state.best, state.best_epoch), False
    test, ema = dict.fromkeys(("loss", "acc1", "acc5")), {}
    if number % args.eval_interval == 0 or number == args.epochs:
        test, ema = score_epoch(state, saver, val_loader, network)
        is_best = test["acc1"] > state.best
        if is_best:
            state.best, state.best_epoch = test["acc1"], state.epoch
        log(f"Max accuracy: {state.best:.2f}%")
    state.evaluated = True
    line = {f"train_{name}": state.train_stats[name] for name in ("lr", "loss")}
    line |= {f"test_{name}": test[name] for name in ("loss", "acc1", "acc5")}
    line |= {"epoch": state.epoch, "n_parameters": state.n_parameters} | ema
    line |= {name: state.train_stats[name] for name in ("time", "data_time", "images_per_s", "max_memory_mb")}
    saver.folder.attempt(lambda: saver.folder.write_log(line))
    loggers.write(line)
    # The best first: after a kill between the two, the epoch counts as not evaluated, and is evaluated again.
    if not saver.save(best=is_best):
        state.best, state.best_epoch = old_best  # the best on disk is still the one before


def run(args: Options, on_poll: Callable[..., None] = lambda *where: None) -> int:
    """Run main and return its exit code: an error that a user can act on is one line (TWINS_DEBUG=1 raises it)."""
    try:
        main(args, on_poll)
        return 0
    except (Preempted, UserError, NonFiniteError, RuntimeError) as error:
        known = processes.explain(error)
        if known is None or os.environ.get("TWINS_DEBUG") == "1":
            raise
        code, line = known
        LIVE.clear()
        processes.end_stopped_processes()
        print_error(line, kind="stopped" if isinstance(error, Preempted) else "error")
        return code


if __name__ == "__main__":
    utils.leave(run(ARGS))
