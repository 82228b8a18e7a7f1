"""mmengine's Runner, with safe checkpoint files, random numbers by progress, checked data, and a CPU where there is no
GPU.

Of mmengine's private names it sets train_loop._epoch and _iter, as mmengine's own resume does.
"""

import copy
import functools
import os
import time
from collections.abc import Mapping

import mmengine
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import broadcast, get_world_size, master_only
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dense.libraries import quiet
from dense.randomness import StepRandomness, seed_by_index
from dense.transforms import CheckedPrepareData, image_loaders, with_checks
from training import checkpoint
from training.errors import UserError, library_reason

# In official checkpoints of segmentors and detectors, but in no model here: the backbone's classifier and final norm
UNUSED = ("backbone.head.", "backbone.norm.")


def adapt_to_machine(cfg: Config) -> list[str]:
    """Change in the config what a machine without a GPU cannot do; return a line for each change that matters."""
    for part in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if cfg.get(part) and not cfg[part].get("num_workers"):
            cfg[part].persistent_workers = False
    if torch.cuda.is_available():
        return []
    cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    cfg.env_cfg.dist_cfg = dict(backend="gloo")
    if cfg.get("optim_wrapper", {}).get("type") != "AmpOptimWrapper":
        return []
    cfg.optim_wrapper.type = "OptimWrapper"
    del cfg.optim_wrapper["loss_scale"]
    return ["no GPU: training in float32, not in float16 with a loss scale"]


def model_state(payload: Mapping, source: str) -> dict[str, Tensor]:
    """Return the weights in what checkpoint.load returned; raise UserError if they are no segmentor's or detector's."""
    state = payload.get("state_dict", payload)
    items = state.items() if isinstance(state, Mapping) else ()
    state = {name.removeprefix("module."): value for name, value in items if isinstance(value, Tensor)}
    if not any(name.startswith("backbone.") for name in state):
        advice = "for classification weights, set model.backbone.pretrained"
        raise UserError(f"not a segmentor or detector ({source}): its weights have no backbone; {advice}")
    return state


