"""A segmentor for large and very small images: mmsegmentation's, with logits made a stripe of the image at a time.

150 classes of a 4000 x 3000 image are 7 GB of logits, and test-time augmentation keeps twelve of them. The head's own
map has 1/16 of the pixels of its input: that is kept, and resized to the image's size by stripes. The labels equal the
plain way's up to rounding, which is used where it fits.
"""

from gvt import SMALLEST

# isort: split
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import METRICS, MODELS
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder, SegTTAModel
from PIL import Image
from torch import Tensor

from training.images import inverse, turn

MOST_LOGITS = 2**27  # of an image at once: 0.5 GB


def resized_rows(x: Tensor, start: int, stop: int, height: int, *, first: int = 0, rows: int | None = None) -> Tensor:
    """Return rows start to stop of x (1, C, h, w) resized to `height` rows, bilinear.

    x may hold only the rows from `first` on of a map of `rows` rows.
    """
    rows = rows or x.shape[2]
    upper, lower, weight = row_neighbors(start, stop, height, rows, device=x.device)
    return x[:, :, upper - first].lerp(x[:, :, lower - first], weight[:, None].to(x.dtype))


def row_neighbors(start: int, stop: int, height: int, rows: int, *, device: torch.device) -> tuple[Tensor, ...]:
    """Return the two of `rows` rows between which each resized row lies, and the weight of the second."""
    y = ((torch.arange(start, stop, device=device, dtype=torch.float64) + 0.5) * rows / height - 0.5).clamp(min=0)
    upper = y.floor().long().clamp(max=rows - 1)
    return upper, (upper + 1).clamp(max=rows - 1), y - upper


def resized_columns(x: Tensor, width: int) -> Tensor:
    return F.interpolate(x, size=(x.shape[2], width), mode="bilinear", align_corners=False)


def padding_of(meta: dict) -> list[int]:
    """Return the left, right, top and bottom padding of an input."""
    return meta.get("img_padding_size", meta.get("padding_size", [0] * 4))


def stripe(logits: Tensor, meta: dict, start: int, stop: int) -> Tensor:
    """Return rows start to stop of the logits at the image's own size. logits: the head's, (1, C, h, w), for the input
    that `meta` describes.
    """
    height, width = meta["ori_shape"][:2]
    left, right, top, bottom = padding_of(meta)
    padded_height, padded_width = meta["input_shape"]
    inner = padded_height - top - bottom
    upper, lower, _ = row_neighbors(start, stop, height, inner, device=logits.device)
    first, last = int(upper.min()), int(lower.max()) + 1
    x = resized_columns(resized_rows(logits, top + first, top + last, padded_height), padded_width)
    x = x[..., left : padded_width - right]
    if meta.get("flip"):
        x = x.flip(3)
    return resized_columns(resized_rows(x, start, stop, height, first=first, rows=inner), width)


def stripes(classes: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, MOST_LOGITS // 4 // (classes * width))
    return ((start, min(start + step, height)) for start in range(0, height, step))


@MODELS.register_module()
class TwinsSegmentor(EncoderDecoder):
    def head_logits(self, inputs: Tensor, data_samples: list) -> tuple[Tensor, list[dict]]:
        """Return the head's logits, and for each image a meta for stripe(), which cuts off what pads sides below 32."""
        height, width = inputs.shape[-2:]
        below, beside = max(0, SMALLEST - height), max(0, SMALLEST - width)
        logits = self.decode_head(self.extract_feat(F.pad(inputs, (0, beside, 0, below))))
        metas = []
        for sample in data_samples:
            left, right, top, bottom = padding_of(sample.metainfo)
            padding = [left, right + beside, top, bottom + below]
            metas.append(dict(sample.metainfo, img_padding_size=padding, input_shape=(height + below, width + beside)))
        return logits, metas

    def needs_stripes(self, inputs: Tensor, data_samples: list | None) -> bool:
        """Return True for a very small image, or one with too many logits, in a mode that stripes support."""
        whole = self.test_cfg.get("mode", "whole") == "whole"
        if data_samples is None or not whole or self.align_corners or self.out_channels == 1:
            return False
        flips = [each.metainfo.get("flip_direction") for each in data_samples if each.metainfo.get("flip")]
        if any(flip != "horizontal" for flip in flips):
            return False
        sizes = [inputs.shape[-2:], *(sample.metainfo["ori_shape"] for sample in data_samples)]
        most = max(height * width for height, width, *_ in sizes) * self.out_channels
        return min(inputs.shape[-2:]) < SMALLEST or most > MOST_LOGITS

    def predict(self, inputs: Tensor, data_samples: list | None = None) -> list:
        if not self.needs_stripes(inputs, data_samples):
            return super().predict(inputs, data_samples)
        logits, metas = self.head_logits(inputs, data_samples)
        for sample, each, meta in zip(data_samples, logits, metas):
            parts = stripes(self.out_channels, *meta["ori_shape"][:2])
            labels = torch.cat([stripe(each[None], meta, *rows).argmax(1) for rows in parts], dim=1)
            sample.pred_sem_seg = PixelData(data=labels)
        return data_samples


@MODELS.register_module()
class TwinsTTAModel(SegTTAModel):
    """Test-time augmentation of a TwinsSegmentor: the mean of the softmax of all views, summed stripe by stripe."""

    def test_step(self, data: dict) -> list:
        views = [{key: value[index] for key, value in data.items()} for index in range(len(data["inputs"]))]
        views = [self.module.data_preprocessor(view, False) for view in views]
        outputs = [self.module.head_logits(view["inputs"], view["data_samples"]) for view in views]
        merged = views[0]["data_samples"]
        for number, sample in enumerate(merged):
            labels = []
            for rows in stripes(self.module.out_channels, *sample.metainfo["ori_shape"][:2]):
                scores = (stripe(logits[number : number + 1], metas[number], *rows) for logits, metas in outputs)
                labels.append(sum(each.softmax(1) for each in scores).argmax(1))  # the class of the largest mean
            sample.pred_sem_seg = PixelData(data=torch.cat(labels, dim=1))
        return merged


@METRICS.register_module()
class TwinsIoUMetric(IoUMetric):
    """IoUMetric that writes labels to output_dir in their image's size, also where that is one row or column."""

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        folder, self.output_dir = self.output_dir, None
        super().process(data_batch, data_samples)
        self.output_dir = folder
        for sample in data_samples if folder is not None else ():
            labels = sample["pred_sem_seg"]["data"][0].cpu().numpy() + int(sample.get("reduce_zero_label", False))
            labels = turn(labels, inverse(sample.get("label_orientation", 1)))  # as the data set's labels are
            path = Path(folder, Path(sample["img_path"]).with_suffix(".png").name)
            Image.fromarray(labels.astype(np.uint8)).save(path)
