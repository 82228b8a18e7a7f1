"""Transforms and checks for the images, labels and annotations that people have: any size, and one line for a file that
cannot be used.

TwinsLoadAnnotations, TwinsResize and TwinsRandomFlip do what the transforms of mmsegmentation and mmdetection do that
have these names without Twins. They also accept images of a single row or column.
"""

import importlib
import importlib.util

import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine.dataset import BaseDataset
from mmengine.registry import TRANSFORMS

from training.errors import UserError, library_reason
from training.images import MAX_PIXELS, ORIENTATIONS, ImageReader, opened, orientation_of, turn

# The types of each library that with_checks replaces; dense/coco.py and dense/label_files.py add their own.
CHECKED = {
    "mmseg": {"LoadAnnotations", "Resize", "RandomFlip", "IoUMetric"},
    "mmdet": {"LoadAnnotations", "Resize", "RandomFlip"},
}
COLOR = ("color", "color_ignore_orientation")  # the color types of mmcv that TwinsLoadImage reads
READING = {"exif": ("apply", "ignore"), "labels": ("shown", "stored"), "alpha": ("white", "black", "drop")}


def with_checks(config: object, library: str) -> object:
    """Return a copy of a loader's or an evaluator's config in which TwinsX stands for X, for each X of CHECKED."""
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


# ---------------------------------------------------------------- images


def set_reading(config: object, reading: dict) -> None:
    """Set how the pipelines in a config read images, by its key `reading`: exif, labels, alpha, max_pixels."""
    if isinstance(config, list | tuple):
        for each in config:
            set_reading(each, reading)
    elif isinstance(config, dict):
        if config.get("type") == "LoadImageFromFile":
            config.update(reading)
        for each in config.values():
            set_reading(each, reading)


class TwinsLoadImage(LoadImageFromFile):
    """Load img (H, W, 3), in BGR, as classification reads images.

    exif: apply the EXIF orientation (mmcv's default), or ignore it. labels: whether boxes, masks and label maps are
    those of the shown image, or of the stored pixels and turn with them. alpha, max_pixels: as ImageReader's. Other
    color types, and files that are not local, are mmcv's.
    """

    def __init__(
        self,
        *args,
        exif: str | None = None,
        labels: str | None = None,
        alpha: str = "white",
        max_pixels: int = MAX_PIXELS,
        **options,
    ):
        super().__init__(*args, **options)
        exif = exif or ("apply" if self.color_type == "color" else "ignore")
        self.labels = labels or ("shown" if exif == "apply" else "stored")
        for (key, known), value in zip(READING.items(), (exif, self.labels, alpha)):
            if value not in known:
                raise UserError(f"no such setting (reading.{key}={value}): use {' or '.join(known)}")
        if not (isinstance(max_pixels, int) and max_pixels > 0):
            raise UserError(f"no number of pixels (reading.max_pixels={max_pixels}): use {MAX_PIXELS} or another")
        if (exif, self.labels) == ("ignore", "shown"):
            what = "stored pixels with labels of the shown image (reading.exif=ignore, reading.labels=shown)"
            raise UserError(f"{what}: set reading.exif=apply or reading.labels=stored")
        self.reader = ImageReader(exif=exif, alpha=alpha, max_pixels=max_pixels)

    def transform(self, results: dict) -> dict | None:
        if self.color_type not in COLOR or self.backend_args or "://" in str(results["img_path"]):
            return super().transform(results)
        try:
            image, orientation = self.reader.read(results["img_path"])
        except UserError:
            if self.ignore_empty:
                return None
            raise
        pixels = mmcv.rgb2bgr(np.asarray(image))
        results["img"] = pixels.astype(np.float32) if self.to_float32 else pixels
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        results["label_orientation"] = orientation if self.labels == "stored" else 1
        return results

    def label_orientation(self, path: str) -> int:
        """Return the orientation that leads from an image's labels to the image, without decoding it."""
        if self.labels == "shown" or self.reader.exif == "ignore":
            return 1
        with opened(path, max_pixels=self.reader.max_pixels) as file:
            return orientation_of(file)

    def shape(self, path: str) -> tuple[int, int]:
        """Return the height and width that an image will have, without decoding it."""
        with opened(path, max_pixels=self.reader.max_pixels) as file:
            size, transposed = file.size[::-1], ORIENTATIONS[orientation_of(file)][0]
            shown = file.format == "TIFF"  # whose size Pillow gives as it is shown
        return size[::-1] if transposed and shown != (self.reader.exif == "apply") else size


