"""mmengine's Runner, with safe checkpoint files, random numbers by progress, checked data, and a CPU where there is no
GPU.

Of mmengine's private names it sets train_loop._epoch and _iter, as mmengine's own resume does.
"""

import contextlib
import copy
import os
import time
from collections.abc import Iterator, Mapping
from functools import cached_property, partial

import mmengine
import torch
from mmengine.config import Config
from mmengine.dist import broadcast, get_world_size, master_only
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dense import resume
from dense.checks import class_difference
from dense.libraries import quiet
from dense.randomness import StepRandomness, seed_by_index
from dense.stopping import start_worker
from dense.transforms import CheckedPrepareData, image_loaders, with_checks
from training import checkpoint
from training.errors import UserError, library_reason

# In official checkpoints of segmentors and detectors, but in no model here: the backbone's classifier and final norm
UNUSED = ("backbone.head.", "backbone.norm.")


def adapt_to_machine(cfg: Config) -> list[str]:
    """Fit the config and torch's settings to the machine; return a line for each change that matters."""
    for part in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if cfg.get(part) and not cfg[part].get("num_workers"):
            cfg[part].persistent_workers = False
    if torch.cuda.is_available():
        # It plans anew for each size of image: 23 to 37 ms of the host's time, as others measured on an H100.
        torch.backends.cuda.enable_cudnn_sdp(False)
        return ["attention without cuDNN, which plans anew for each size of image"]
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


def with_one_more_class(config: object) -> object:
    """Return a copy of a model's config whose heads have one more class each."""
    if isinstance(config, list | tuple):
        return [with_one_more_class(each) for each in config]
    if not isinstance(config, dict):
        return config
    return {key: value + 1 if key == "num_classes" else with_one_more_class(value) for key, value in config.items()}


