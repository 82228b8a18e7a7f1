"""What stands between a data set and the pictures, labels and annotations that people have: any size, and one line for
what cannot be used.
"""

from collections.abc import Iterator

import mmcv
import mmcv.image.geometric
import numpy as np
from mmengine.dataset import BaseDataset

from training.errors import UserError

_scale_size, _imflip = mmcv.image.geometric._scale_size, mmcv.imflip


def scaled_size(size: tuple[int, int], scale: float | tuple[float, float]) -> tuple[int, int]:
    """As mmcv rounds it, but never to no pixels: a picture of 4000 x 1 has one row at any scale."""
    width, height = _scale_size(size, scale)
    return max(1, width), max(1, height)


def flipped(img: np.ndarray, direction: str = "horizontal") -> np.ndarray:
    """As mmcv flips it, but one row or column in memory of its own: numpy calls the view contiguous, and torch refuses
    its negative stride.
    """
    view = _imflip(img, direction)
    return view.copy() if 1 in view.shape[:2] else view


# mmcv has no options for these, and every Resize and RandomFlip of the three libraries ends here.
mmcv.image.geometric._scale_size = scaled_size
mmcv.imflip = flipped


def reason(error: Exception) -> str:
    """What another library's error says, short."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    said = " ".join((str(error.args[0] if error.args else error).strip().splitlines() or [""])[0].split())[:200]
    if isinstance(error, KeyError) and " " not in said:
        return f"{said!r} is missing"
    return f"{type(error).__name__}: {said}"


class CheckedPictures:
    """What stands for a data set's `prepare_data`: the same, but what is wrong with a picture or with what belongs to
    it is one line.
    """

    def __init__(self, dataset: BaseDataset):
        self.dataset, self.prepare_data = dataset, dataset.prepare_data
        self.classes = len(dataset.metainfo.get("classes") or ())

    def __call__(self, index: int) -> dict | None:
        info = self.dataset.get_data_info(int(index))
        try:
            data = self.prepare_data(index)
        except UserError:
            raise
        except Exception as error:  # the transforms of three libraries fail in any way
            said = reason(error).replace(f": {info.get('img_path')}", "")
            raise UserError(
                f"a picture that cannot be used ({info.get('img_path')}): {said}; mend it or take it out"
            ) from error
        for sample in samples(data):
            self.check(sample, info)
        return data

    def check(self, sample: object, info: dict) -> None:
        """The annotations' size is the picture's, and a pixel's label is that of a class, or none."""
        shape = tuple(sample.metainfo.get("ori_shape", ()))[:2]
        listed = (info.get("height"), info.get("width"))
        if shape and None not in listed and shape != listed:
            sizes = f"{listed[0]} x {listed[1]}, the picture has {shape[0]} x {shape[1]}"
            raise UserError(f"annotations for another size than their picture's ({info['img_path']}): {sizes}")
        if self.classes and "gt_sem_seg" in sample:
            labels = sample.gt_sem_seg.data
            wrong = labels[(labels >= self.classes) & (labels != self.dataset.ignore_index)]
            if len(wrong):
                first = int(self.dataset.reduce_zero_label)
                known = f"the data has {self.classes} classes, {first} to {self.classes - 1 + first}"
                raise UserError(
                    f"a label that no class has ({info['seg_map_path']}): {int(wrong.max()) + first}; {known}"
                )


def samples(data: dict | None) -> Iterator[object]:
    """The samples in what a pipeline gave: one, with test-time augmentation several, and none where a picture is to be
    replaced.
    """
    found = (data or {}).get("data_samples", [])
    yield from found if isinstance(found, list) else [found]
