"""Checks of a config before a run, and of models and data at its start. Each error is one line that says what to do."""

import logging
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import nn

from dense.data_checks import check_labels, plain_name
from training.errors import UserError, did_you_mean, library_reason
from utils import in_main_process

PATHS = {  # of a data set's config, below data_root
    "ann_file": "annotation file",
    "img_path": "image folder",
    "img": "image folder",
    "seg_map_path": "label folder",
}


def read_config(name: str) -> Config:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"no such config ({name}): {did_you_mean(path, '*.py') or 'see the folder configs/'}")
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is a program: it may fail in any way
        raise UserError(f"cannot read the config ({name}): {library_reason(error)}; fix the file") from error


def check_data(cfg: Config, *splits: str) -> None:
    """Raise UserError if a file or folder that the data sets of these splits (train, val, test) name is missing, or
    their classes are text.
    """
    for split in splits:
        dataset = cfg.get(f"{split}_dataloader", {}).get("dataset", {})
        classes = dataset.get("metainfo", {}).get("classes")
        if isinstance(classes, str) and not Path(classes).is_file():
            key = f"{split}_dataloader.dataset.metainfo.classes"
            raise UserError(f'classes is text, not a tuple of names ({key}="{classes}"): write ("{classes}",)')
        named = dict(dataset.get("data_prefix", {})) | {"ann_file": dataset.get("ann_file", "")}
        for key, value in named.items():
            path = Path(dataset.get("data_root") or "", value or "")
            if value and key in PATHS and not path.exists():
                advice = f"put the data there, or set {split}_dataloader.dataset.data_root with --cfg-options"
                raise UserError(f"no {PATHS[key]} ({path}): {advice}")
        evaluator = cfg.get(f"{split}_evaluator") or []
        for metric in evaluator if isinstance(evaluator, list) else [evaluator]:
            if metric.get("ann_file") and not Path(metric.ann_file).is_file():
                advice = f"set {split}_evaluator.ann_file with --cfg-options"
                raise UserError(f"no annotation file for the scores ({metric.ann_file}): {advice}")


def check_pretrained(cfg: Config) -> None:
    path = cfg.model.backbone.get("pretrained")
    if path and not path.startswith("https://") and not Path(path).is_file():
        setting = "model.backbone.pretrained with --cfg-options (None: train from scratch)"
        raise UserError(f"no such file ({path}): put classification weights there, or set {setting}")


def check_batch(cfg: Config) -> None:
    """Warn if the total batch size is not the recipe's, whose learning rate is for its own."""
    recipe, images = cfg.get("auto_scale_lr", {}).get("base_batch_size"), cfg.train_dataloader.batch_size
    total = get_world_size() * images
    if recipe and recipe != total:
        what = f"total batch size {total} ({get_world_size()} processes x {images} images), the recipe's is {recipe}"
        advice = "the learning rate is not scaled, set optim_wrapper.optimizer.lr with --cfg-options"
        print_log(f"{what}: {advice}", logger="current", level=logging.WARNING)


def check_schedule(runner) -> None:
    """Warn if the learning rate's schedule ends before the training run does, as after a longer max_iters alone."""
    length, schedulers = runner.max_iters, runner.param_schedulers or []
    ends = [each.end * (1 if not each.by_epoch else runner.epoch_length or length) for each in schedulers]
    only_warm_up = all(getattr(each, "end_factor", None) == 1 for each in schedulers)
    if not only_warm_up and max(ends) < length:
        last = ends.index(max(ends))
        what = f"the schedule ends at iteration {ends[last]} of {length}: the rest keeps its last learning rate"
        advice = f"set param_scheduler.{last}.end with --cfg-options"
        print_log(f"{what}; {advice}", logger="current", level=logging.WARNING)


def class_difference(stored: Sequence[str] | None, classes: Sequence[str] | None) -> str | None:
    """Return how as many class names differ from a checkpoint's; None if they do not. Case and spaces do not count."""

    if not stored or not classes or len(stored) != len(classes):
        return None
    pairs = [
        (f"class {index} is {old!r} there and {new!r} here")
        for index, (old, new) in enumerate(zip(stored, classes))
        if plain_name(old) != plain_name(new)
    ]
    if not pairs:
        return None
    same = sorted(map(plain_name, stored)) == sorted(map(plain_name, classes))
    return f"{pairs[0]}, {'the same names in another order' if same else f'{len(pairs)} of {len(classes)} differ'}"


class StartChecks(Hook):
    """Check at the start the heads' classes, the labels and the annotations, also those of a later validation."""

    def before_train(self, runner) -> None:
        check_schedule(runner)
        check_classes(runner.model, runner.train_dataloader.dataset)
        in_main_process(lambda: check_labels(runner.train_dataloader.dataset))
        if runner.val_loop is not None:
            dataset = runner.val_dataloader.dataset
            check_classes(runner.model, dataset)
            in_main_process(lambda: check_labels(dataset, known_good=True))
            check_scores(runner.val_evaluator, dataset, must_score=False)

    def before_test(self, runner) -> None:
        dataset = runner.test_dataloader.dataset
        check_classes(runner.model, dataset)
        in_main_process(lambda: check_labels(dataset))
        check_scores(runner.test_evaluator, dataset, must_score=True)


def check_scores(evaluator, dataset, *, must_score: bool) -> None:
    """Let each metric look at what it scores against, which would fail after the last image only."""
    for metric in evaluator.metrics:
        if hasattr(metric, "check_data"):
            metric.check_data(dataset, must_score=must_score)


def check_classes(model: nn.Module, dataset) -> None:
    classes = dataset.metainfo.get("classes") or ()
    found = getattr(dataset, "cat_ids", classes)  # in COCO's format: those that the annotations list
    if len(found) != len(classes):
        listed = f"{len(found)} of {len(classes)} are listed; set metainfo.classes of the data set to those"
        raise UserError(f"classes missing in the annotations ({dataset.ann_file}): {listed}")
    for name, module in model.named_modules():
        number = getattr(module, "num_classes", None)
        # A region proposal head has one class, object, whatever the data.
        head = "head" in name and not name.endswith("rpn_head") and isinstance(number, int)
        if head and number == 1 and hasattr(module, "loss_decode") and not uses_sigmoid(module):
            what = f"one class with softmax, which has nothing to tell it from ({name}.num_classes=1)"
            advice = 'list two, as classes=("background", "NAME") with num_classes=2'
            raise UserError(f"{what}: {advice}, or set out_channels=1 and loss_decode.use_sigmoid=True as well")
        if classes and head and number != len(classes):
            advice = f"the data set has {len(classes)}, set its num_classes with --cfg-options"
            raise UserError(f"a head for another number of classes ({name}: {number}): {advice}")


def uses_sigmoid(head: nn.Module) -> bool:
    losses = head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
    return any(getattr(loss, "use_sigmoid", False) for loss in losses)