@contextlib.contextmanager
def must_build(part: str) -> Iterator[None]:
    """Turn what the libraries make of a wrong key in a config, or in a part of it, into one line."""
    try:
        yield
    except (TypeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        raise UserError(f"cannot build from the config ({part}): {library_reason(error)}; fix it") from error


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
            step.reader.report(final=final, write=partial(print_log, logger="current"))

    def after_train_iter(self, runner: Runner, *_, **__) -> None:
        self.report(runner.train_dataloader, "train", final=False)

    def after_train(self, runner: Runner) -> None:
        self.report(runner.train_dataloader, "train", final=True)

    def after_val(self, runner: Runner) -> None:
        self.report(runner.val_dataloader, "val", final=True)

    def after_test(self, runner: Runner) -> None:
        self.report(runner.test_dataloader, "test", final=True)


class TwinsRunner(Runner):
    opened: dict[str, dict] = {}  # files that were read already, by name
    resume_changed = False  # with other settings than the checkpoint's
    validate_first = False  # the run was stopped in a validation

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
        loader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
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
        """Do nothing: an earlier run's config stays in the folder until this one has begun, see OpenFolder."""

    def build_train_loop(self, loop: dict) -> BaseLoop:
        with must_build("train_cfg"):
            by_epoch = loop.get("by_epoch") or loop.get("type") == "EpochBasedTrainLoop"
            loop = {name: value for name, value in loop.items() if name != "by_epoch"} if by_epoch else loop
            return super().build_train_loop(loop | dict(type="ResumableEpochLoop") if by_epoch else loop)

    def build_val_loop(self, loop: dict) -> BaseLoop:
        with must_build("val_cfg"):
            return super().build_val_loop(loop)

    def build_test_loop(self, loop: dict) -> BaseLoop:
        with must_build("test_cfg"):
            return super().build_test_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: dict) -> OptimWrapper:
        with must_build("optim_wrapper"):
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: dict | list) -> list:
        with must_build("param_scheduler"):
            return super().build_param_scheduler(scheduler)

    @property
    def epoch_length(self) -> int:
        """Return the iterations of an epoch, 0 in a loop that has no epochs."""
        return len(self.train_dataloader) if isinstance(self.train_loop, EpochBasedTrainLoop) else 0

    @cached_property
    def settings(self) -> dict[str, object]:
        return resume.settings(self.cfg, seed=self.seed, dataset=self.train_dataloader.dataset)

    def train(self) -> nn.Module:
        for hook in (StepRandomness(), BroadcastBuffers(), ReportImages()):
            self.register_hook(hook)
        try:
            return super().train()
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            where = f"train_dataloader.batch_size={self.train_dataloader.batch_size}"
            what = f"a batch of one image leaves batch norm a single value ({where})"
            raise UserError(f"{what}: set it to 2 or more, or train_dataloader.drop_last=True") from error

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
        renamed = self.renamed_classes(payload, filename)
        missing = ()
        if self.starts_run:
            heads = [name for name in own if not name.startswith("backbone.")]
            missing = tuple(name for name in heads if name not in state or state[name].shape != own[name].shape)
            state = {name: value for name, value in state.items() if name not in {*missing, *renamed}}
        allowed = dict(may_lack=(*missing, *renamed), may_have=UNUSED, lists_all="TWINS_DEBUG=1")
        checkpoint.load_into(model, state, source=filename, **allowed)
        unused = sorted(name for name in state if name not in own)
        self.logger.info(f"loaded {len(own) - len({*missing, *renamed})} of {len(own)} tensors from {filename}")
        if missing:
            self.logger.info(f"randomly initialized, because the file has none of that shape: {', '.join(missing)}")
        if unused:
            self.logger.info(f"in the file, not used: {', '.join(unused)}")
        return payload

    @property
    def starts_run(self) -> bool:
        """Return True if weights are loaded to start a new training run from."""
        return bool(self.cfg.get("train_cfg")) and not self.cfg.get("resume")

    def renamed_classes(self, payload: Mapping, source: str) -> list[str]:
        """Return the tensors of this model whose classes have other names in a checkpoint, where a run starts from it.

        Elsewhere raise UserError: scores would be those of other classes.
        """
        loader = self.train_dataloader if self.cfg.get("train_cfg") else self.test_dataloader
        differ = class_difference(resume.stored_classes(payload), loader.dataset.metainfo.get("classes"))
        if not differ or self.resume_changed or not self.cfg.get("compare_classes", True):
            return []
        what = f"other classes than the checkpoint's ({source}): {differ}"
        if not self.starts_run:
            advice = "set metainfo.classes of the data set to the checkpoint's"
            raise UserError(f"{what}; {advice}, or compare_classes=False with --cfg-options if they mean the same")
        with torch.device("meta"):
            larger = self.build_model(with_one_more_class(self.cfg.model)).state_dict()
        own = unwrap(self.model).state_dict()
        found = [name for name, value in own.items() if larger[name].shape != value.shape]
        self.logger.info(f"{what}; randomly initialized: {', '.join(found)}")
        return found

    def resume(self, filename: str) -> None:
        """Continue the run that wrote a file. Unlike mmengine's, this reads tensors and plain values only.

        Raises UserError if its settings differ; with resume_changed the new schedule and rates are used from there on.
        """
        payload = self.opened.get(filename) or checkpoint.load(filename)
        changed = resume.compare_settings(self, payload, filename)
        self.load_checkpoint(filename)
        try:
            resume.set_progress(self, payload["meta"])
            resume.load_optimizer(self, payload, changed)
            hub = dict(payload["message_hub"])
            hub["log_scalars"] = {name: HistoryBuffer(*history) for name, history in hub["log_scalars"].items()}
            self.message_hub.load_state_dict(hub)
        except Exception as error:  # a state may be wrong in any way
            raise cannot_resume(filename, library_reason(error)) from error
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
            epoch_length=self.epoch_length,
            settings=self.settings,
        )
        hub = self.message_hub.state_dict()
        hub["log_scalars"] = {name: history.data for name, history in hub["log_scalars"].items()}
        payload = dict(
            meta=resume.to_plain(dict(epoch=epoch, iter=iteration) | (meta or {}) | facts),
            state_dict=unwrap(self.model).state_dict(),
            message_hub=resume.to_plain(hub),
        )
        if save_optimizer:
            payload["optimizer"] = self.optim_wrapper.state_dict()
        if save_param_scheduler:
            payload["param_schedulers"] = [scheduler.state_dict() for scheduler in self.param_schedulers]
        self.call_hook("before_save_checkpoint", checkpoint=payload)
        checkpoint.save(os.path.join(out_dir, filename), payload)


def cannot_resume(source: str, reason: str) -> UserError:
    return UserError(f"cannot resume ({source}): {reason}; --load-from starts a new training run from its weights")
