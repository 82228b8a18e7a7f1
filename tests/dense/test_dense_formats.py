"""Weights that were converted for mmsegmentation give the same maps in its own PCPVT and SVT."""

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import torch
from conftest import golden_images, golden_weights
from torch import nn

from dense import libraries
from dense.backbone import TwinsBackbone
from gvt import VARIANTS
from training import formats

libraries.load("mmseg")

from mmseg.models.backbones import PCPVT, SVT

SMALL = ("pcpvt_small", "alt_gvt_small")


def theirs(variant: str) -> nn.Module:
    """mmsegmentation's model with the official eps of its norms, for which it has one setting only: it uses 1e-5
    everywhere.
    """
    v = VARIANTS[variant]
    shape = dict(
        embed_dims=list(v.dims),
        num_heads=list(v.heads),
        mlp_ratios=list(v.mlp_ratios),
        depths=list(v.depths),
        sr_ratios=list(v.sr_ratios),
    )
    if v.window is None:
        model = PCPVT(**shape, qkv_bias=True, norm_after_stage=False)
    else:
        model = SVT(**shape, qkv_bias=True, norm_after_stage=True, windiow_sizes=[v.window] * 4)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5 if "patch_embeds" in name or name.endswith("attn.norm") else 1e-6
    return model.double().eval()


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[] if v in SMALL else pytest.mark.slow) for v in VARIANTS if v != "alt_gvt_demo"]
)
def test_mmsegmentations_own_model_takes_converted_weights(variant):
    ours = golden_weights(TwinsBackbone(variant, drop_path_rate=0.2)).eval()
    converted, left_out, _ = formats.from_official(ours.state_dict(), "mmseg", source="x", no_head=True)
    assert not left_out
    model = theirs(variant)
    model.load_state_dict(converted, strict=True)
    x = golden_images(1, 224, 224)
    with torch.inference_mode():
        for a, b in zip(ours(x), model(x), strict=True):
            assert (a - b).abs().max() / a.abs().max() < 1e-11