def unwrapped(dataset: object) -> list:
    """Return a data set in a list, or those that it wraps."""
    inner = [*getattr(dataset, "datasets", ()), *([dataset.dataset] if hasattr(dataset, "dataset") else ())]
    return [each for one in inner for each in unwrapped(one)] or [dataset]


def steps_of(dataset: object, kind: type) -> list:
    """Return the transforms of a type in the pipelines of a data set, or of those that it wraps."""
    pipelines = [getattr(each, "pipeline", None) for each in (dataset, *unwrapped(dataset))]
    steps = [step for each in dict.fromkeys(pipelines) for step in getattr(each, "transforms", ())]
    return [step for step in steps if isinstance(step, kind)]


def image_loaders(dataset: object) -> list[TwinsLoadImage]:
    return steps_of(dataset, TwinsLoadImage)


# ---------------------------------------------------------------- labels


@TRANSFORMS.register_module()
class TwinsLoadAnnotations(BaseTransform):
    """Load gt_seg_map (H, W): the class index of each pixel, 255 where there is none.

    As mmsegmentation's LoadAnnotations, but a label file must have one channel, the size of its image, and values from
    0 to 255, or UserError is raised. The last two arguments are accepted as there, and ignored: Pillow reads the file.
    """

    def __init__(self, reduce_zero_label: bool | None = None, imdecode_backend: str = "", backend_args: object = None):
        self.reduce_zero_label = reduce_zero_label

    def transform(self, results: dict) -> dict:
        labels = turn(read_labels(results["seg_map_path"]), results.get("label_orientation", 1))
        if labels.shape != tuple(results["ori_shape"]):
            raise another_size("labels", results["seg_map_path"], labels.shape, results)
        reduce = results["reduce_zero_label"] if self.reduce_zero_label is None else self.reduce_zero_label
        results["gt_seg_map"] = classes_of_values(results.get("label_map"), reduce_zero_label=reduce)[labels]
        results["seg_fields"].append("gt_seg_map")
        return results


def classes_of_values(label_map: dict | None, *, reduce_zero_label: bool) -> np.ndarray:
    """Return the class index (256,) of each value of a label file, 255 for none."""
    classes = np.arange(256, dtype=np.uint8)
    for old, new in (label_map or {}).items():
        classes[old] = new
    return classes[[255, *range(254), 255]] if reduce_zero_label else classes  # neither 0 nor 255 is a class


def read_labels(path: str) -> np.ndarray:
    """Return the labels (H, W) in a file as uint8; raise UserError if it holds something else."""
    with opened(path, "the labels") as file:
        labels, mode = np.array(file), file.mode
    if labels.ndim > 2:
        raise UserError(f"labels with several channels ({path}, {mode}): expected one, the class index of each pixel")
    if labels.max() > 255:
        raise UserError(f"a label above 255 ({path}): {labels.max()}, expected the class index of each pixel")
    return labels.astype(np.uint8)


def another_size(what: str, path: str, size: tuple[int, int], results: dict) -> UserError:
    """Return an error for labels of another size than their image; it names EXIF if that is the likely reason."""
    shape, advice = tuple(results["ori_shape"]), "crop or resize one of them"
    with opened(results["img_path"]) as file:
        orientation = orientation_of(file)
    if orientation != 1 and tuple(size) == shape[::-1]:
        turned = results.get("label_orientation", 1) != 1
        of = "shown image: set reading.labels=shown" if turned else "stored pixels: set reading.labels=stored"
        advice = f"the EXIF orientation is {orientation}, and the labels are those of the {of}"
    sizes = f"{size[0]} x {size[1]}, the image is {shape[0]} x {shape[1]}"
    return UserError(f"{what} of another size than their image ({path}): {sizes}; {advice}")


def check_listed_size(path: str, listed: tuple[int, int], shape: tuple[int, int], orientation: int) -> None:
    """Raise UserError if annotations give an image another size than it has. orientation: from annotations to image."""
    size = listed[::-1] if ORIENTATIONS[orientation][0] else listed
    if shape != size:
        about = dict(ori_shape=shape, label_orientation=orientation, img_path=path)
        raise another_size("annotations", path, size, about)


# ---------------------------------------------------------------- boxes and masks


def turn_points(x, y, shape: tuple[int, int], orientation: int) -> tuple:
    """Return coordinates on a stored image as those on the shown one of this shape (height, width)."""
    transpose, columns, rows = ORIENTATIONS[orientation]
    x, y = (y, x) if transpose else (x, y)
    return shape[1] - x if columns else x, shape[0] - y if rows else y


