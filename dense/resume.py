"""What decides the result of a training run: stored in its checkpoints, and compared when it is resumed."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.dist import get_world_size
from torch import Tensor

from training.errors import UserError
from training.resume import changes

LENGTH = ("type", "by_epoch", "max_iters", "max_epochs")  # of train_cfg: the rest is about scores
PLACES = ("data_root", "ann_file", "lazy_init", "serialize_data")  # of a data set: its content counts
MOST_LISTED, LONGEST = 8, 100  # changes in a line, and the characters of one


# ---------------------------------------------------------------- settings


def to_plain(value: object) -> object:
    """Return a value as a checkpoint may hold it: NumPy's numbers and arrays as Python's, other objects as text."""
    if isinstance(value, Mapping):
        return {str(name): to_plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(each) for each in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value if isinstance(value, Tensor | str | int | float | bool | None) else str(value)


def flat(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Yield the leaves of nested dicts, and of lists of dicts, by their dotted names in a config."""
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield name, value
        return
    for key, each in value.items():
        yield from flat(each, f"{name}.{key}")


def fingerprint(dataset) -> str:
    """Return the number of images, and a hash of the annotation file or of the images' names."""
    ann_file, digest = getattr(dataset, "ann_file", ""), hashlib.sha256()
    if ann_file and Path(ann_file).is_file():
        with open(ann_file, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    else:
        root = str(getattr(dataset, "data_root", "") or "")
        for index in range(len(dataset)):
            path = str(dataset.get_data_info(index).get("img_path"))
            digest.update(path.removeprefix(root).encode(errors="surrogateescape") + b"\n")
    return f"{len(dataset)} images ({digest.hexdigest()[:8]})"


def settings(cfg: Config, *, seed: int, dataset) -> dict[str, object]:
    """Return the settings that decide a run's result, as plain values by their names in the config."""
    loader = {name: value for name, value in cfg.train_dataloader.items() if "sampler" in name or name == "batch_size"}
    data = {name: value for name, value in cfg.train_dataloader.dataset.items() if name not in PLACES}
    model = {name: value for name, value in cfg.model.items() if name != "test_cfg"}
    model["backbone"] = {name: value for name, value in cfg.model.backbone.items() if name != "pretrained"}
    parts = {
        "train_cfg": {name: value for name, value in cfg.train_cfg.items() if name in LENGTH},
        "param_scheduler": cfg.get("param_scheduler"),
        "optim_wrapper": cfg.optim_wrapper,
        "train_dataloader": loader,
        "processes": get_world_size(),
        "seed": seed,
        "classes": dataset.metainfo.get("classes"),
        "training data": fingerprint(dataset),
        "train_dataloader.dataset": data,
        "model": model,
        "custom_hooks": cfg.get("custom_hooks"),
    }
    return {key: leaf for name, part in parts.items() for key, leaf in flat(to_plain(part), name)}


def stored_classes(payload: Mapping) -> list[str] | None:
    """Return the class names in a checkpoint of mmengine, or of the official code; None if it has none."""
    meta = payload.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    facts = meta.get("dataset_meta")
    found = facts.get("classes") if isinstance(facts, Mapping) else meta.get("CLASSES")
    named = isinstance(found, (list, tuple)) and all(isinstance(name, str) for name in found)
    return list(found) if named else None


def changed_settings(payload: Mapping, new: Mapping) -> list[str] | None:
    """Return the settings that differ from a checkpoint's, as "name OLD -> NEW"; None if the file stores none.

    A setting that only one of them has is None in the other.
    """
    meta = payload.get("meta")
    stored = meta.get("settings") if isinstance(meta, Mapping) else None
    if not isinstance(stored, Mapping):
        return None
    names = [*new, *(name for name in stored if name not in new)]
    return changes({name: stored.get(name) for name in names}, {name: new.get(name) for name in names})


def compare_settings(runner, payload: Mapping, source: str) -> list[str]:
    """Return the settings that differ from a checkpoint's; raise UserError unless --resume-changed allows that."""
    changed = changed_settings(payload, runner.settings)
    if changed is None:
        runner.logger.warning(f"{source} stores no settings: they cannot be compared with this run's")
        return []
    listed = [each if len(each) <= LONGEST else f"{each[: LONGEST - 3]}..." for each in changed[:MOST_LISTED]]
    listed = ", ".join(listed + ([f"{len(changed) - MOST_LISTED} more"] if len(changed) > MOST_LISTED else []))
    if changed and not runner.resume_changed:
        advice = "run it as it was, or pass --resume-changed"
        raise UserError(f"other settings than the checkpoint's ({source}): {listed}; {advice}")
    if changed:
        runner.logger.info(f"changed by --resume-changed: {listed}")
    return changed


# ---------------------------------------------------------------- the state


def set_progress(runner, meta: Mapping) -> None:
    """Set how far a run is; raise ValueError if its counts cannot be right.

    Where an epoch has another number of iterations than before, iterations are counted anew by the epochs trained, and
    an epoch that was begun starts again.
    """
    epoch, iteration, length = meta["epoch"], meta["iter"], runner.epoch_length
    if not all(isinstance(count, int) and count >= 0 for count in (epoch, iteration)):
        raise ValueError("its epoch and iter must be integers from 0")
    old_length = meta.get("epoch_length", length)
    begun = iteration - epoch * old_length
    if length and (old_length != length or not 0 <= begun <= length):
        if begun:
            what = f"an epoch has {length} iterations, {old_length} in the run that was stopped"
            runner.logger.warning(f"{what}: epoch {epoch + 1} starts again, after {begun} of its iterations")
        iteration = epoch * length
    runner.train_loop._epoch, runner.train_loop._iter = epoch, iteration
    runner.validate_first = bool(meta.get("validate"))


def load_optimizer(runner, payload: Mapping, changed: list[str]) -> None:
    """Load the optimizer's state and the schedules'. With --resume-changed rates and schedules are the config's."""
    state, schedulers = payload["optimizer"], runner.param_schedulers or []
    if not runner.resume_changed:
        runner.optim_wrapper.load_state_dict(state)
        for scheduler, stored in zip(schedulers, payload["param_schedulers"], strict=True):
            scheduler.load_state_dict(stored)
        return
    if any(each.startswith("optim_wrapper.optimizer.type ") for each in changed):
        runner.logger.warning("another optimizer than the checkpoint's: its state is not resumed")
    else:
        runner.optim_wrapper.load_state_dict(with_new_rates(state, runner.optim_wrapper.state_dict()))
    advance(schedulers, runner.iter, runner.epoch_length)


def with_new_rates(stored: Mapping, own: Mapping) -> dict:
    """Return a stored optimizer state with the groups and rates of this one; ValueError if its parameters differ."""
    old, new = ([index for group in state["param_groups"] for index in group["params"]] for state in (stored, own))
    if len(old) != len(new):
        raise ValueError(f"the optimizer's state is for {len(old)} parameters, the model has {len(new)}")
    order = dict(zip(old, new))
    state = {order[index]: entry for index, entry in stored["state"].items()}
    return {**stored, "state": state, "param_groups": own["param_groups"]}


def advance(schedulers: Iterable, iterations: int, epoch_length: int) -> None:
    """Step new schedules as training does in so many iterations. epoch_length: 0 in a loop without epochs.

    One after the other: a schedule multiplies the rate that those before it have set.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `scheduler.step")
        for done in range(1, iterations + 1):
            for scheduler in schedulers:
                if not scheduler.by_epoch or (epoch_length and done % epoch_length == 0):
                    scheduler.step()
