"""The command line of main.py: the official options with their defaults, and ours under timm's names.

Nothing here imports torch, so that --help and a wrong option are answered at once.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from training import config, recipe_options
from training.command_line import (
    LARGEST,
    Parser,
    above_zero,
    add_max_pixels,
    amount,
    count,
    fraction,
    is_name,
    path,
    pixels,
    positive,
    probability,
    seconds,
    seed,
    share,
    split,
    wait,
)
from training.threads import cores

# What the official code accepts and this one cannot honor: each ends with what to use instead.
REFUSED = {
    "use_mcloader": "it read ImageNet through a memcached server of one cluster: omit it, the folder is read directly "
    "with --num_workers",
    "resplit": "the official code never read it: to erase only part of a batch use --reprob, to repeat images "
    "--repeated-aug",
}


def is_side(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def is_list(value: object, *lengths: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) in lengths


ALPHA, EXIF = ("white", "black", "drop"), ("apply", "ignore")
# What --eval takes from a checkpoint: the model, how its images were prepared, and which were held out;
# each with what its value may be.
STORED = {
    "model": lambda value: isinstance(value, str),
    "input_size": lambda value: is_side(value) or (is_list(value, 2) and all(map(is_side, value))),
    "eval_crop_ratio": lambda value: isinstance(value, float) and 0 < value <= 1,
    "alpha": lambda value: value in ALPHA,
    "exif": lambda value: value in EXIF,
    "train_split": lambda value: value != "train" and is_name(value),
    "val_split": lambda value: value != "val" and is_name(value),
    "val_fraction": lambda value: isinstance(value, float) and 0 < value < 1,
    "in_chans": lambda value: value in (1, 3),
    "mean": lambda value: is_list(value, 1, 3),
    "std": lambda value: is_list(value, 1, 3),
    "model_kwargs": lambda value: isinstance(value, dict),
}


class Options(argparse.Namespace):
    """What the command line asks for. `given`, the names of the options that were passed, is not in vars(), which
    checkpoints store.
    """

    __slots__ = ("given",)

    def __repr__(self) -> str:  # the official log's line begins with Namespace
        return repr(argparse.Namespace(**self.stored))

    @property
    def stored(self) -> dict:
        """Return what checkpoints and records store."""
        return recipe_options.without_defaults(vars(self))

    @property
    def as_yaml(self) -> str:
        """Return the options that were passed, as a file for --config."""
        return config.text({name: getattr(self, name) for name in self.given - config.NOT_WRITTEN})

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir or self.model)

    @property
    def sides(self) -> tuple[int, int]:
        """Return height and width of images."""
        return (self.input_size,) * 2 if isinstance(self.input_size, int) else tuple(self.input_size)

    @property
    def eval_batch_size(self) -> int:
        return int(1.5 * self.batch_size)  # as in the official code

    @property
    def mixing(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    @property
    def workers(self) -> int:
        """Return the number given; else the official 10, but at most this process's share of the machine's cores."""
        share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return self.num_workers if "num_workers" in self.given else min(self.num_workers, max(share, 1))


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="main.py", description="Train, evaluate and time Twins (PCPVT, ALTGVT) on images.")

    add = parser.add_argument_group("what to do (default: train)").add_argument
    add(
        "--eval",
        action="store_true",
        help="evaluate the weights of --resume on val, and exit; model and image size are theirs if not given",
    )
    add("--throughout", "--throughput", action="store_true", help="time inference in images per second, and exit")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="alt_gvt_small", metavar="NAME", help="a model of gvt.py or timm (%(default)s)")
    what = "side of an image, or height and width (%(default)s)"
    add("--input-size", type=pixels, nargs="+", default=224, metavar="PIXELS", help=what)
    add("--drop", type=probability, default=0.0, metavar="P", help="dropout rate (%(default)s)")
    add("--drop-path", type=probability, default=0.1, metavar="P", help="stochastic depth, last block (%(default)s)")
    add(
        "--finetune",
        type=path,
        default="",
        metavar="FILE",
        help="start from weights, or a run's best; a head of another size is reset",
    )
    parts = dict(nargs="?", const="block", default=False, choices=("block", "mlp"))
    add("--grad-checkpointing", **parts, help="recompute activations to save memory; mlp: of the MLPs alone")
    add("--channels-last", action="store_true", help="images and weights in channels-last memory format")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile the model")
    add("--model-ema", action="store_true", help="keep and score a moving average of the weights too")
    add("--model-ema-decay", type=probability, default=0.9998, metavar="D", help="of --model-ema (%(default)s)")
    add("--model-ema-warmup", action="store_true", default=True, help="let the decay grow from 0 to that (default)")
    add("--no-model-ema-warmup", action="store_false", dest="model_ema_warmup", help="the same decay from the start")

    add = parser.add_argument_group("optimization").add_argument
    add("--batch-size", type=positive, default=64, metavar="N", help="images per process and step (%(default)s)")
    add("--grad-accum-steps", type=positive, default=1, metavar="N", help="batches per update (%(default)s)")
    add("--epochs", type=positive, default=300, metavar="N", help="(%(default)s)")
    add("--opt", default="adamw", metavar="NAME", help="an optimizer of timm (%(default)s)")
    add("--opt-eps", type=above_zero, default=1e-8, metavar="E", help="(%(default)s)")
    add("--opt-betas", type=probability, nargs="+", metavar="B", help="(the optimizer's own)")
    add(
        "--clip-grad", type=amount, default=5.0, metavar="NORM", help="largest gradient norm, 0: no limit (%(default)s)"
    )
    add("--momentum", type=probability, default=0.9, metavar="M", help="for optimizers that have one (%(default)s)")
    add("--weight-decay", type=amount, default=0.05, metavar="W", help="(%(default)s)")
    amp = ("float16", "bfloat16", "float32")
    add("--amp-dtype", choices=amp, help="precision of the forward pass (CUDA: float16, CPU: float32)")
    residual = ("float32", "autocast")
    what = "of the sums x + f(x) behind each PEG; autocast: --amp-dtype, less memory traffic (%(default)s)"
    add("--residual-dtype", default="float32", choices=residual, help=what)

    add = parser.add_argument_group("learning rate, set after each epoch").add_argument
    add("--sched", default="cosine", metavar="NAME", help="a schedule of timm (%(default)s)")
    add("--lr", type=amount, default=5e-4, help="for a global batch of 512; scaled in proportion (%(default)s)")
    add("--lr-noise", type=amount, nargs="+", metavar="F", help="on and off points, fractions of the run")
    add("--lr-noise-pct", type=above_zero, default=0.67, metavar="F", help="(%(default)s)")
    add("--lr-noise-std", type=amount, default=1.0, metavar="S", help="(%(default)s)")
    add("--warmup-lr", type=amount, default=1e-6, metavar="LR", help="not scaled (%(default)s)")
    add("--min-lr", type=amount, default=1e-5, metavar="LR", help="not scaled (%(default)s)")
    add("--warmup-epochs", type=count, default=5, metavar="N", help="unless 0, two at --warmup-lr (%(default)s)")
    add("--decay-epochs", type=above_zero, default=30, metavar="N", help="for --sched step (%(default)s)")
    add(
        "--cooldown-epochs",
        type=count,
        default=10,
        metavar="N",
        help="without effect: the schedule ignores it (%(default)s)",
    )
    add(
        "--patience-epochs",
        type=count,
        default=10,
        metavar="N",
        help="without effect: no schedule has patience (%(default)s)",
    )
    add("--decay-rate", "--dr", type=amount, default=0.1, metavar="R", help="for --sched step (%(default)s)")

    add = parser.add_argument_group("augmentation").add_argument
    add("--color-jitter", type=amount, default=0.4, metavar="F", help="without effect beside --aa (%(default)s)")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's policy, '' for none (%(default)s)")
    add("--fast-augment", action="store_true", help="RandAugment on the device: as drawn for --aa, rounded otherwise")
    add("--smoothing", type=probability, default=0.1, metavar="F", help="of labels (%(default)s)")
    kinds = ("random", "bilinear", "bicubic", "lanczos")
    add("--train-interpolation", default="bicubic", choices=kinds, help="(%(default)s)")
    add("--repeated-aug", action="store_true", help="a third of the images in each epoch, three times each")
    add("--no-repeated-aug", action="store_false", dest="repeated_aug", help="(default)")
    add("--reprob", type=probability, default=0.25, metavar="P", help="of random erasing (%(default)s)")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="(%(default)s)")
    add("--recount", type=positive, default=1, metavar="N", help="(%(default)s)")
    add("--resplit", action="store_true", help="refused: never had an effect")
    add("--hflip", type=probability, default=0.5, metavar="P", help="of a horizontal flip (%(default)s)")
    bounds = dict(type=amount, nargs=2, metavar=("MIN", "MAX"))
    add("--scale", **bounds, default=(0.08, 1.0), help="area of a random crop %(default)s")
    add("--ratio", **bounds, default=(3 / 4, 4 / 3), help="its width to height (3/4, 4/3)")
    add("--mixup", type=amount, default=0.8, metavar="ALPHA", help="0 for none (%(default)s)")
    add("--cutmix", type=amount, default=1.0, metavar="ALPHA", help="0 for none (%(default)s)")
    add("--cutmix-minmax", type=amount, nargs="+", metavar="F", help="overrides --cutmix and sets it on")
    add("--mixup-prob", type=probability, default=1.0, metavar="P", help="of either (%(default)s)")
    add("--mixup-switch-prob", type=probability, default=0.5, metavar="P", help="of cutmix beside mixup (%(default)s)")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="(%(default)s)")

    data = parser.add_argument_group("data")
    add = data.add_argument
    default = "/datasets01/imagenet_full_size/061417/"
    add("--data-path", type=path, default=default, metavar="FOLDER", help="of train/CLASS/*, val/CLASS/* (%(default)s)")
    what = "images for training in --data-path: a folder, .tar, .zip, .csv or shards of this name (%(default)s)"
    add("--train-split", type=split, default="train", metavar="NAME", help=what)
    add("--val-split", type=split, default="val", metavar="NAME", help="the same for validation (%(default)s)")
    what = "hold out a part of each training class where there is no val; kept in split.csv"
    add("--val-fraction", type=fraction, default=0.0, metavar="F", help=what)
    what = "classes of a flat val folder: one a line in the order of file names, or file name,class"
    add("--val-labels", type=path, default="", metavar="FILE", help=what)
    what = "class names, one a line: their order, or what class numbers mean (classes.txt in --data-path)"
    add("--class-map", type=path, default="", metavar="FILE", help=what)
    sets = ("CIFAR", "CIFAR10", "IMNET", "INAT", "INAT19")
    add("--data-set", default="IMNET", choices=sets, help="CIFAR is CIFAR-100 (%(default)s)")
    inat = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
    add("--inat-category", default="name", choices=inat, help="what iNaturalist's classes are (%(default)s)")
    add("--use-mcloader", action="store_true", help="refused: a cache of one cluster")
    add("--num_workers", type=count, default=10, metavar="N", help="per process (%(default)s, or fewer cores)")
    add("--pin-mem", action="store_true", default=True, help="(default)")
    add("--no-pin-mem", action="store_false", dest="pin_mem", help="do not pin memory for the copy to a GPU")
    add("--eval-crop-ratio", type=share, default=0.875, metavar="F", help="share of the resized side (%(default)s)")
    add("--alpha", default="white", choices=ALPHA, help="under transparent pixels (%(default)s)")
    add("--exif", default="ignore", choices=EXIF, help="the EXIF orientation of images (%(default)s)")
    add_max_pixels(data)
    what = "with --eval: a CSV of each class's top-1 and the confusion matrix, and a figure"
    add("--per-class", type=path, default="", metavar="FILE", help=what)
    what = "with --eval: each image's label and top-5 as CSV, JSON or JSON lines (.jsonl)"
    add("--predictions", type=path, default="", metavar="FILE", help=what)
    add("--dist-eval", action="store_true", help="share the evaluation among the processes; exact for any number")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", type=path, default="", metavar="FOLDER", help="of a training run (./MODEL)")
    add("--overwrite", action="store_true", help="start in a folder that holds a run, and replace that run")
    what = (
        "continue a checkpoint or a folder's newest intact one (auto: --output_dir); with --eval: weights, or its best"
    )
    add("--resume", type=path, default="", metavar="FILE", help=what)
    add("--resume-changed", action="store_true", help="continue although model, data or recipe differ from the stored")
    add("--checkpoint-interval", type=count, default=0, metavar="N", help="save every N updates too (0: never)")
    add("--checkpoint-hist", type=positive, default=2, metavar="N", help="kept beside the best (%(default)s)")
    add("--keep-going", action="store_true", help="go on if a checkpoint cannot be written, retry with the next")
    add("--report", type=path, default="", metavar="FILE", help="list which weights fit, in JSON")
    add("--start_epoch", type=count, default=0, metavar="N", help="(%(default)s)")
    add("--seed", type=seed, default=0, metavar="N", help="(%(default)s)")
    add("--deterministic", action="store_true", help="the same bits every time on a GPU too, at some cost in speed")
    add("--device", default="cuda", metavar="NAME", help="cuda or cpu; if not given: cuda if there is one")
    add("--world_size", type=positive, default=1, metavar="N", help="without effect: the launcher sets it")
    add("--dist_url", default="env://", metavar="URL", help="where processes meet (%(default)s)")
    note = "seconds that processes wait for one that does not answer (%(default)s)"
    add("--dist-timeout", type=seconds, default=1800, metavar="S", help=note)
    note = "seconds to wait for the data-loading processes, 0: no limit (%(default)s)"
    add("--loader-timeout", type=wait, default=1800, metavar="S", help=note)
    add("--local-rank", type=int, help=argparse.SUPPRESS)  # torch.distributed.launch without --use_env
    recipe_options.add_arguments(parser)
    return parser


def take_stored(args: Options, stored: Mapping) -> list[str]:
    """Set what is STORED in a checkpoint's options and was not given; return lines on that, and on what differs."""
    found = {name: stored[name] for name, is_valid in STORED.items() if name in stored and is_valid(stored[name])}
    taken = {name: value for name, value in found.items() if name not in args.given}
    given = [name for name in found.keys() & args.given if spelled(found[name]) != spelled(getattr(args, name))]
    vars(args).update(taken)
    words = [f"{flag(name)} {spelled(value)}" for name, value in taken.items()]
    lines = [f"from the checkpoint: {', '.join(words)}"] if words else []
    for name in sorted(given):
        own, theirs = spelled(getattr(args, name)), spelled(found[name])
        lines.append(f"{flag(name)} {own} as given, where the checkpoint has {theirs}")
    return lines


