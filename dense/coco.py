"""Read COCO's annotations, and look at them before a run. `findings` calls all checks on the content of a file."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from dense.data_checks import Finding, plain_name, some, spread
from training.errors import UserError

KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}
LIKELY = 0.1  # the share of boxes from which on they are taken for another format


# ---------------------------------------------------------------- reading


def read(path: str) -> dict:
    """Return the content of an annotation file; raise UserError if it is not in COCO's format."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # some programs begin with a mark
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise cannot_read(where, "no JSON; export or download the file again") from error
    except UnicodeDecodeError as error:
        raise cannot_read(path, "no text in UTF-8; export or download the file again") from error
    except OSError as error:
        raise cannot_read(path, f"{error.strerror}; check the name") from error
    if not isinstance(content, dict):
        raise cannot_read(path, f"expected an object with {', '.join(KEYS)}; see cocodataset.org/#format-data")
    content.setdefault("annotations", [])  # a test's images have none
    for kind, keys in KEYS.items():
        if not isinstance(content.get(kind), list):
            raise cannot_read(path, f"the list {kind!r} is missing; see cocodataset.org/#format-data")
        for index, entry in enumerate(content[kind]):
            for key in keys:
                if not isinstance(entry, dict) or key not in entry:
                    raise cannot_read(f"{path}, {kind}[{index}]", f"{key!r} is missing; add it")
    for entry in content["images"]:
        if not numbers([entry["height"], entry["width"]], 2) or min(entry["height"], entry["width"]) <= 0:
            raise cannot_read(f"{path}, image {entry['id']}", "height and width must be numbers of pixels; fix them")
    return content


def cannot_read(where: str, why: str) -> UserError:
    return UserError(f"cannot read the annotations ({where}): {why}")


def numbers(values: object, count: int) -> bool:
    """Return True for a list of so many finite numbers."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )


def renumbered(annotations: list[dict]) -> bool:
    """Return True if ids would be mistaken: pycocotools takes an id of 0 for no match."""
    return any(type(each["id"]) is not int or each["id"] == 0 for each in annotations)


# ---------------------------------------------------------------- ids and names


def as_ids(annotations: Iterable[dict]) -> str:
    return f"ids {some([each['id'] for each in annotations])}"


def id_findings(content: dict, path: str) -> Iterator[Finding]:
    """Yield what is noticed about the ids of images and annotations, and about ids of nothing."""
    annotations = content["annotations"]
    for kind, advice in (("image", "give each image its own id"), ("annotation", "number them from 1")):
        counts = Counter(each["id"] for each in content[f"{kind}s"])
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            what = f"{kind} ids are not unique ({path}): {len(twice)} are used more than once, as {some(twice)}"
            yield Finding("error", path, f"{what}; {advice}, as after merging files")
    if renumbered(annotations):
        what = f"annotation ids that are 0 or no integers ({path}): all {len(annotations)} are numbered from 1"
        yield Finding("note", path, f"{what}, because pycocotools takes 0 for no match")
    yield from unmatched(annotations, "image_id", {each["id"] for each in content["images"]}, "image", path)
    yield from unmatched(annotations, "category_id", {each["id"] for each in content["categories"]}, "category", path)
    without = sum(each.get("iscrowd") is None for each in annotations)
    if without:
        yield Finding("note", path, f"annotations without iscrowd ({path}): {without} of {len(annotations)} count as 0")


def unmatched(annotations: list[dict], key: str, known: set, what: str, path: str) -> Iterator[Finding]:
    """Yield a finding if there are annotations whose id of an image or category is not listed."""
    used = Counter(each[key] for each in annotations)
    unknown = {value: count for value, count in used.items() if value not in known}
    if not unknown:
        return
    count = sum(unknown.values())
    line = f"annotations of no {what} ({path}): {count} of {len(annotations)}, {key} {some(unknown)}"
    integers = all(type(value) is int for value in used)
    shift = next((step for step in (1, -1) if integers and all(value + step in known for value in used)), 0)
    if shift:
        yield Finding("error", path, f"{line}; {key} is off by one: {shift:+d} makes each that of a listed {what}")
    elif 2 * count > len(annotations):
        yield Finding("error", path, f"{line}; fix {key}, or use the file that belongs to them")
    else:
        yield Finding("warning", path, f"{line}; they are not used")


def class_findings(content: dict, path: str, classes: tuple[str, ...]) -> Iterator[Finding]:
    """Yield what is noticed about the names of categories, which must be those of the config's classes."""
    names = Counter(each["name"] for each in content["categories"])
    missing = [name for name in classes if name not in names]
    if missing:
        plain = {plain_name(name): name for name in names if isinstance(name, str)}
        written = [f"{name!r} is {plain[plain_name(name)]!r} there" for name in missing if plain_name(name) in plain]
        listed = some(written) if written else f"{some(map_repr(missing))}; the file has {some(map_repr(names))}"
        what = f"classes missing in the annotations ({path}): {len(missing)} of {len(classes)}, {listed}"
        yield Finding("error", path, f"{what}; set metainfo.classes of the data set to the file's names")
        return
    twice = [name for name in classes if names[name] > 1]
    if twice:
        what = f"categories of one name ({path}): {some(map_repr(twice))}"
        yield Finding("error", path, f"{what}; give them one id, or two names")
    others = {each["id"]: each["name"] for each in content["categories"] if each["name"] not in classes}
    count = sum(each["category_id"] in others for each in content["annotations"])
    if count:
        what = f"annotations of classes that the data set does not list ({path}): {count}"
        line = f"{what} of {len(content['annotations'])}, {some(map_repr(others.values()))}; they are not used"
        yield Finding("note", path, line)


