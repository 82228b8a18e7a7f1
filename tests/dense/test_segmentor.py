"""Labels by stripes are those of the plain way, for large and small images, padded, flipped and augmented, in
bounded memory.
"""

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import torch
import torch.nn.functional as F
from conftest import ROOT
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData

from dense import libraries

libraries.load("mmseg")

from mmseg.models import SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from dense import segmentor as ours


@pytest.fixture
def model():
    torch.manual_seed(0)
    cfg = Config.fromfile(ROOT / "segmentation" / "configs" / "fpn_alt_gvt_s_512x512_80k_ade20k.py")
    cfg.model.backbone |= dict(variant="alt_gvt_demo", pretrained=None)
    cfg.model.neck.in_channels = [32, 64, 128, 256]
    with libraries.quiet(), DefaultScope.overwrite_default_scope("mmseg"):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    model.decode_head.conv_seg.weight.data.mul_(100)  # so that classes differ by more than rounding
    return model


def data(height, width, own, flip=False):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    facts = dict(
        ori_shape=own,
        img_shape=(height, width),
        img_path="x.jpg",
        flip=flip,
        flip_direction="horizontal" if flip else None,
    )
    return dict(
        inputs=[image], data_samples=[SegDataSample(metainfo=facts, gt_sem_seg=PixelData(data=torch.zeros(1, *own)))]
    )


def agreement(a, b):
    return (a.pred_sem_seg.data == b.pred_sem_seg.data).float().mean().item()


@pytest.mark.parametrize(
    ("size", "own"), [((64, 96), (64, 96)), ((64, 96), (200, 301)), ((97, 65), (31, 20)), ((64, 64), (1, 77))]
)
@pytest.mark.parametrize("flip", [False, True])
def test_stripes_are_what_two_resizes_give(size, own, flip):
    torch.manual_seed(0)
    logits = torch.randn(1, 5, -(-size[0] // 4), -(-size[1] // 4), dtype=torch.float64)
    expected = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[:, :, 1:-3, 2:-4]
    expected = F.interpolate(expected.flip(3) if flip else expected, size=own, mode="bilinear", align_corners=False)
    meta = dict(ori_shape=own, input_shape=size, padding_size=[2, 4, 1, 3], flip=flip)
    found = torch.cat([ours.stripe(logits, meta, y, min(y + 7, own[0])) for y in range(0, own[0], 7)], dim=2)
    assert (found - expected).abs().max() < 1e-12


@torch.inference_mode()
def test_labels_by_stripes_are_the_plain_ones(model, monkeypatch):
    batch = data(64, 96, (150, 203))
    (plain,) = model.test_step({key: list(value) for key, value in batch.items()})
    plain = plain.clone()
    monkeypatch.setattr(ours, "MOST_LOGITS", 150 * 203 * 40)
    (striped,) = model.test_step(batch)
    assert agreement(plain, striped) > 0.9999


@pytest.mark.filterwarnings("ignore:The shape of value will convert")  # of mmsegmentation's own way
@torch.inference_mode()
def test_augmented_labels_are_the_plain_ones(model, monkeypatch):
    kinds = [data(64, 96, (90, 130)), data(64, 96, (90, 130), flip=True), data(96, 128, (90, 130))]
    together = {key: [kind[key] for kind in kinds] for key in ("inputs", "data_samples")}
    (plain,) = SegTTAModel(model).test_step({key: [[*each] for each in value] for key, value in together.items()})
    plain = plain.clone()
    monkeypatch.setattr(ours, "MOST_LOGITS", 150 * 130 * 40)
    (striped,) = ours.TwinsTTAModel(model).test_step(together)
    assert agreement(plain, striped) > 0.9999


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (5, 64), (33, 31)])
@torch.inference_mode()
def test_small_images(model, size):
    (found,) = model.test_step(data(*size, size))
    assert found.pred_sem_seg.data.shape == (1, *size)


@pytest.mark.slow
def test_a_large_image_in_little_memory(tmp_path):
    """4000 x 3000 pixels, 150 classes, in a process of its own, with and without augmentation: under 4 GB."""
    import subprocess
    import sys

    program = tmp_path / "large.py"
    program.write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests" / "dense")!r}]
import gvt, re, torch
import test_segmentor as t
model = t.model.__wrapped__() if hasattr(t.model, "__wrapped__") else t.model._get_wrapped_function()()
with torch.inference_mode():
    (found,) = model.test_step(t.data(512, 683, (3000, 4000)))
    assert found.pred_sem_seg.data.shape == (1, 3000, 4000)
    kinds = [t.data(512, 683, (3000, 4000), flip=flip) for flip in (False, True)] + [t.data(896, 1195, (3000, 4000))]
    (found,) = t.ours.TwinsTTAModel(model).test_step({{key: [kind[key] for kind in kinds] for key in ("inputs", "data_samples")}})
# Not ru_maxrss, which has the parent's too.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(int(peak) / 2**20)
""")
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout.split()[-1]) < 4