def spelled(value: object) -> str:
    """Return the values of an option as on a command line."""
    if isinstance(value, Mapping):
        value = [f"{key}={item}" for key, item in value.items()]
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def without_effect(args: Options) -> dict[str, str]:
    """Return the given options that this run does not read, each with the reason."""
    small = max(args.sides) <= 32
    shifted = small and "images of 32 pixels or less are shifted, not cropped"
    rates = ("step", "multistep", "plateau", "poly")
    reasons = {
        "color_jitter": args.aa and "--aa is set",
        "cooldown_epochs": "the official schedule ignores it",
        "decay_epochs": args.sched != "step" and f"--sched {args.sched} has no steps",
        "decay_rate": args.sched not in rates and f"--sched {args.sched} has no such rate",
        "patience_epochs": args.sched != "plateau" and f"--sched {args.sched} has no patience",
        "model_ema_decay": not args.model_ema and "--model-ema is not given",
        "model_ema_warmup": not args.model_ema and "--model-ema is not given",
        "momentum": args.opt.lower() in ("adamw", "adam") and f"--opt {args.opt} has betas",
        "world_size": "the launcher sets the number of processes",
        "residual_dtype": args.amp_dtype == "float32" and "--amp-dtype is float32",
        "remode": not args.reprob and "--reprob is 0",
        "recount": not args.reprob and "--reprob is 0",
        "inat_category": not args.data_set.startswith("INAT") and f"--data-set {args.data_set} has no categories",
        "train_interpolation": small and "images of 32 pixels or less are not resized",
        "scale": shifted,
        "ratio": shifted,
    }
    reasons |= recipe_options.without_effect(args)
    for name in ("resume", "finetune", "model_ema"):
        reasons[name] = args.throughout and "--throughput times a new model"
    if args.eval and not args.throughout:
        reasons["finetune"] = "--eval takes the weights of --resume"
    for name in ("train_split", "val_split", "val_fraction", "val_labels", "class_map"):
        reasons[name] = args.data_set != "IMNET" and f"--data-set {args.data_set} has parts of its own"
    for name in ("per_class", "predictions"):
        reasons[name] = (args.throughout or not args.eval) and "it is for --eval"
    for name in ("mixup_prob", "mixup_switch_prob", "mixup_mode"):
        reasons[name] = not args.mixing and "--mixup and --cutmix are 0"
    return {name: reason for name, reason in reasons.items() if reason and name in args.given}


