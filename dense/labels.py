"""mmsegmentation's reader of label pictures, under its name, without what that leaves to chance: their size, channels and range."""

import numpy as np
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS
from PIL import Image

from dense.pictures import reason
from utils import UserError


@TRANSFORMS.register_module(name="LoadAnnotations", force=True)
class LoadLabels(LoadAnnotations):
    """gt_seg_map (H, W), of the picture's own size also where that is one row or column. Raises UserError where the file holds another, or
    other than the number of each pixel's class, 0 to 255."""

    def _load_seg_map(self, results: dict) -> None:
        path, (height, width) = results["seg_map_path"], results["ori_shape"]
        try:
            with Image.open(path) as picture:
                labels, mode = np.array(picture), picture.mode
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"labels that cannot be read ({path}): {reason(error)}") from error
        if labels.ndim > 2:
            raise UserError(f"labels of several channels ({path}, {mode}): expected one, with the number of each pixel's class")
        if labels.shape != (height, width):
            sizes = f"{labels.shape[0]} x {labels.shape[1]}, the picture has {height} x {width}"
            raise UserError(f"labels of another size than their picture ({path}): {sizes}")
        if labels.max() > 255:
            raise UserError(f"a label beyond 255 ({path}): {labels.max()}, expected the number of each pixel's class")
        number = np.arange(256, dtype=np.uint8)  # what each label is turned into
        for old, new in (results.get("label_map") or {}).items():
            number[old] = new
        if results["reduce_zero_label"] if self.reduce_zero_label is None else self.reduce_zero_label:
            number = number[[255, *range(254), 255]]  # 0 is unlabelled, as 255 is
        results["gt_seg_map"] = number[labels.astype(np.uint8)]
        results["seg_fields"].append("gt_seg_map")
