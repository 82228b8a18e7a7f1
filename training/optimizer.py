"""The optimizer and its schedule: frozen parts, and a learning rate for each part of a model."""

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
from collections.abc import Callable

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from training.errors import UserError, short_reason
from training.options import Options
from utils import log

# Optimizers that torch can run in one kernel and skip on the device (a skip of sgd leaves its momentum unset).
FUSED = ("adam", "adamw")
STAGE_PARTS = ("patch_embeds", "pos_drops", "blocks", "pos_block")  # lists of a Twins with an entry for each stage

# ---------------------------------------------------------------- frozen parts


def first_stages(model: nn.Module, count: int) -> list[nn.Module]:
    """Return the modules of the first `count` stages of a Twins: embeddings, blocks, position encodings."""
    return [module for part in STAGE_PARTS for module in getattr(model, part)[:count]]


def frozen_modules(args: Options, model: nn.Module) -> list[nn.Module]:
    """Return what --freeze names; raise UserError for stages of a model that has no such lists."""
    if args.freeze == "backbone":
        head = set(model.get_classifier().modules())
        return [each for each in model.modules() if not head & set(each.modules())]
    if not args.freeze:
        return []
    if not all(hasattr(model, part) for part in STAGE_PARTS):
        what = f"only models of gvt.py have such stages (--freeze {args.freeze}, --model {args.model})"
        raise UserError(f"{what}: use --freeze backbone")
    return first_stages(model, int(args.freeze.removeprefix("stages:")))


def freeze_parts(args: Options, model: nn.Module) -> None:
    """Let what --freeze names have no gradient, and so no optimizer state."""
    if args.freeze == "backbone":  # with the parameters that belong to no part, such as position embeddings
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    for module in frozen_modules(args, model):
        module.requires_grad_(False)
    if args.freeze:
        every = list(model.parameters())
        frozen = sum(each.numel() for each in every if not each.requires_grad)
        log(f"frozen (--freeze {args.freeze}): {frozen} of {sum(each.numel() for each in every)} parameters")


def train_mode(args: Options, model: nn.Module) -> Callable[[nn.Module], None]:
    """Return what sets the wrapped model to training mode, but what is frozen to evaluation mode: without drop path."""
    frozen = frozen_modules(args, model)

    def train(wrapped: nn.Module) -> None:
        wrapped.train()
        for module in frozen:
            module.eval()

    return train


# ---------------------------------------------------------------- learning rates


def parameter_groups(args: Options, model: nn.Module) -> list[dict]:
    """Return timm's groups by weight decay and --layer-decay; for --head-lr-scale, the head has groups of its own."""
    exempt = dict(no_weight_decay_list=getattr(model, "no_weight_decay", set)())
    if args.layer_decay is None:
        groups = param_groups_weight_decay(model, args.weight_decay, **exempt)
    else:
        groups = param_groups_layer_decay(model, args.weight_decay, layer_decay=args.layer_decay, **exempt)
    if args.head_lr_scale == 1:
        return groups
    head, split = {id(each) for each in model.get_classifier().parameters()}, []
    for group in groups:
        for in_head in (False, True):
            scale = group.get("lr_scale", 1.0) * (args.head_lr_scale if in_head else 1.0)
            own = [each for each in group["params"] if (id(each) in head) == in_head]
            split += [group | {"params": own, "lr_scale": scale}] if own else []
    return split


def rate_lines(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Return a line for each factor of the learning rate: which parameters have it."""
    names, parts = {parameter: name for name, parameter in model.named_parameters()}, {}
    for group in optimizer.param_groups:
        owners = [".".join(names[each].split(".")[: 3 if "blocks." in names[each] else 2]) for each in group["params"]]
        parts.setdefault(group["lr_scale"], {}).update(dict.fromkeys(owners))
    return [f"lr x {scale:.6g}: {', '.join(sorted(owners))}" for scale, owners in sorted(parts.items())]


def build_optimizer(args: Options, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    kwargs = optimizer_kwargs(args) | {"lr": lr}
    if args.opt.lower() in FUSED and next(model.parameters()).device.type in ("cpu", "cuda"):
        kwargs["fused"] = True
    scaled = args.layer_decay is not None or args.head_lr_scale != 1
    if scaled:
        kwargs["param_group_fn"] = lambda model: parameter_groups(args, model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"nothing to train (--freeze {args.freeze}): the model has no classifier, freeze less")
    try:
        optimizer = create_optimizer_v2(model, **kwargs)
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"cannot make the optimizer (--opt {args.opt}): {short_reason(error)}") from error
    for line in rate_lines(optimizer, model) if scaled else []:
        log(line)
    return optimizer


def build_schedule(args: Options, optimizer: torch.optim.Optimizer) -> Scheduler:
    """Return the schedule, which has set the first epoch's rate of each group: timm's times the group's factor."""
    try:
        return create_scheduler(args, optimizer)[0]
    except ValueError as error:
        what = f"no such schedule (--sched {args.sched}): {short_reason(error)}"
        raise UserError(f"{what}, the official one is cosine") from error