def to_plain(value: object) -> object:
    """Return a value as a checkpoint may hold it: NumPy's numbers and arrays as Python's, other objects as text."""
    if isinstance(value, Mapping):
        return {str(name): to_plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(each) for each in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value if isinstance(value, Tensor | str | int | float | bool | None) else str(value)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of several processes and of test-time augmentation."""
    while is_model_wrapper(model) or hasattr(model, "merge_preds"):
        model = model.module
    return model


class BroadcastBuffers(Hook):
    """Give all processes the first one's running statistics: on a CPU, batch norm is not synchronized."""

    def before_val(self, runner: Runner) -> None:
        for buffer in unwrap(runner.model).buffers():
            broadcast(buffer)


class ReportImages(Hook):
    """Log what was decided about the images that were read."""

    def report(self, loader: DataLoader, name: str, *, final: bool) -> None:
        for step in image_loaders(loader.dataset):
            step.reader.name = name
            step.reader.report(final=final, write=functools.partial(print_log, logger="current"))

    def after_train_iter(self, runner: Runner, *_, **__) -> None:
        self.report(runner.train_dataloader, "train", final=False)

    def after_train(self, runner: Runner) -> None:
        self.report(runner.train_dataloader, "train", final=True)

    def after_val(self, runner: Runner) -> None:
        self.report(runner.val_dataloader, "val", final=True)

    def after_test(self, runner: Runner) -> None:
        self.report(runner.test_dataloader, "test", final=True)


class DumpConfig(Hook):
    """Write the config to the work folder after all checks."""

    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        Runner.dump_config(runner)


class TwinsRunner(Runner):
    opened: dict[str, dict] = {}  # files that were read already, by name

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        with quiet():
            model = super().build_model(model)
        return model if torch.cuda.is_available() else revert_sync_batchnorm(model)

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build as mmengine does, with checked data, augmentation seeded by progress, and an error for an empty set."""
        if isinstance(dataloader, DataLoader):
            return dataloader
        dataloader = with_checks(copy.deepcopy(dataloader), DefaultScope.get_current_instance().scope_name)
        shuffled = dataloader["sampler"].get("shuffle", True)
        if shuffled:
            dataloader["sampler"] = dict(type="KeyedSampler", sampler=dataloader["sampler"])
        dataset = dataloader["dataset"]
        where = os.path.normpath(os.path.join(dataset.get("data_root") or "", dataset.get("ann_file") or ""))
        try:
            loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
            empty = not len(loader.dataset)
        except UserError:
            raise
        except Exception as error:  # an annotation file may be wrong in any way
            empty = "need at least one array" in str(error)  # what mmengine makes of an empty list
            if not empty:
                raise UserError(f"cannot build the data set ({where}): {library_reason(error)}; fix it") from error
        if empty:
            raise UserError(f"no images with labels ({where}): check the folders, the suffixes and the annotations")
        if hasattr(loader.dataset, "prepare_data"):
            loader.dataset.prepare_data = CheckedPrepareData(loader.dataset)
            if shuffled:
                seed_by_index(loader.dataset, seed)
        return loader

    def build_evaluator(self, evaluator: dict | list | Evaluator) -> Evaluator:
        try:
            return super().build_evaluator(with_checks(evaluator, self.default_scope.scope_name))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"cannot build the evaluator (of the config): {library_reason(error)}; fix it") from error

    def dump_config(self) -> None:
        """Do nothing: an earlier run's config stays in the folder until this one has begun, see DumpConfig."""

    def train(self) -> nn.Module:
        for hook in (DumpConfig(), StepRandomness(), BroadcastBuffers(), ReportImages()):
            self.register_hook(hook)
        return super().train()

    def test(self) -> dict:
        self.register_hook(ReportImages())
        return super().test()

    # ------------------------------------------------------------ files

    def load_checkpoint(self, filename: str) -> dict:
        """Load a file's weights. In a new training run that starts from them, heads of another shape keep their initial
        weights; any other difference is an error.
        """
        payload = self.opened.get(filename) or checkpoint.load(filename)
        self.call_hook("after_load_checkpoint", checkpoint=payload)
        state, model = model_state(payload, filename), unwrap(self.model)
        own = model.state_dict()
        missing = ()
        if self.cfg.get("train_cfg") and not self.cfg.get("resume"):
            heads = [name for name in own if not name.startswith("backbone.")]
            missing = tuple(name for name in heads if name not in state or state[name].shape != own[name].shape)
            state = {name: value for name, value in state.items() if name not in missing}
        allowed = dict(may_lack=missing, may_have=UNUSED, lists_all="TWINS_DEBUG=1")
        checkpoint.load_into(model, state, source=filename, **allowed)
        unused = sorted(name for name in state if name not in own)
        self.logger.info(f"loaded {len(own) - len(missing)} of {len(own)} tensors from {filename}")
        if missing:
            self.logger.info(f"randomly initialized, because the file has none of that shape: {', '.join(missing)}")
        if unused:
            self.logger.info(f"in the file, not used: {', '.join(unused)}")
        return payload

    def resume(self, filename: str) -> None:
        """Continue the run that wrote a file. Unlike mmengine's, this reads tensors and plain values only."""
        payload = self.load_checkpoint(filename)
        try:
            meta = payload["meta"]
            if not all(isinstance(meta[name], int) and meta[name] >= 0 for name in ("epoch", "iter")):
                raise ValueError("its epoch and iter must be integers from 0")
            self.train_loop._epoch, self.train_loop._iter = meta["epoch"], meta["iter"]
            self.optim_wrapper.load_state_dict(payload["optimizer"])
            for scheduler, state in zip(self.param_schedulers, payload["param_schedulers"], strict=True):
                scheduler.load_state_dict(state)
            hub = dict(payload["message_hub"])
            hub["log_scalars"] = {name: HistoryBuffer(*history) for name, history in hub["log_scalars"].items()}
            self.message_hub.load_state_dict(hub)
        except Exception as error:  # a state may be wrong in any way
            raise cannot_resume(filename, library_reason(error)) from error
        processes = meta.get("processes", get_world_size())
        if processes != get_world_size():
            what = f"{filename} was written by {processes} processes, this run has {get_world_size()}"
            self.logger.warning(f"{what}: results will differ from those of an uninterrupted run")
        self.logger.info(f"resumed epoch: {self.epoch}, iter: {self.iter}")

    @master_only
    def save_checkpoint(
        self, out_dir, filename, _=None, save_optimizer=True, save_param_scheduler=True, meta=None, by_epoch=True, **__
    ) -> None:
        """Write what mmengine writes, in tensors and plain values only; mmengine's arguments, but a local file."""
        epoch, iteration = (self.epoch + 1, self.iter) if by_epoch else (self.epoch, self.iter + 1)
        facts = dict(
            cfg=self.cfg.pretty_text,
            seed=self.seed,
            processes=get_world_size(),
            experiment_name=self.experiment_name,
            time=time.strftime("%Y%m%d_%H%M%S"),
            mmengine_version=mmengine.__version__,
            dataset_meta=self.train_dataloader.dataset.metainfo,
        )
        hub = self.message_hub.state_dict()
        hub["log_scalars"] = {name: history.data for name, history in hub["log_scalars"].items()}
        payload = dict(
            meta=to_plain(dict(epoch=epoch, iter=iteration) | (meta or {}) | facts),
            state_dict=unwrap(self.model).state_dict(),
            message_hub=to_plain(hub),
        )
        if save_optimizer:
            payload["optimizer"] = self.optim_wrapper.state_dict()
        if save_param_scheduler:
            payload["param_schedulers"] = [scheduler.state_dict() for scheduler in self.param_schedulers]
        self.call_hook("before_save_checkpoint", checkpoint=payload)
        checkpoint.save(os.path.join(out_dir, filename), payload)


def cannot_resume(source: str, reason: str) -> UserError:
    return UserError(f"cannot resume ({source}): {reason}; --load-from starts a new training run from its weights")
