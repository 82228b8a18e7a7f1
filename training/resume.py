"""Check that a checkpoint resumes this run, and match the optimizer's state by parameter names.

Files are ours, or the official code's, whose arguments are those of its command line with the rate already scaled.
"""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from training.checkpoint import Checkpoint, all_finite
from training.errors import UserError
from training.recipe_options import defaults, without_defaults

# What may change between the parts of a run: where things are, how fast they go, what is kept. The batch counts through
# the global batch.
FREE = {
    *("eval", "throughout", "finetune", "resume", "resume_changed", "report", "overwrite", "output_dir", "start_epoch"),
    *("keep_going", "checkpoint_interval", "checkpoint_hist", "device", "world_size", "dist_url", "local_rank"),
    *(
        "dist_timeout",
        "loader_timeout",
        "data_path",
        "max_pixels",
        "num_workers",
        "pin_mem",
        "dist_eval",
        "use_mcloader",
        "resplit",
    ),
    *("per_class", "predictions", "config", "dry_run", "pretrained", "log_tensorboard", "log_wandb"),
    *("bad_images", "max_bad"),
    *("train_split", "val_split", "val_fraction", "val_labels", "class_map"),  # whose images `data` stands for
    *("deterministic", "grad_checkpointing", "channels_last", "torchcompile", "batch_size", "grad_accum_steps"),
}
RENAMED = {"t_mul": "cycle_mul", "decay_rate": "cycle_decay"}  # of the official schedule's state, in today's timm
MOST = 1e15  # no count or figure of a run is as large
COUNTERS = ("step", "lookahead_step")  # what some optimizers count by the group, not by the parameter
MOST_EPOCHS = 10_000  # compared between two schedules
STATS = {"lr", "loss", "time", "data_time", "images_per_s", "max_memory_mb"}  # of an epoch, for its line in the log
COMPLETE = {"optimizer", "lr_scheduler", "epoch"}  # what a file must hold beside weights to be resumed


# ---------------------------------------------------------------- the same run


def recipe(args: Mapping, **resolved: object) -> dict:
    """Return what decides a run's result: its options but for those that are free, and what they resolve to."""
    return {name: value for name, value in without_defaults(args).items() if name not in FREE} | resolved


def stored_recipe(payload: Mapping) -> dict:
    """Return the recipe of a file of ours, or as far as the official code's arguments tell it."""
    if isinstance(payload.get("recipe"), dict):
        return payload["recipe"]
    args = payload.get("args")
    if not isinstance(args, dict):
        return {}
    world = args.get("world_size", 1)
    batch = {"global_batch": args["batch_size"] * world} if "batch_size" in args else {}
    return recipe(args) | batch


def changes(old: Mapping, new: Mapping) -> list[str]:
    """Return the settings that both have and that differ, as "name OLD -> NEW"."""
    # Neither stores an option of that file that it does not use. The global batch is what batch and processes make.
    unused = {name: value for name, value in defaults().items() if name != "global_batch"}
    old, new = unused | old, unused | new

    def same(a: object, b: object) -> bool:
        if isinstance(a, float) and isinstance(b, float):
            return math.isclose(a, b, rel_tol=1e-9)
        return (list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b)

    shared = [name for name in new if name in old]
    return [f"{name} {old[name]} -> {new[name]}" for name in shared if not same(old[name], new[name])]


def schedule_changes(stored: Mapping, scheduler, epochs: int) -> list[str]:
    """Return the first epoch at whose end the stored schedule sets another rate than this one.

    Leaves the optimizer at the last rate tried.
    """
    current = scheduler.state_dict()
    named = {name if name in current else RENAMED.get(name, name): value for name, value in stored.items()}
    other = copy.copy(scheduler)
    other.load_state_dict({name: value for name, value in named.items() if name in current})

    def rates(schedule, epoch: int) -> list[float]:
        schedule.step(epoch)
        return [group["lr"] for group in schedule.optimizer.param_groups]

    for epoch in range(min(epochs, MOST_EPOCHS)):
        old, new = rates(other, epoch), rates(scheduler, epoch)
        if not all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(old, new)):
            return [f"lr after epoch {epoch} {old[0]:.6g} -> {new[0]:.6g}"]
    return []


# ---------------------------------------------------------------- the optimizer's state