def schedule_warnings(args: Options, lr: float) -> list[str]:
    """Return what is unusual about a schedule that starts at the rate `lr`, after warm-up."""
    lines = []
    if args.sched in ("cosine", "tanh", "poly") and lr <= args.min_lr > 0:
        what = f"the learning rate does not fall: after warm-up it is {lr:g}, and --min-lr is {args.min_lr:g}"
        lines.append(f"{what}; raise --lr, which is scaled by the global batch / 512, or lower --min-lr, which is not")
    if 2 * args.warmup_epochs >= args.epochs:
        what = f"warm-up takes {args.warmup_epochs} of {args.epochs} epochs, from a rate of {args.warmup_lr:g}"
        lines.append(f"{what} to {lr:g}; raise --epochs, or lower --warmup-epochs")
    return lines


def parse_args(argv: list[str]) -> Options:
    """Parse the command line; end the process with one line and exit code 2 if an option is wrong."""
    parser = get_parser()
    argv = [*config.tokens(parser, argv), *argv]
    args = parser.parse_args(argv, namespace=Options())
    unset = object()  # argparse fills in a default only for a name that the namespace lacks
    again = parser.parse_args(argv, namespace=argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    args.given = frozenset(name for name, value in vars(again).items() if value is not unset)
    if isinstance(args.input_size, list):
        if len(args.input_size) > 2:
            parser.error("argument --input-size: expected one number, or height and width")
        # A square is stored as one number, as by the official code.
        args.input_size = args.input_size[0] if len(set(args.input_size)) == 1 else tuple(args.input_size)
    for name in ("scale", "ratio", "cutmix_minmax"):
        bounds = getattr(args, name)
        if bounds is not None and (len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]):
            parser.error(f"argument {flag(name)}: expected two numbers above 0, the smaller first")
    for name, advice in REFUSED.items():
        if getattr(args, name):
            parser.exit(2, f"{parser.prog}: error: cannot be used ({flag(name)}): {advice}\n")
    if wrong := recipe_options.contradiction(args):
        parser.exit(2, f"{parser.prog}: error: {wrong}\n")
    return args
