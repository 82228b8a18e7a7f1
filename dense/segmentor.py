"""A segmentor that labels large and very small pictures: mmsegmentation's, with logits made a stripe of the picture at
a time.

150 classes of a 4000 x 3000 picture are 7 GB of logits, and test-time augmentation keeps twelve of them. The head's own
map has 1/16 of the pixels of what it looks at: that is kept, and resized to the picture's size by stripes. Equal to the
plain way up to rounding, which is used where it fits.
"""

from gvt import SMALLEST

# isort: split
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder, SegTTAModel
from torch import Tensor

MOST_LOGITS = 2**27  # of a picture at once: 0.5 GB


def taken_rows(x: Tensor, start: int, stop: int, height: int, *, first: int = 0, rows: int | None = None) -> Tensor:
    """Rows start to stop of x (1, C, h, w) resized to `height` rows, bilinear. x may be only the rows from `first` on
    of a map of `rows`.
    """
    rows = rows or x.shape[2]
    upper, lower, share = neighbours(start, stop, height, rows, device=x.device)
    return x[:, :, upper - first].lerp(x[:, :, lower - first], share[:, None].to(x.dtype))


def neighbours(start: int, stop: int, height: int, rows: int, *, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two of `rows` rows between which each resized row lies, and its share of the second."""
    y = ((torch.arange(start, stop, device=device, dtype=torch.float64) + 0.5) * rows / height - 0.5).clamp(min=0)
    upper = y.floor().long().clamp(max=rows - 1)
    return upper, (upper + 1).clamp(max=rows - 1), y - upper


def wide(x: Tensor, width: int) -> Tensor:
    return F.interpolate(x, size=(x.shape[2], width), mode="bilinear", align_corners=False)


def stripe(logits: Tensor, meta: dict, start: int, stop: int) -> Tensor:
    """Rows start to stop of the logits at the picture's own size. logits: the head's, (1, C, h, w), for the input that
    `meta` tells of.
    """
    height, width = meta["ori_shape"][:2]
    left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size", [0] * 4))
    padded_height, padded_width = meta["input_shape"]
    real = padded_height - top - bottom
    upper, lower, _ = neighbours(start, stop, height, real, device=logits.device)
    first, last = int(upper.min()), int(lower.max()) + 1
    x = wide(taken_rows(logits, top + first, top + last, padded_height), padded_width)[..., left : padded_width - right]
    if meta.get("flip"):
        x = x.flip(3)
    return wide(taken_rows(x, start, stop, height, first=first, rows=real), width)


def stripes(classes: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, MOST_LOGITS // 4 // (classes * width))
    return ((start, min(start + step, height)) for start in range(0, height, step))


@MODELS.register_module()
class TwinsSegmentor(EncoderDecoder):
    def coarse(self, inputs: Tensor, data_samples: list) -> tuple[Tensor, list[dict]]:
        """The head's logits, and what tells how they lie on each picture. A side under 32 is padded, and the padding
        cut off again.
        """
        height, width = inputs.shape[-2:]
        below, beside = max(0, SMALLEST - height), max(0, SMALLEST - width)
        logits = self.decode_head(self.extract_feat(F.pad(inputs, (0, beside, 0, below))))
        metas = []
        for sample in data_samples:
            left, right, top, bottom = sample.metainfo.get(
                "img_padding_size", sample.metainfo.get("padding_size", [0] * 4)
            )
            padding = [left, right + beside, top, bottom + below]
            metas.append(dict(sample.metainfo, img_padding_size=padding, input_shape=(height + below, width + beside)))
        return logits, metas

    def is_plain(self, inputs: Tensor, data_samples: list | None) -> bool:
        """Whether mmsegmentation's own way serves: no very small picture, none with too many logits."""
        if (
            data_samples is None
            or self.test_cfg.get("mode", "whole") != "whole"
            or self.align_corners
            or self.out_channels == 1
        ):
            return True
        if any(
            sample.metainfo.get("flip") and sample.metainfo.get("flip_direction") != "horizontal"
            for sample in data_samples
        ):
            return True
        sizes = [inputs.shape[-2:], *(sample.metainfo["ori_shape"] for sample in data_samples)]
        return (
            min(inputs.shape[-2:]) >= SMALLEST and max(h * w for h, w, *_ in sizes) * self.out_channels <= MOST_LOGITS
        )

    def predict(self, inputs: Tensor, data_samples: list | None = None) -> list:
        if self.is_plain(inputs, data_samples):
            return super().predict(inputs, data_samples)
        logits, metas = self.coarse(inputs, data_samples)
        for sample, each, meta in zip(data_samples, logits, metas):
            parts = stripes(self.out_channels, *meta["ori_shape"][:2])
            labels = torch.cat([stripe(each[None], meta, *rows).argmax(1) for rows in parts], dim=1)
            sample.pred_sem_seg = PixelData(data=labels)
        return data_samples


@MODELS.register_module()
class TwinsTTAModel(SegTTAModel):
    """Test-time augmentation of a TwinsSegmentor: the mean of each kind's softmax, summed stripe by stripe."""

    def test_step(self, data: dict) -> list:
        kinds = [{key: value[index] for key, value in data.items()} for index in range(len(data["inputs"]))]
        found = []
        for kind in kinds:
            kind = self.module.data_preprocessor(kind, False)
            found.append((*self.module.coarse(kind["inputs"], kind["data_samples"]), kind["data_samples"]))
        merged = found[0][2]
        for number, sample in enumerate(merged):
            parts = []
            for rows in stripes(self.module.out_channels, *sample.metainfo["ori_shape"][:2]):
                # As published: the class of the largest mean
                parts.append(
                    sum(
                        stripe(logits[number : number + 1], metas[number], *rows).softmax(1)
                        for logits, metas, _ in found
                    ).argmax(1)
                )
            sample.pred_sem_seg = PixelData(data=torch.cat(parts, dim=1))
        return merged