def optimizer_state(
    payload: Mapping, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, dict]:
    """Return the optimizer's state by parameter name; raise ValueError if groups or values cannot be right.

    A state counts parameters group by group, those without weight decay first, each group in the order of the model
    that was saved. That order is the one of the file's own weights: another library's order would swap tensors of
    equal shapes. optimizer: of this run, whose groups are expected if they have rates of their own.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups, order = _expected_groups(payload, model, shapes)
    if optimizer is not None and any("lr_scale" in group for group in optimizer.param_groups):
        names = {parameter: name for name, parameter in model.named_parameters()}
        members = [{names[each] for each in group["params"]} for group in optimizer.param_groups]
        groups = [[name for name in order if name in group] for group in members]
    stored = [group["params"] for group in payload["optimizer"]["param_groups"]]
    if len(stored) == 1:
        groups = [order]
    if [len(group) for group in stored] != [len(group) for group in groups]:
        sizes = f"{[len(group) for group in stored]} parameters, expected {[len(group) for group in groups]}"
        raise ValueError(f"groups of {sizes}")
    indices = [index for group in stored for index in group]
    names = dict(zip(indices, (name for group in groups for name in group)))
    state = payload["optimizer"]["state"]
    if len(names) != len(order) or not set(state) <= set(names) or (state and len(state) != len(names)):
        counts = f"{len(state)} parameters in groups that name {len(names)}, the model has {len(order)}"
        raise ValueError(f"the state of {counts}")
    found = {names[index]: entry for index, entry in state.items()}
    kinds = {frozenset(entry) for entry in found.values()}
    factored = any("row" in str(key) for kind in kinds for key in kind)  # whose states differ by the parameter's rank
    if frozenset() in kinds or (len(kinds) > 1 and not factored):
        raise ValueError("a parameter's state lacks what the others' have")
    for name, entry in found.items():
        for key, value in entry.items():
            _check_entry(f"{key} of {name}", key, value, shapes[name])
    return found


def _expected_groups(payload: Mapping, model: nn.Module, shapes: Mapping) -> tuple[list[list[str]], list[str]]:
    """Return the names of the optimizer's two groups, and all names in the order of the file's weights."""
    saved = (name.removeprefix("module.") for name in payload["model"])
    order = [name for name in saved if name in shapes]
    if len(order) != len(shapes):
        raise ValueError(f"weights of {len(order)} parameters, the model has {len(shapes)}")
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    undecayed = [name for name in order if len(shapes[name]) <= 1 or name.endswith(".bias") or name in exempt]
    rest = set(order) - set(undecayed)
    return [undecayed, [name for name in order if name in rest]], order


def _check_entry(what: str, key: str, value: object, shape: torch.Size) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, bool):
        return
    if not number and not isinstance(value, Tensor):
        raise ValueError(f"{what} is a {type(value).__name__}")
    value = torch.as_tensor(value)
    like_parameter = key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
    if like_parameter and (value.shape != shape or not value.is_floating_point()):
        raise ValueError(f"{what} is {list(value.shape)} of {value.dtype}, the parameter {list(shape)}")
    if key == "step" and (value.numel() != 1 or not value < MOST):
        raise ValueError(f"{what} is no count of steps")
    if not all_finite(value):
        raise ValueError(f"{what} is not finite")
    if key in ("exp_avg_sq", "max_exp_avg_sq", "step") and value.numel() and value.min() < 0:
        raise ValueError(f"{what} is negative")


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, dict], groups: list[Mapping]
) -> None:
    """Load what `optimizer_state` returned into an optimizer of this model, whose settings stay its own.

    groups: the stored ones, for the counters that some optimizers keep there; raises ValueError if one is no number.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        index: {key: value.clone() if isinstance(value, Tensor) else value for key, value in state[names[each]].items()}
        for index, each in enumerate(parameters)
        if names[each] in state
    }
    current = optimizer.state_dict()["param_groups"]
    for group, stored in zip(current, groups):
        counts = {name: stored[name] for name in COUNTERS if name in stored}
        values = [v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for v in counts.values()]
        if not all(map(_is_number, values)):
            raise ValueError(f"counters of a group are {counts}")
        group.update(counts)
    optimizer.load_state_dict({"state": entries, "param_groups": current})


# ---------------------------------------------------------------- what can be right


def is_training_state(payload: Mapping) -> bool:
    return set(payload) >= COMPLETE


def check_complete(checkpoint: Checkpoint) -> None:
    """Raise UserError for a training state whose counters cannot be right, before anything of it is used."""
    payload = checkpoint.payload

    def refuse(what: str) -> UserError:
        return UserError(f"not a training state ({checkpoint.source}): {what}")

    if lacking := sorted(COMPLETE - set(payload)):
        raise refuse(f"it has no {', '.join(lacking)}")
    epoch, best, stats = payload["epoch"], payload.get("max_accuracy", 0.0), payload.get("train_stats")
    if isinstance(epoch, bool) or not isinstance(epoch, int) or not -1 <= epoch < 10**6:
        raise refuse(f"epoch is {str(epoch)[:30]}, expected a number from -1 up")
    best_epoch = payload.get("best_epoch", epoch)
    if type(best_epoch) is not int or not -1 <= best_epoch <= epoch:
        raise refuse(f"best_epoch is {str(best_epoch)[:30]}, expected a number from -1 to {epoch}")
    if not isinstance(best, (int, float)) or not 0 <= best <= 100:
        raise refuse(f"max_accuracy is {str(best)[:30]}, expected 0 to 100")
    if not _is_progress(payload.get("progress")):
        raise refuse("its progress inside an epoch is unreadable")
    complete = isinstance(stats, dict) and set(stats) >= STATS and all(map(_is_number, stats.values()))
    if not payload.get("evaluated", True) and not complete:
        raise refuse("the epoch that is still to be evaluated has no figures")


def _is_progress(progress: object) -> bool:
    if progress is None:
        return True
    if not (isinstance(progress, dict) and type(progress.get("updates")) is int and progress["updates"] >= 0):
        return False
    meters = progress.get("meters")
    return isinstance(meters, dict) and all(_is_meter(meters.get(name)) for name in ("lr", "loss"))


def _is_meter(entry: object) -> bool:
    numbers = isinstance(entry, dict) and all(_is_number(entry.get(name)) for name in ("total", "count"))
    return numbers and isinstance(entry.get("recent"), list) and all(map(_is_number, entry["recent"]))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < MOST


def check_scale(state: Mapping) -> None:
    """Raise ValueError for a loss scale that is no number above 0, which would skip every step silently."""
    if not (_is_number(state.get("scale")) and state["scale"] > 0):
        raise ValueError(f"a loss scale of {str(state.get('scale'))[:30]}")


def check_rates(rates: list[float], count: int) -> None:
    if len(rates) != count or not all(_is_number(rate) and rate >= 0 for rate in rates):
        raise ValueError(f"learning rates of {str(rates)[:60]} for {count} groups")