def map_repr(values: Iterable) -> list[str]:
    return [repr(each) for each in values]


# ---------------------------------------------------------------- boxes


def number_findings(content: dict, path: str) -> Iterator[Finding]:
    """Yield errors for boxes and areas that are no numbers."""
    annotations = content["annotations"]
    wrong = [each for each in annotations if not numbers(each["bbox"], 4)]
    if wrong:
        what = f"bbox is not four numbers ({path}): {len(wrong)} of {len(annotations)}, {as_ids(wrong)}"
        yield Finding("error", path, f"{what}: {str(wrong[0]['bbox'])[:60]}; write x, y, width, height in pixels")
        return
    negative = [each for each in annotations if min(each["bbox"][2:]) < 0]
    if negative:
        what = f"bbox with a negative width or height ({path}): {len(negative)} of {len(annotations)}"
        yield Finding("error", path, f"{what}, {as_ids(negative)}; write x, y, width, height in pixels")
    wrong = [each for each in annotations if not numbers([each["area"]], 1)]
    if wrong:
        what = f"area is no number ({path}): {len(wrong)} of {len(annotations)}, {as_ids(wrong)}"
        yield Finding("error", path, f"{what}; write pixels")


def outside(x, y, width, height, sizes: np.ndarray) -> np.ndarray:
    """Return which boxes leave their image by more than 1 pixel. sizes: widths and heights, (N, 2)."""
    return (x < -1) | (y < -1) | (x + width > sizes[:, 0] + 1) | (y + height > sizes[:, 1] + 1)


