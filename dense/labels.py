"""mmsegmentation's reader and writer of label pictures, under its names, without what these leave to chance: size,
channels and range.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS, TRANSFORMS
from PIL import Image

from dense.pictures import reason
from training.errors import UserError


@TRANSFORMS.register_module(name="LoadAnnotations", force=True)
class LoadLabels(LoadAnnotations):
    """gt_seg_map (H, W), of the picture's own size also where that is one row or column. Raises UserError where the
    file holds another, or other than the number of each pixel's class, 0 to 255.
    """

    def _load_seg_map(self, results: dict) -> None:
        path, (height, width) = results["seg_map_path"], results["ori_shape"]
        try:
            with Image.open(path) as picture:
                labels, mode = np.array(picture), picture.mode
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"labels that cannot be read ({path}): {reason(error)}") from error
        if labels.ndim > 2:
            raise UserError(
                f"labels of several channels ({path}, {mode}): expected one, with the number of each pixel's class"
            )
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


@METRICS.register_module(name="IoUMetric", force=True)
class LabelMetric(IoUMetric):
    """The scores of labels; what it writes to output_dir has the picture's size also where that is one row or
    column.
    """

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        folder, self.output_dir = self.output_dir, None
        super().process(data_batch, data_samples)
        self.output_dir = folder
        for sample in data_samples if folder is not None else ():
            labels = sample["pred_sem_seg"]["data"][0].cpu().numpy() + int(sample.get("reduce_zero_label", False))
            Image.fromarray(labels.astype(np.uint8)).save(
                Path(folder, Path(sample["img_path"]).with_suffix(".png").name)
            )
