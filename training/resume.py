"""Continuing a run: that it is the same run, and the optimizer's state, matched by the parameters' names.

Files are ours, or the published code's, whose arguments are those of its command line with the rate already scaled.
"""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from training import checkpoint
from training.errors import UserError
from utils import warn

# What may change between the parts of a run: where things are, how fast they go, what is kept. The batch counts through
# the global batch.
FREE = {
    *(
        "eval",
        "throughout",
        "finetune",
        "resume",
        "resume_changed",
        "report",
        "overwrite",
        "output_dir",
        "start_epoch",
        "keep_going",
    ),
    *(
        "checkpoint_interval",
        "checkpoint_hist",
        "device",
        "world_size",
        "dist_url",
        "local_rank",
        "dist_timeout",
        "loader_timeout",
    ),
    *("data_path", "num_workers", "pin_mem", "dist_eval", "use_mcloader", "resplit", "deterministic"),
    *("grad_checkpointing", "channels_last", "torchcompile", "batch_size", "grad_accum_steps"),
}
RENAMED = {"t_mul": "cycle_mul", "decay_rate": "cycle_decay"}  # of the published schedule's state, in today's timm
MOST = 1e15  # no count or figure of a training is as large
COUNTERS = ("step", "lookahead_step")  # what some optimizers count by the group, not by the parameter
MOST_EPOCHS = 10_000  # compared between two schedules
STATS = {
    "lr",
    "loss",
    "time",
    "data_time",
    "images_per_s",
    "max_memory_mb",
}  # of an epoch's training, for its line in the log
COMPLETE = {"optimizer", "lr_scheduler", "epoch"}  # what a file must hold beside weights to be continued


# ---------------------------------------------------------------- the same run


def recipe(args: Mapping, **resolved: object) -> dict:
    """What decides a run's result: its options but for those that are free, with what they come to here."""
    return {name: value for name, value in args.items() if name not in FREE} | resolved


def stored_recipe(payload: Mapping) -> dict:
    """The recipe of a file of ours, or as far as the published arguments tell it."""
    if isinstance(payload.get("recipe"), dict):
        return payload["recipe"]
    args = payload.get("args")
    if not isinstance(args, dict):
        return {}
    world = args.get("world_size", 1)
    batch = {"global_batch": args["batch_size"] * world} if "batch_size" in args else {}
    return recipe(args) | batch


def changes(stored: Mapping, own: Mapping) -> list[str]:
    """The settings that both have and that differ, as "name OLD -> NEW"."""

    def same(a: object, b: object) -> bool:
        if isinstance(a, float) and isinstance(b, float):
            return math.isclose(a, b, rel_tol=1e-9)
        return (list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b)

    return [
        f"{name} {stored[name]} -> {own[name]}" for name in own if name in stored and not same(stored[name], own[name])
    ]


def schedule_changes(stored: Mapping, scheduler, epochs: int) -> list[str]:
    """The first epoch at whose end the stored schedule sets another rate than this one. Leaves the optimizer at the
    last rate tried.
    """
    own = scheduler.state_dict()
    named = {name if name in own else RENAMED.get(name, name): value for name, value in stored.items()}
    other = copy.copy(scheduler)
    other.load_state_dict({name: value for name, value in named.items() if name in own})

    def rates(schedule, epoch: int) -> list[float]:
        schedule.step(epoch)
        return [group["lr"] for group in schedule.optimizer.param_groups]

    for epoch in range(min(epochs, MOST_EPOCHS)):
        there, here = rates(other, epoch), rates(scheduler, epoch)
        if not all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(there, here)):
            return [f"lr after epoch {epoch} {there[0]:.6g} -> {here[0]:.6g}"]
    return []


# ---------------------------------------------------------------- the optimizer's state