def turn_boxes(boxes, shape: tuple[int, int], orientation: int):
    """Return boxes (..., 4), x1 y1 x2 y2, on a stored image as those on the shown one of this shape."""
    x1, y1 = turn_points(boxes[..., 0], boxes[..., 1], shape, orientation)
    x2, y2 = turn_points(boxes[..., 2], boxes[..., 3], shape, orientation)
    least, most, stack = (torch.minimum, torch.maximum, torch.stack)
    if isinstance(boxes, np.ndarray):
        least, most, stack = np.minimum, np.maximum, np.stack
    return stack([least(x1, x2), least(y1, y2), most(x1, x2), most(y1, y2)], -1)


def turn_polygon(points: np.ndarray, shape: tuple[int, int], orientation: int) -> np.ndarray:
    x, y = turn_points(points[0::2], points[1::2], shape, orientation)
    return np.stack([x, y], 1).reshape(-1)


class TwinsLoadObjects(BaseTransform):
    """Load boxes, masks and labels as mmdetection's LoadAnnotations; those of stored pixels turn with their image."""

    def __init__(self, **options):
        self.load = TRANSFORMS.build(dict(type="LoadAnnotations", **options))

    def transform(self, results: dict) -> dict:
        orientation, shape = results.get("label_orientation", 1), results["ori_shape"]
        if orientation == 1:
            return self.load.transform(results)
        results["ori_shape"] = shape[::-1] if ORIENTATIONS[orientation][0] else shape
        results = self.load.transform(results)
        results["ori_shape"] = shape
        if "gt_bboxes" in results:
            boxes = results["gt_bboxes"]
            if hasattr(boxes, "tensor"):
                boxes.tensor = turn_boxes(boxes.tensor, shape, orientation)
            else:
                results["gt_bboxes"] = turn_boxes(boxes, shape, orientation)
        if "gt_masks" in results:
            results["gt_masks"] = turn_masks(results["gt_masks"], shape, orientation)
        if "gt_seg_map" in results:
            results["gt_seg_map"] = turn(results["gt_seg_map"], orientation)
        return results


def turn_masks(masks, shape: tuple[int, int], orientation: int):
    """Return mmdetection's masks, bitmaps or polygons, on a stored image as those on the shown one."""
    if isinstance(masks.masks, list):
        turned = [[turn_polygon(part, shape, orientation) for part in parts] for parts in masks.masks]
    else:
        turned = np.ascontiguousarray(turn(masks.masks, orientation))
    return type(masks)(turned, *shape)


# Inferencers look for the library's name of the first transform.
for library in CHECKED:
    if importlib.util.find_spec(library):
        registry = importlib.import_module(f"{library}.registry").TRANSFORMS
        registry.register_module(name="LoadImageFromFile", module=TwinsLoadImage)
        if library == "mmdet":
            registry.register_module(name="TwinsLoadAnnotations", module=TwinsLoadObjects)


# ---------------------------------------------------------------- a data set's items


class CheckedPrepareData:
    """Call a data set's prepare_data, and check what it returns; an error is one line that names the file."""

    def __init__(self, dataset: BaseDataset):
        self.dataset, self.prepare_data = dataset, dataset.prepare_data
        self.classes = len(dataset.metainfo.get("classes") or ())
        self.stored = [each for each in image_loaders(dataset) if each.labels == "stored"]

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
        orientation = self.stored[0].label_orientation(info["img_path"]) if self.stored else 1
        for sample in samples if isinstance(samples, list) else [samples]:
            sample.set_metainfo(dict(label_orientation=orientation))  # metrics turn results back
            self.check(sample, info)
        return data

    def check(self, sample: object, info: dict) -> None:
        """Raise UserError if the annotations are for another image size, or a label is that of no class."""
        shape = tuple(sample.metainfo.get("ori_shape", ()))[:2]
        listed = (info.get("height"), info.get("width"))
        if shape and None not in listed:
            check_listed_size(info["img_path"], listed, shape, sample.label_orientation)
        if self.classes and "gt_sem_seg" in sample:
            labels = sample.gt_sem_seg.data
            wrong = labels[(labels >= self.classes) & (labels != self.dataset.ignore_index)]
            if len(wrong):
                first = int(self.dataset.reduce_zero_label)
                known = f"{self.classes} classes, labels {first} to {self.classes - 1 + first}"
                what = f"{int(wrong.max()) + first}; the data set has {known}"
                raise UserError(f"a label of no class ({info['seg_map_path']}): {what}")
