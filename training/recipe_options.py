"""Options of main.py beyond the official recipe: configuration files, fine-tuning, balance, schedule and records.

Their defaults leave everything as it is without them, so that such a value is not stored.
"""

import argparse
import ast
import functools
import re

from training.command_line import Parser, above_zero, count, numbers, path, positive, share
from training.errors import UserError

any_number = numbers(float, "a number", lambda value: True)
# What changes training alone: --eval and --throughput do not read them.
TRAINING = ("pretrained", "layer_decay", "freeze", "head_lr_scale", "class_weights", "balanced_sampling", "early_stop")
TRAINING += (
    "log_tensorboard",
    "log_wandb",
    "unscale_lr",
    "mixup_off_epoch",
    "eval_interval",
    "global_batch",
    "dry_run",
    "bad_images",
    "max_bad",
)


def frozen_part(text: str) -> str:
    if text and not re.fullmatch("backbone|stages:[1-4]", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is neither backbone nor stages:1 to stages:4")
    return text


class KeyValues(argparse.Action):
    """timm's KEY=VALUE ...: values are Python's numbers, True, None, lists; else text."""

    def __call__(self, parser, namespace, values, option_string=None):
        found = {}
        for each in values:
            key, equals, value = each.partition("=")
            if not (equals and key.isidentifier()):
                parser.error(f"argument {option_string}: expected KEY=VALUE, not {each[:40]!r}")
            try:
                found[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found[key] = value
        setattr(namespace, self.dest, found)


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("configuration").add_argument
    add("--config", type=path, default="", metavar="FILE", help="options in YAML; those of the command line win")

    add = parser.add_argument_group("fine-tuning and other images").add_argument
    add(
        "--pretrained", action="store_true", help="start from timm's weights on its hub, as --finetune does from a file"
    )
    add("--in-chans", type=positive, default=3, choices=(1, 3), help="channels of images, 1: gray (%(default)s)")
    note = "of each channel (ImageNet's, of gray their average)"
    add("--mean", type=any_number, nargs="+", metavar="F", help=note)
    add("--std", type=above_zero, nargs="+", metavar="F", help=note)
    add("--model-kwargs", nargs="+", action=KeyValues, default={}, metavar="KEY=VALUE", help="for timm.create_model")
    what = "learning rates fall by this factor from the head down, block by block (not by default)"
    add("--layer-decay", type=share, metavar="F", help=what)
    what = "freeze everything but the head, or the first N stages"
    add("--freeze", type=frozen_part, default="", metavar="{backbone,stages:N}", help=what)
    what = "factor of the head's learning rate, beside that of --layer-decay (%(default)s)"
    add("--head-lr-scale", type=above_zero, default=1.0, metavar="F", help=what)

    add = parser.add_argument_group("training images that cannot be read").add_argument
    what = "end the run, or replace them by others of their class, listed in bad_images.txt (%(default)s)"
    add("--bad-images", choices=("error", "skip"), default="error", help=what)
    add("--max-bad", type=count, default=100, metavar="N", help="end the run at more of them (%(default)s)")

    add = parser.add_argument_group("classes of uneven size").add_argument
    what = "weight of each class in the loss, under Mixup of its share: balanced, or a CSV of class,weight"
    add("--class-weights", type=path, default="", metavar="{balanced,FILE}", help=what)
    add("--balanced-sampling", action="store_true", help="draw each class equally often, as many images an epoch")

    add = parser.add_argument_group("schedule of a run").add_argument
    add("--early-stop", type=positive, metavar="PATIENCE", help="end after so many epochs without a better top-1")
    add("--eval-interval", type=positive, default=1, metavar="N", help="evaluate every N epochs, and the last one")
    add(
        "--mixup-off-epoch",
        type=count,
        default=0,
        metavar="N",
        help="from epoch N on without Mixup and CutMix (0: never)",
    )
    add("--unscale-lr", action="store_true", help="take --lr as it is, whatever the global batch")
    what = "images per update: sets --grad-accum-steps by --batch-size and processes"
    add("--global-batch", type=positive, metavar="N", help=what)
    what = "log what would happen, write the first batch as augmented.png, and exit"
    add("--dry-run", action="store_true", help=what)

    add = parser.add_argument_group("records").add_argument
    add("--log-tensorboard", action="store_true", help="write each epoch's metrics for TensorBoard too, into tb/")
    add("--log-wandb", action="store_true", help="send them to Weights & Biases (WANDB_MODE=offline: to files)")


@functools.cache
def defaults() -> dict[str, object]:
    """Return the default of each option here."""
    parser = Parser(add_help=False)
    add_arguments(parser)
    return vars(parser.parse_args([]))


def without_defaults(args: dict) -> dict:
    """Return options by name as they are stored: without the unused ones of this file."""
    unused = defaults()
    return {name: value for name, value in args.items() if name not in unused or value != unused[name]}


def contradiction(args: argparse.Namespace) -> str:
    """Return what two given options of this file cannot mean together, as WHAT (WHERE): WHAT TO DO; empty if fine."""
    if args.pretrained and args.finetune:
        return f"two sources of weights (--pretrained, --finetune {args.finetune}): omit one"
    if args.in_chans == 1 and args.fast_augment:
        return "RandAugment on the device needs colors (--fast-augment, --in-chans 1): omit --fast-augment"
    if args.balanced_sampling and args.repeated_aug:
        return "two ways to draw images (--balanced-sampling, --repeated-aug): omit one"
    if args.global_batch and "grad_accum_steps" in args.given:
        return "it is derived (--grad-accum-steps, --global-batch): omit one of them"
    return ""


def derive_accumulation(args: argparse.Namespace, world: int) -> None:
    """Set --grad-accum-steps by --global-batch, for `world` processes; raise UserError if that is no whole number."""
    step = args.batch_size * world
    if args.global_batch and args.global_batch % step:
        where = f"--global-batch {args.global_batch}, --batch-size {args.batch_size} x {world} processes"
        raise UserError(f"no whole number of batches ({where}): give a multiple of {step}, or change --batch-size")
    if args.global_batch:
        args.grad_accum_steps = args.global_batch // step


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    """Return reasons by option, for those that such a run does not read."""
    mode = "--throughput" if args.throughout else "--eval"
    reasons = {name: (args.throughout or args.eval) and f"{mode} does not train" for name in TRAINING}
    if args.bad_images == "error":
        reasons["max_bad"] = "--bad-images is error"
    if args.data_set.startswith("CIFAR"):
        reasons["bad_images"] = reasons["max_bad"] = f"--data-set {args.data_set} has no image files"
    if not args.mixing:
        reasons["mixup_off_epoch"] = "--mixup and --cutmix are 0"
    return reasons