def likely_format(boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """Return the format that nearly all boxes have, if it is not x, y, width, height in pixels. boxes: (N, 4)."""
    a, b, c, d = boxes.T
    fits = {
        "values from 0 to 1": (boxes >= 0).all(1) & (boxes <= 1.001).all(1),
        "corners x1, y1, x2, y2": (c > a) & (d > b) & ~outside(a, b, c - a, d - b, sizes),
        "y, x, height, width": ~outside(b, a, d, c, sizes),
        "center x, center y, width, height": ~outside(a - c / 2, b - d / 2, c, d, sizes),
    }
    as_written = ~outside(a, b, c, d, sizes) & (c >= 1) & (d >= 1)
    best = max(fits, key=lambda name: fits[name].mean())
    return best if fits[best].mean() > max(0.95, as_written.mean()) else None


def box_findings(
    boxes: np.ndarray, sizes: np.ndarray, areas: np.ndarray, ids: list, path: str, *, allowed: bool
) -> Iterator[Finding]:
    """Yield what is noticed about boxes (N, 4). allowed: boxes_outside of the data set."""
    x, y, width, height = boxes.T
    leaving = outside(x, y, width, height, sizes)
    empty = (width == 0) | (height == 0) | (areas <= 0)
    small = ((width < 1) | (height < 1)) & ~empty
    wrong = leaving | empty | small
    if not wrong.any():
        return
    counts = f"{leaving.sum()} leave their image by more than 1 pixel, {small.sum()} are smaller than a pixel"
    counts = f"{counts}, {empty.sum()} have no area, ids {some([ids[index] for index in np.flatnonzero(wrong)])}"
    line, mistake = f"boxes ({path}): of {len(boxes)}, {counts}", likely_format(boxes, sizes)
    if allowed or (wrong.mean() < LIKELY and not mistake):
        kind = "note" if allowed else "warning"
        yield Finding(kind, path, f"{line}; those without a pixel of their image are not used in training")
        return
    advice = "fix or remove them, or set boxes_outside=True of the data set if they are meant"
    advice = f"{mistake} in place of x, y, width, height in pixels? {advice}" if mistake else advice
    yield Finding("error" if wrong.mean() >= LIKELY else "warning", path, f"{line}; {advice}")


# ---------------------------------------------------------------- masks


def decoded_box(segmentation: list | dict) -> np.ndarray:
    """Return the least box x1, y1, x2, y2 around a mask in COCO's format."""
    if isinstance(segmentation, list):
        points = np.concatenate([np.asarray(part, float).reshape(-1, 2) for part in segmentation])
        return np.concatenate([points.min(0), points.max(0)])
    x, y, width, height = rle.toBbox(as_rle(segmentation))
    return np.array([x, y, x + width, y + height])


def as_rle(segmentation: dict) -> dict:
    counts = segmentation["counts"]
    return rle.frPyObjects(segmentation, *segmentation["size"]) if isinstance(counts, list) else segmentation


def mask_problem(annotation: dict, image: dict) -> str | None:
    """Return what is wrong with an annotation's segmentation in COCO's words; None if it can be decoded."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return f"'segmentation' is {'empty' if 'segmentation' in annotation else 'missing'}"
    if isinstance(segmentation, list):
        if all(isinstance(part, list) and len(part) >= 6 and numbers(part, len(part) & ~1) for part in segmentation):
            return None
        return "a polygon in 'segmentation' is not x, y of three points or more"
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    if not size or "counts" not in segmentation:
        return "'segmentation' is neither polygons nor an RLE of counts and size"
    if list(size) != [image["height"], image["width"]]:
        return f"the size of its RLE is {size}, the image's is {[image['height'], image['width']]}"
    counts = segmentation["counts"]
    try:
        fits = sum(counts) == size[0] * size[1] if isinstance(counts, list) else decoded_box(segmentation) is not None
    except Exception:  # pycocotools raises anything
        fits = False
    return None if fits else "the counts of its RLE cannot be decoded"


def mask_findings(content: dict, path: str, *, most: int | None = None, scored: bool = False) -> Iterator[Finding]:
    """Yield what is noticed about masks. most: how many are compared with their boxes; scored: all must be decoded."""
    images, annotations = {each["id"]: each for each in content["images"]}, content["annotations"]
    annotations = [each for each in annotations if each["image_id"] in images]
    used = [each for each in annotations if min(each["bbox"][2:]) >= 1 and each["area"] > 0]
    missing = [each for each in used if not each.get("segmentation")]
    looked = used if most is None or not used else spread(used, most)
    found = {
        each["id"]: mask_problem(each, images[each["image_id"]])
        for each in missing + (annotations if scored else looked)
    }
    problems = {key: problem for key, problem in found.items() if problem}
    if problems:
        key, problem = next(iter(problems.items()))
        what = f"masks that cannot be used ({path}): {len(problems)}, id {key}: {problem}"
        kind = "error" if missing or scored else "warning"
        yield Finding(kind, path, f"{what}; fix or remove the annotation")
    good = [each for each in looked if each["id"] not in problems]
    misfits = [each for each in good if not fits_box(decoded_box(each["segmentation"]), each["bbox"])]
    if misfits:
        what = f"masks that do not fit their boxes ({path}): {len(misfits)} of {len(looked)}, {as_ids(misfits)}"
        kind = "error" if 2 * len(misfits) > len(looked) else "warning"
        yield Finding(kind, path, f"{what}; check which of them is on the object")


def fits_box(found: np.ndarray, bbox: list[float]) -> bool:
    """Return True if a mask's box x1, y1, x2, y2 has half of its union with bbox in common, or differs by 2 pixels."""
    x, y, width, height = bbox
    box = np.array([x, y, x + width, y + height])
    common = np.clip(np.minimum(found[2:], box[2:]) - np.maximum(found[:2], box[:2]), 0, None).prod()
    union = np.prod(found[2:] - found[:2]) + width * height - common
    return bool(np.abs(found - box).max() <= 2 or 2 * common >= union)


# ---------------------------------------------------------------- all


def crowd_findings(content: dict, path: str) -> Iterator[Finding]:
    """Yield how many images have crowds only: there is no object to learn, or to score."""
    images, with_objects = set(), set()
    for each in content["annotations"]:
        images.add(each["image_id"])
        if not each.get("iscrowd"):
            with_objects.add(each["image_id"])
    if images - with_objects:
        what = f"images with crowds only, iscrowd=1 ({path}): {len(images - with_objects)} of {len(content['images'])}"
        kind = "note" if with_objects else "warning"
        yield Finding(kind, path, f"{what} count as images without objects")


def findings(
    content: dict,
    path: str,
    classes: tuple[str, ...] | None,
    *,
    masks: bool,
    scored: bool = False,
    boxes_outside: bool = False,
    most: int | None = None,
) -> Iterator[Finding]:
    """Yield all that is noticed about the content of a file, from `read`.

    classes: those of the data set. masks: masks are needed; scored: to score against, each of them. most: how many
    masks are compared with their boxes.
    """
    basic = [*id_findings(content, path), *number_findings(content, path)]
    basic += class_findings(content, path, classes) if classes is not None else []
    yield from basic
    yield from crowd_findings(content, path)
    if any(each.kind == "error" for each in basic):
        return
    sizes = {each["id"]: (each["width"], each["height"]) for each in content["images"]}
    known = [each for each in content["annotations"] if each["image_id"] in sizes]
    if known:
        boxes, areas = np.array([each["bbox"] for each in known], float), np.array([each["area"] for each in known])
        of_image, ids = np.array([sizes[each["image_id"]] for each in known]), [each["id"] for each in known]
        yield from box_findings(boxes, of_image, areas, ids, path, allowed=boxes_outside)
    if masks:
        yield from mask_findings(content, path, most=most, scored=scored)
