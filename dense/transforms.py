"""Transforms and checks for the images, labels and annotations that people have: any size, and one line for a file that
cannot be used.

TwinsLoadAnnotations, TwinsResize and TwinsRandomFlip do what the transforms of mmsegmentation and mmdetection do that
have these names without Twins. They also accept images of a single row or column.
"""

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmengine.registry import TRANSFORMS
from PIL import Image

from training.errors import UserError, library_reason

# The types of each library that with_checks replaces.
CHECKED = {"mmseg": ("LoadAnnotations", "Resize", "RandomFlip", "IoUMetric"), "mmdet": ("Resize", "RandomFlip")}


def with_checks(config: object, library: str) -> object:
    """Return a copy of a pipeline's or an evaluator's config in which TwinsX stands for X, for each X of CHECKED."""
    if isinstance(config, list | tuple):
        return type(config)(with_checks(each, library) for each in config)
    if not isinstance(config, dict):
        return config
    config = {key: with_checks(value, library) for key, value in config.items()}
    if config.get("type") in ("RandomResize", "RandomChoiceResize"):
        config.setdefault("resize_type", "Resize")  # mmcv's default
    types = {key: config[key] for key in ("type", "resize_type") if config.get(key) in CHECKED[library]}
    return config | {key: f"Twins{name}" for key, name in types.items()}


@TRANSFORMS.register_module()
class TwinsResize(BaseTransform):
    """Resize as the library in scope does, but round no side down to 0: an image of 4000 x 1 has one row at any scale.

    scale and keep_ratio may be set later, as RandomResize does. options: those of the library's Resize.
    """

    def __init__(self, scale: int | tuple[int, int] | None = None, *, keep_ratio: bool = False, **options):
        self.resize = TRANSFORMS.build(dict(type="Resize", scale=scale, keep_ratio=keep_ratio, **options))
        self.scale, self.keep_ratio = self.resize.scale, keep_ratio

    def transform(self, results: dict) -> dict:
        self.resize.scale, self.resize.keep_ratio = self.scale, self.keep_ratio
        if self.keep_ratio and self.scale:
            size = mmcv.rescale_size(results["img"].shape[1::-1], self.scale)
            if 0 in size:
                self.resize.scale, self.resize.keep_ratio = tuple(max(1, side) for side in size), False
        return self.resize.transform(results)


@TRANSFORMS.register_module()
class TwinsRandomFlip(BaseTransform):
    """Flip as the library in scope does; options are its RandomFlip's."""

    def __init__(self, **options):
        self.flip = TRANSFORMS.build(dict(type="RandomFlip", **options))

    def transform(self, results: dict) -> dict:
        results = self.flip.transform(results)
        # NumPy calls a flipped row contiguous, so that nothing copies it later, but torch rejects its negative stride.
        if 1 in results["img"].shape[:2]:
            results["img"] = results["img"].copy()
        return results


@TRANSFORMS.register_module()
class TwinsLoadAnnotations(BaseTransform):
    """Load gt_seg_map (H, W): the class index of each pixel, 255 where there is none.

    As mmsegmentation's LoadAnnotations, but a label file must have one channel, the size of its image, and values from
    0 to 255, or UserError is raised. The last two arguments are accepted as there, and ignored: Pillow reads the file.
    """

    def __init__(self, reduce_zero_label: bool | None = None, imdecode_backend: str = "", backend_args: object = None):
        self.reduce_zero_label = reduce_zero_label

    def transform(self, results: dict) -> dict:
        labels = read_labels(results["seg_map_path"], results["ori_shape"])
        classes = np.arange(256, dtype=np.uint8)  # of each label
        for old, new in (results.get("label_map") or {}).items():
            classes[old] = new
        if results["reduce_zero_label"] if self.reduce_zero_label is None else self.reduce_zero_label:
            classes = classes[[255, *range(254), 255]]  # neither 0 nor 255 is a class
        results["gt_seg_map"] = classes[labels]
        results["seg_fields"].append("gt_seg_map")
        return results


def read_labels(path: str, shape: tuple[int, int]) -> np.ndarray:
    """Return the labels (H, W) in a file as uint8; raise UserError if they do not fit an image of this shape."""
    try:
        with Image.open(path) as file:
            labels, mode = np.array(file), file.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the labels ({path}): {library_reason(error)}; fix or replace it") from error
    if labels.ndim > 2:
        raise UserError(f"labels with several channels ({path}, {mode}): expected one, the class index of each pixel")
    if labels.shape != tuple(shape):
        sizes = f"{labels.shape[0]} x {labels.shape[1]}, the image is {shape[0]} x {shape[1]}"
        raise UserError(f"labels of another size than their image ({path}): {sizes}; crop or resize one of them")
    if labels.max() > 255:
        raise UserError(f"a label above 255 ({path}): {labels.max()}, expected the class index of each pixel")
    return labels.astype(np.uint8)


class CheckedPrepareData:
    """Call a data set's prepare_data, and check what it returns; an error is one line that names the file."""

    def __init__(self, dataset: BaseDataset):
        self.dataset, self.prepare_data = dataset, dataset.prepare_data
        self.classes = len(dataset.metainfo.get("classes") or ())

    def __call__(self, index: int) -> dict | None:
        info = self.dataset.get_data_info(int(index))
        try:
            data = self.prepare_data(index)
        except UserError:
            raise
        except Exception as error:  # the transforms of three libraries raise anything
            reason = library_reason(error).replace(f": {info.get('img_path')}", "")
            raise UserError(f"cannot use an image ({info.get('img_path')}): {reason}; fix or remove it") from error
        # Several samples with test-time augmentation, none if the pipeline rejected the image
        samples = (data or {}).get("data_samples", [])
        for sample in samples if isinstance(samples, list) else [samples]:
            self.check(sample, info)
        return data

    def check(self, sample: object, info: dict) -> None:
        """Raise UserError if the annotations are for another image size, or a label is that of no class."""
        shape = tuple(sample.metainfo.get("ori_shape", ()))[:2]
        listed = (info.get("height"), info.get("width"))
        if shape and None not in listed and shape != listed:
            sizes = f"{listed[0]} x {listed[1]}, the image is {shape[0]} x {shape[1]}"
            raise UserError(f"annotations for another image size ({info['img_path']}): {sizes}; replace one of them")
        if self.classes and "gt_sem_seg" in sample:
            labels = sample.gt_sem_seg.data
            wrong = labels[(labels >= self.classes) & (labels != self.dataset.ignore_index)]
            if len(wrong):
                first = int(self.dataset.reduce_zero_label)
                known = f"{self.classes} classes, labels {first} to {self.classes - 1 + first}"
                what = f"{int(wrong.max()) + first}; the data set has {known}"
                raise UserError(f"a label of no class ({info['seg_map_path']}): {what}")
