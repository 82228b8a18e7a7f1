"""What can be seen to be wrong before, or right when, a training or a test starts: each is one line that says what to
do.
"""

from pathlib import Path

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import nn

from dense.pictures import reason
from training.errors import UserError, did_you_mean

PATHS = {  # of a data set's config: what it names, below data_root
    "ann_file": "annotations",
    "img_path": "folder of pictures",
    "img": "folder of pictures",
    "seg_map_path": "folder of labels",
}


def read_config(name: str) -> Config:
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"no such config ({name}): {did_you_mean(path, '*.py') or 'the published ones are in configs/'}"
        )
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is a program: it may fail in any way
        raise UserError(f"not a readable config ({name}): {reason(error)}") from error


def check_data(cfg: Config, *parts: str) -> None:
    """Every folder and file that the data sets of `parts` (train, val, test) name must be there."""
    for part in parts:
        dataset = cfg.get(f"{part}_dataloader", {}).get("dataset", {})
        named = dict(dataset.get("data_prefix", {})) | {"ann_file": dataset.get("ann_file", "")}
        for key, value in named.items():
            path = Path(dataset.get("data_root") or "", value or "")
            if value and key in PATHS and not path.exists():
                raise UserError(
                    f"no {PATHS[key]} ({path}): unpack the data there, or set {part}_dataloader.dataset.data_root with "
                    "--cfg-options"
                )
        for metric in metrics(cfg.get(f"{part}_evaluator")):
            if metric.get("ann_file") and not Path(metric.ann_file).is_file():
                raise UserError(
                    f"no annotations to score with ({metric.ann_file}): set {part}_evaluator.ann_file with "
                    "--cfg-options"
                )


def metrics(evaluator: object) -> list:
    """The configs of an evaluator's metrics; of none, none."""
    return evaluator if isinstance(evaluator, list) else [evaluator] if evaluator else []


def check_pretrained(cfg: Config) -> None:
    path = cfg.model.backbone.get("pretrained")
    if path and not path.startswith("https://") and not Path(path).is_file():
        raise UserError(
            f"no such file ({path}): put classification weights there, or set model.backbone.pretrained (None: from "
            "nothing)"
        )


def check_batch(cfg: Config) -> None:
    """Say so if processes x pictures are not the recipe's, whose learning rate is for its own."""
    recipe, images = cfg.get("auto_scale_lr", {}).get("base_batch_size"), cfg.train_dataloader.batch_size
    here = get_world_size() * images
    if recipe and recipe != here:
        print_log(
            f"a step has {here} pictures ({get_world_size()} x {images}), the recipe's has {recipe}: the learning rate "
            "is for the recipe",
            logger="current",
            level=30,
        )


class ClassesCheck(Hook):
    """The heads must be for as many classes as the data has, and its pictures have scores. A training's validation is
    checked at the start.
    """

    def before_train(self, runner) -> None:
        check_classes(runner.model, runner.train_dataloader.dataset)
        if runner.val_loop is not None:
            check_classes(runner.model, runner.val_dataloader.dataset)
            check_scores(runner.val_evaluator, runner.val_dataloader.dataset)

    def before_test(self, runner) -> None:
        check_classes(runner.model, runner.test_dataloader.dataset)
        check_scores(runner.test_evaluator, runner.test_dataloader.dataset)


def check_scores(evaluator, dataset) -> None:
    """What COCO's scores are counted against must list the data set's pictures, and be what pycocotools counts: it
    would say so at the end.
    """
    for metric in evaluator.metrics:
        coco = getattr(metric, "_coco_api", None)
        if coco is None:
            continue
        if any(dataset.get_data_info(index)["img_id"] not in coco.imgs for index in range(len(dataset))):
            raise UserError(
                f"scores for other pictures than the data's ({dataset.ann_file}): set the evaluator's ann_file to that"
            )
        for key, annotation in coco.anns.items():
            try:
                annotation["iscrowd"], annotation["area"]
                if "segm" in metric.metrics:
                    coco.annToRLE(annotation)
            except Exception as error:  # pycocotools fails in any way
                raise UserError(
                    f"an annotation that cannot be scored ({dataset.ann_file}, id {key}): {reason(error)}"
                ) from error


def check_classes(model: nn.Module, dataset) -> None:
    classes = dataset.metainfo.get("classes") or ()
    known = getattr(dataset, "cat_ids", classes)  # of COCO's format: those that the annotations list
    if len(known) != len(classes):
        raise UserError(
            f"other classes than the annotations' ({dataset.ann_file}): {len(known)} of {len(classes)} are there, set "
            "metainfo.classes"
        )
    for name, module in model.named_modules():
        number = getattr(module, "num_classes", None)
        # A region proposal head knows one class, an object's, whatever the data has.
        if (
            classes
            and "head" in name
            and not name.endswith("rpn_head")
            and isinstance(number, int)
            and number != len(classes)
        ):
            raise UserError(
                f"a head for another number of classes ({name}: {number}): the data has {len(classes)}, set its "
                "num_classes"
            )