def moments(payload: Mapping, model: nn.Module) -> dict[str, dict]:
    """The optimizer's state of each parameter by the parameter's name. Raises ValueError where groups or values cannot
    be right.

    A state counts parameters group by group, those without weight decay first, each group in the order of the model
    that was saved. That order is the one of the file's own weights: another library's order would swap tensors of equal
    shapes.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    saved = (name.removeprefix("module.") for name in payload["model"])
    order = [name for name in saved if name in shapes]
    if len(order) != len(shapes):
        raise ValueError(f"weights of {len(order)} parameters, the model has {len(shapes)}")
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    undecayed = [name for name in order if len(shapes[name]) <= 1 or name.endswith(".bias") or name in exempt]
    kept = set(undecayed)
    expected = [undecayed, [name for name in order if name not in kept]]
    stored = [group["params"] for group in payload["optimizer"]["param_groups"]]
    if len(stored) == 1:
        expected = [order]
    if [len(group) for group in stored] != [len(group) for group in expected]:
        raise ValueError(
            f"groups of {[len(group) for group in stored]} parameters, expected {[len(group) for group in expected]}"
        )
    names = dict(zip((index for group in stored for index in group), (name for group in expected for name in group)))
    state = payload["optimizer"]["state"]
    if len(names) != len(order) or not set(state) <= set(names) or (state and len(state) != len(names)):
        raise ValueError(
            f"the state of {len(state)} parameters in groups that name {len(names)}, the model has {len(order)}"
        )
    found = {names[index]: entry for index, entry in state.items()}
    kinds = {frozenset(entry) for entry in found.values()}
    factored = any(
        "row" in str(key) for kind in kinds for key in kind
    )  # whose states differ between matrices and vectors
    if frozenset() in kinds or (len(kinds) > 1 and not factored):
        raise ValueError("a parameter's state lacks what the others' have")
    for name, entry in found.items():
        for key, value in entry.items():
            _check_moment(f"{key} of {name}", key, value, shapes[name])
    return found


def _check_moment(what: str, key: str, value: object, shape: torch.Size) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, bool):
        return
    if not number and not isinstance(value, Tensor):
        raise ValueError(f"{what} is a {type(value).__name__}")
    value = torch.as_tensor(value)
    if key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer") and (
        value.shape != shape or not value.is_floating_point()
    ):
        raise ValueError(f"{what} is {list(value.shape)} of {value.dtype}, the parameter {list(shape)}")
    if key == "step" and (value.numel() != 1 or not value < MOST):
        raise ValueError(f"{what} is no count of steps")
    if not checkpoint.all_finite(value):
        raise ValueError(f"{what} is not finite")
    if key in ("exp_avg_sq", "max_exp_avg_sq", "step") and value.numel() and value.min() < 0:
        raise ValueError(f"{what} is negative")


def load_moments(
    optimizer: torch.optim.Optimizer, model: nn.Module, found: Mapping[str, dict], groups: list[Mapping]
) -> None:
    """Put `moments` into an optimizer of this model. Its settings (rates, decay, how it is computed) stay its own.

    groups: the stored ones, of which the counters are taken that some optimizers keep there. Raises ValueError where
    one is no number.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            key: value.clone() if isinstance(value, Tensor) else value for key, value in found[names[parameter]].items()
        }
        for index, parameter in enumerate(parameters)
        if names[parameter] in found
    }
    own = optimizer.state_dict()["param_groups"]
    for group, stored in zip(own, groups):
        counts = {name: stored[name] for name in COUNTERS if name in stored}
        if not all(
            _is_number(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)
            for value in counts.values()
        ):
            raise ValueError(f"counters of a group are {counts}")
        group.update(counts)
    optimizer.load_state_dict({"state": state, "param_groups": own})


def check_complete(payload: Mapping, *, source: str) -> None:
    """Refuse a training state whose counters cannot be right, before anything of it is used."""
    if lacking := sorted(COMPLETE - set(payload)):
        raise UserError(f"not a training state ({source}): it has no {', '.join(lacking)}")
    progress, epoch = payload.get("progress"), payload["epoch"]
    if isinstance(epoch, bool) or not isinstance(epoch, int) or not -1 <= epoch < 10**6:
        raise UserError(f"not a training state ({source}): epoch is {str(epoch)[:30]}, expected a number from -1 up")
    best = payload.get("max_accuracy", 0.0)
    if not isinstance(best, (int, float)) or not 0 <= best <= 100:
        raise UserError(f"not a training state ({source}): max_accuracy is {str(best)[:30]}, expected 0 to 100")
    if not _place_can_be(progress):
        raise UserError(f"not a training state ({source}): its place inside an epoch is unreadable")
    stats = payload.get("train_stats")
    if not payload.get("evaluated", True) and not (
        isinstance(stats, dict) and set(stats) >= STATS and all(map(_is_number, stats.values()))
    ):
        raise UserError(f"not a training state ({source}): the epoch that is still to be evaluated has no figures")


def _place_can_be(progress: object) -> bool:
    if progress is None:
        return True
    if not (isinstance(progress, dict) and type(progress.get("updates")) is int and progress["updates"] >= 0):
        return False
    meters = progress.get("meters")
    entries = [meters.get(name) for name in ("lr", "loss")] if isinstance(meters, dict) else [None]
    return all(
        isinstance(entry, dict)
        and _is_number(entry.get("total"))
        and _is_number(entry.get("count"))
        and isinstance(entry.get("recent"), list)
        and all(map(_is_number, entry["recent"]))
        for entry in entries
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < MOST


def check_scale(state: Mapping) -> None:
    """A loss scale that is no number above 0 would skip every step in silence."""
    if not (_is_number(state.get("scale")) and state["scale"] > 0):
        raise ValueError(f"a loss scale of {str(state.get('scale'))[:30]}")


def check_rates(rates: list[float], count: int) -> None:
    if len(rates) != count or not all(_is_number(rate) and rate >= 0 for rate in rates):
        raise ValueError(f"learning rates of {str(rates)[:60]} for {count} groups")


def log_lines(path: Path) -> list[dict]:
    """The lines of a log. What is no line of one (a disk that lost its end) is left out with a warning."""
    found = []
    for number, text in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else []):
        try:
            line = json.loads(text)
            if not isinstance(line["epoch"], int):
                raise ValueError(line["epoch"])
            found.append(line)
        except (ValueError, TypeError, KeyError):
            warn(f"line {number + 1} of {path} is no line of a log: left out")
    return found
