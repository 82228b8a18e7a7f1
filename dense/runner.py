"""mmengine's Runner with this project's ways: files through checkpoint.py, random numbers by place, and a CPU where
there is no GPU.
"""

import copy
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
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dense.libraries import quiet
from dense.pictures import CheckedPictures, reason
from dense.randomness import StepRandomness, place_pictures
from training import checkpoint
from training.errors import UserError

# What whole published checkpoints hold and no model here has: the classifier and the final norm of their backbones.
UNUSED = ("backbone.head.", "backbone.norm.")


def for_this_machine(cfg: Config) -> list[str]:
    """Change what a machine without a GPU cannot do, and say what was changed."""
    for part in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if cfg.get(part) and not cfg[part].get("num_workers"):
            cfg[part].persistent_workers = False
    if torch.cuda.is_available():
        return []
    said = []
    cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    cfg.env_cfg.dist_cfg = dict(backend="gloo")
    if cfg.get("optim_wrapper", {}).get("type") == "AmpOptimWrapper":
        cfg.optim_wrapper.type = "OptimWrapper"
        del cfg.optim_wrapper["loss_scale"]
        said.append("no GPU: steps are made in float32, not in float16 with a loss scale")
    return said


def tensors(payload: Mapping, source: str) -> dict[str, Tensor]:
    """The whole model's weights by name, in what checkpoint.load gave for a file of a segmentor or a detector."""
    state = payload.get("state_dict", payload)
    state = (
        {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
        if isinstance(state, Mapping)
        else {}
    )
    if not any(name.startswith("backbone.") for name in state):
        raise UserError(
            f"no segmentor or detector ({source}): its weights have no backbone; model.backbone.pretrained takes "
            "classification weights"
        )
    return state


def plain(value: object) -> object:
    """A value as a checkpoint may hold it: a number of numpy's as Python's, and what is no value at all as its text."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value if isinstance(value, Tensor | str | int | float | bool | None) else str(value)


def bare(model: nn.Module) -> nn.Module:
    """The model inside what wraps it: several processes, test-time augmentation."""
    while is_model_wrapper(model) or hasattr(model, "merge_preds"):
        model = model.module
    return model


class SharedStatistics(Hook):
    """Batch norm's running statistics are the first process's in all, where there is no synchronized norm (on a
    CPU).
    """

    def before_val(self, runner: Runner) -> None:
        for buffer in bare(runner.model).buffers():
            broadcast(buffer)


class WrittenConfig(Hook):
    """The config as it was taken, in the work folder, when nothing was found wrong with it."""

    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        Runner.dump_config(runner)


class TwinsRunner(Runner):
    opened: dict[str, dict] = {}  # by name: files that were read already

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        with quiet():
            model = super().build_model(model)
        return model if torch.cuda.is_available() else revert_sync_batchnorm(model)

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """As mmengine's, but a training's random numbers depend on the place of a picture, and a set without pictures
        is refused.
        """
        if isinstance(dataloader, DataLoader):
            return dataloader
        dataloader = copy.deepcopy(dataloader)
        shuffled = dataloader["sampler"].get("shuffle", True)
        if shuffled:
            dataloader["sampler"] = dict(type="PlacedSampler", sampler=dataloader["sampler"])
        dataset = dataloader["dataset"]
        where = os.path.normpath(os.path.join(dataset.get("data_root") or "", dataset.get("ann_file") or ""))
        try:
            loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
            empty = not len(loader.dataset)
        except Exception as error:  # an annotation file may be wrong in any way
            empty = "need at least one array" in str(error)  # what mmengine makes of an empty list
            if not empty:
                raise UserError(f"cannot make the data set ({where}): {reason(error)}") from error
        if empty:
            raise UserError(
                f"no pictures with labels there ({where}): look at the folders, the suffixes and the annotations"
            )
        if hasattr(loader.dataset, "prepare_data"):
            loader.dataset.prepare_data = CheckedPictures(loader.dataset)
            if shuffled:
                place_pictures(loader.dataset, seed)
        return loader

    def build_evaluator(self, evaluator: dict | list | Evaluator) -> Evaluator:
        try:
            return super().build_evaluator(evaluator)
        except Exception as error:
            raise UserError(f"cannot make the scores (the config's evaluator): {reason(error)}") from error

    def dump_config(self) -> None:
        """Not yet: what the folder says of an earlier training stays until this one has begun."""

    def train(self) -> nn.Module:
        self.register_hook(WrittenConfig())
        self.register_hook(StepRandomness())
        self.register_hook(SharedStatistics())
        return super().train()

    # ------------------------------------------------------------ files

    def load_checkpoint(
        self, filename: str, map_location: str = "cpu", strict: bool = False, revise_keys: list | None = None
    ) -> dict:
        """Take a file's weights. A training that starts from them may have heads of another shape, which stay fresh;
        nothing else may.
        """
        payload = self.opened.get(filename) or checkpoint.load(filename)
        self.call_hook("after_load_checkpoint", checkpoint=payload)
        state, model = tensors(payload, filename), bare(self.model)
        own = model.state_dict()
        fresh = ()
        if self._train_loop is not None and not self._resume:
            fresh = tuple(
                k
                for k, v in own.items()
                if not k.startswith("backbone.") and (k not in state or state[k].shape != v.shape)
            )
            state = {name: value for name, value in state.items() if name not in fresh}
        checkpoint.load_into(model, state, source=filename, may_lack=fresh, may_have=UNUSED, lists_all="TWINS_DEBUG=1")
        self._has_loaded = True
        unused = sorted(name for name in state if name not in own)
        self.logger.info(f"Load checkpoint from {filename}: {len(own) - len(fresh)} of {len(own)} tensors")
        for names, what in (
            (fresh, "left fresh, because the file has none of that shape"),
            (unused, "in the file, but not used"),
        ):
            if names:
                self.logger.info(f"{what}: {', '.join(names)}")
        return payload

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: str = "cpu",
    ) -> None:
        """Go on where a file was written. Unlike mmengine's, it reads tensors and plain values only."""
        payload = self.load_checkpoint(filename)
        try:
            meta = payload["meta"]
            if not all(isinstance(meta[name], int) and meta[name] >= 0 for name in ("epoch", "iter")):
                raise ValueError("its epoch and iter are no counts")
            self.train_loop._epoch, self.train_loop._iter = meta["epoch"], meta["iter"]
            self.optim_wrapper.load_state_dict(payload["optimizer"])
            for scheduler, state in zip(self.param_schedulers, payload["param_schedulers"], strict=True):
                scheduler.load_state_dict(state)
            hub = dict(payload["message_hub"])
            hub["log_scalars"] = {name: HistoryBuffer(*history) for name, history in hub["log_scalars"].items()}
            self.message_hub.load_state_dict(hub)
        except Exception as error:  # a state may be wrong in any way
            raise UserError(
                f"no training to resume ({filename}): {reason(error)}; --load-from starts a new one from its weights"
            ) from error
        if meta.get("processes", get_world_size()) != get_world_size():
            self.logger.warning(
                f"{filename} was written by {meta['processes']} processes, not {get_world_size()}: the training will "
                "be another"
            )
        self.logger.info(f"resumed epoch: {self.epoch}, iter: {self.iter}")

    @master_only
    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = True,
        backend_args: dict | None = None,
    ) -> None:
        """What mmengine writes, in tensors and plain values only."""
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
            meta=plain(dict(epoch=epoch, iter=iteration) | (meta or {}) | facts),
            state_dict=bare(self.model).state_dict(),
            message_hub=plain(hub),
        )
        if save_optimizer:
            payload["optimizer"] = self.optim_wrapper.state_dict()
        if save_param_scheduler:
            payload["param_schedulers"] = [scheduler.state_dict() for scheduler in self.param_schedulers]
        self.call_hook("before_save_checkpoint", checkpoint=payload)
        checkpoint.save(os.path.join(out_dir, filename), payload)
