"""What tools.check_data looks at in the data sets of a segmentation or detection config."""

import contextlib
import functools
import importlib.util
import io
import os
from collections.abc import Iterable, Iterator

import numpy as np

from dense import libraries
from tools.check_files import Finding, Item, verify
from training.errors import UserError, library_reason
from training.images import turn
from utils import ROOT, log


def dense(config: str, max_pixels: int, found: list[Finding]) -> list[Item]:
    """Return the images and label files of a config's train and val; append what is wrong with the annotations."""
    if importlib.util.find_spec("mmengine") is None:
        raise UserError(f"a config needs mmengine, which is not installed ({config}): run make dense")
    with libraries.quiet(), contextlib.redirect_stdout(io.StringIO()):
        from dense.checks import check_data, read_config

        cfg = read_config(config)
    library = cfg.get("default_scope")
    if library not in libraries.TASKS:
        raise UserError(f"no config of segmentation or detection ({config}): its default_scope is {library}")
    libraries.load(library)
    os.chdir(ROOT / libraries.TASKS[library])  # where train.py runs, for relative paths of the config
    from mmengine.registry import init_default_scope

    init_default_scope(library)
    check_data(cfg, "train", "val")
    reading = tuple(sorted((dict(max_pixels=max_pixels) | cfg.get("reading", {})).items()))
    items, look = [], segmentation if library == "mmseg" else detection
    for split in ("train", "val"):
        if cfg.get(f"{split}_dataloader"):
            items += look(cfg[f"{split}_dataloader"].dataset, split, reading, found)
    return items


def parts_of(config: dict, library: str) -> Iterator[dict]:
    """Yield a data set's config, or those of the data sets that it wraps."""
    inner = config.get("datasets") or ([config["dataset"]] if "dataset" in config else [])
    yield from (part for each in inner for part in parts_of(each, library)) if inner else [config]


def collect(findings: Iterable, found: list[Finding]) -> None:
    """Append what a run would warn of or end with; log the notes."""
    for each in findings:
        if each.kind == "note":
            log(each.line)
        else:
            found.append(Finding(each.where, each.line))


# ---------------------------------------------------------------- segmentation


def segmentation(config: dict, split: str, reading: tuple, found: list[Finding]) -> list[Item]:
    from mmseg.registry import DATASETS

    from dense import data_checks, label_files  # noqa: F401  the latter registers the data sets
    from dense.transforms import with_checks

    items = []
    for part in parts_of(config, "mmseg"):
        try:
            dataset = DATASETS.build(with_checks(part, "mmseg"))
        except UserError as error:
            found.append(Finding(part.get("data_root") or "", str(error)))
            continue
        except Exception as error:  # a config may be wrong in any way
            raise UserError(f"cannot build the data set (of {split}): {library_reason(error)}; fix it") from error
        meaning = data_checks.Meaning.of(dataset)
        for info in (dataset.get_data_info(index) for index in range(len(dataset))):
            items.append(Item(info["img_path"], functools.partial(look_at_image, reading=reading), split))
            if os.path.exists(info.get("seg_map_path") or ""):
                look = functools.partial(look_at_labels, image=info["img_path"], meaning=meaning, reading=reading)
                items.append(Item(info["seg_map_path"], look))
        with contextlib.suppress(UserError):  # of a label file, each of which is looked at later
            collect(data_checks.segmentation_findings(dataset), found)
    return items


@functools.cache
def loader(reading: tuple):
    from dense.transforms import TwinsLoadImage

    return TwinsLoadImage(**dict(reading))


def look_at_image(path: str, reading: tuple, size: tuple[int, int] | None = None) -> None:
    """Decode an image. size: height and width that annotations give it."""
    from dense.transforms import check_listed_size

    load = loader(reading)
    verify(path, load.reader.max_pixels)
    image, _ = load.reader.read(path)
    if size:
        check_listed_size(path, size, image.size[::-1], load.label_orientation(path))


def look_at_labels(path: str, image: str, meaning, reading: tuple) -> None:
    """Decode a label file, and compare its size with its image's and its values with the classes."""
    from dense.data_checks import ranges
    from dense.transforms import another_size, read_labels

    load = loader(reading)
    orientation, shape = load.label_orientation(image), load.shape(image)
    labels = turn(read_labels(path), orientation)
    if labels.shape != shape:
        about = dict(ori_shape=shape, label_orientation=orientation, img_path=image)
        raise another_size("labels", path, labels.shape, about)
    values = np.unique(labels)
    if len(wrong := values[meaning.wrong[values]]):
        raise UserError(f"labels of no class ({path}): values {ranges(wrong)}, but {meaning.known}")


# ---------------------------------------------------------------- detection


def detection(config: dict, split: str, reading: tuple, found: list[Finding]) -> list[Item]:
    from mmdet.registry import DATASETS

    from dense import coco

    items = []
    for part in parts_of(config, "mmdet"):
        root, prefix = part.get("data_root") or "", part.get("data_prefix", {}).get("img") or ""
        path = os.path.join(root, part.get("ann_file") or "")
        about = dict(getattr(DATASETS.get(part["type"]), "METAINFO", {})) | part.get("metainfo", {})
        masks = any(step.get("with_mask") for step in part.get("pipeline", []))
        try:
            content = coco.read(path)
            options = dict(masks=masks, boxes_outside=part.get("boxes_outside", False))
            collect(coco.findings(content, path, about.get("classes"), **options), found)
        except UserError as error:
            found.append(Finding(path, str(error)))
            continue
        for image in content["images"]:
            size = int(image["height"]), int(image["width"])
            look = functools.partial(look_at_image, reading=reading, size=size)
            items.append(Item(os.path.join(root, prefix, image["file_name"]), look, split))
    return items
