"""mmdetection's CocoDataset and CocoMetric for the annotations that people have, under the names TwinsX.

Their classes are those of the config, in its order, found by name; mmdetection takes the order of the file. What
dense/coco.py notices about a file is logged, or ends the run.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS
from mmengine.fileio import get_local_path

from dense.coco import class_findings, findings, read, renumbered
from dense.data_checks import FileNames, Finding, report
from dense.transforms import CHECKED, TwinsLoadObjects, steps_of, turn_boxes
from training.errors import UserError
from training.images import ORIENTATIONS, inverse, turn

CHECKED["mmdet"] |= {"CocoDataset", "CocoMetric"}
MOST_MASKS = 2000  # that are compared with their boxes before a run


class TwinsCoco(COCO):
    """pycocotools' index of an annotation file's content, in which it sets ids and iscrowd where they are missing."""

    def __init__(self, content: dict):
        super().__init__()
        renumber = renumbered(content["annotations"])
        for number, each in enumerate(content["annotations"], start=1):
            each |= dict(iscrowd=each.get("iscrowd") or 0, id=number if renumber else each["id"])
        self.dataset = content
        self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def get_cat_ids(self, cat_names: Sequence[str] = (), sup_names: Sequence = (), cat_ids: Sequence = ()) -> list:
        """Return the ids of categories, in the order of their names if these are given."""
        if not cat_names:
            return super().get_cat_ids(cat_names, sup_names, cat_ids)
        by_name = {each["name"]: each["id"] for each in self.dataset["categories"]}
        return [by_name[name] for name in cat_names if name in by_name]


@DATASETS.register_module()
class TwinsCocoDataset(CocoDataset):
    """CocoDataset. boxes_outside: boxes that leave their image, or have no area, are meant, however many."""

    def __init__(self, *args, boxes_outside: bool = False, **options):
        self.boxes_outside = boxes_outside
        super().__init__(*args, **options)

    def COCOAPI(self, path: str) -> TwinsCoco:
        """Return the index of an annotation file; mmdetection calls this name."""
        content = read(path)
        masks = any(step.load.with_mask for step in steps_of(self, TwinsLoadObjects))
        options = dict(masks=masks, boxes_outside=self.boxes_outside, most=MOST_MASKS)
        report(findings(content, self.ann_file, self.metainfo["classes"], **options))
        return TwinsCoco(content)

    def load_data_list(self) -> list[dict]:
        self.names = FileNames()
        items = super().load_data_list()
        report(self.names.findings(self.data_prefix["img"]))
        del self.names
        return items

    def parse_data_info(self, raw_data_info: dict) -> dict:
        info = super().parse_data_info(raw_data_info)
        return info | dict(img_path=self.names.find(info["img_path"]))

    def filter_data(self) -> list[dict]:
        """Leave out what mmdetection does, and images with crowds only where it leaves out those without objects."""
        kept, options = super().filter_data(), self.filter_cfg or {}
        if self.test_mode:
            return kept
        if options.get("filter_empty_gt"):
            kept = [info for info in kept if not info["instances"] or has_object(info)]
        total, least = len(self.data_list), options.get("min_size", 0)
        small = sum(min(info["width"], info["height"]) < least for info in self.data_list)
        if len(kept) < total:
            counts = f"{total - len(kept) - small} of {total} without objects, {small} smaller than {least} pixels"
            what = f"images left out ({self.ann_file}): {counts}"
            line = f"{what}; filter_cfg.filter_empty_gt=False and filter_cfg.min_size=0 keep them"
            report([Finding("note", self.ann_file, line)])
        return kept


def has_object(info: dict) -> bool:
    return any(not each["ignore_flag"] for each in info["instances"])


def errors(found: Iterable[Finding]) -> list[Finding]:
    """Return those that end a run: the data set logs the others, usually of the same file."""
    return [each for each in found if each.kind == "error"]


def as_annotated(sample: dict) -> dict:
    """Return a data sample whose predictions are on the stored image, if its annotations are (reading.labels)."""
    orientation, shape = sample.get("label_orientation", 1), tuple(sample["ori_shape"][:2])
    if orientation == 1:
        return sample
    stored, back = shape[::-1] if ORIENTATIONS[orientation][0] else shape, inverse(orientation)
    found = dict(sample["pred_instances"])
    found["bboxes"] = turn_boxes(found["bboxes"], stored, back)
    if "masks" in found:
        found["masks"] = turn(found["masks"], back)
    return dict(sample, pred_instances=found, ori_shape=stored)


@METRICS.register_module()
class TwinsCocoMetric(CocoMetric):
    def __init__(self, ann_file: str | None = None, **options):
        super().__init__(**options)
        self.ann_file = ann_file
        if ann_file is None:
            return
        with get_local_path(ann_file, backend_args=self.backend_args) as path:
            content = read(path)
        options = dict(masks="segm" in self.metrics and not self.format_only, scored=True, boxes_outside=True)
        report(errors(findings(content, ann_file, None, **options)))
        self._coco_api = TwinsCoco(content)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Take results as CocoMetric does; those of a turned image return to where the annotations are."""
        super().process(data_batch, [as_annotated(sample) for sample in data_samples])

    def check_data(self, dataset, *, must_score: bool) -> None:
        """Raise UserError if the images or classes are others than the data set's, or if must_score and there is no
        object; else log that.
        """
        coco, infos = self._coco_api, [dataset.get_data_info(index) for index in range(len(dataset))]
        where, classes = self.ann_file or getattr(dataset, "ann_file", ""), dataset.metainfo["classes"]
        if coco is None:
            objects = any(has_object(info) for info in infos)
        else:
            if any(info["img_id"] not in coco.imgs for info in infos):
                advice = "set the evaluator's ann_file to the data set's"
                raise UserError(f"scores for other images than the data set's ({where}): {advice}")
            report(errors(class_findings(coco.dataset, where, classes)))
            ids = set(coco.get_cat_ids(cat_names=classes))
            objects = any(not each["iscrowd"] and each["category_id"] in ids for each in coco.anns.values())
        if not (objects or self.format_only):
            line = f"no objects to score against ({where}): mAP would be -1; use other annotations"
            report([Finding("error" if must_score else "warning", where, line)])

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute as CocoMetric does. COCOeval sorts the categories' ids, and so must what names their scores."""
        if self._coco_api is not None:
            ids = self._coco_api.get_cat_ids(cat_names=self.dataset_meta["classes"])
            self.cat_ids = sorted(ids)
            ranks = np.array([self.cat_ids.index(each) for each in ids])
            results = [(truth, found | dict(labels=ranks[found["labels"]])) for truth, found in results]
        return super().compute_metrics(results)
