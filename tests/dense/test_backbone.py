"""The backbone: equal to the official one through the wrapper, its options and errors, and the weights that it
reads.
"""

import importlib

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import timm
import torch
from conftest import golden, golden_images, golden_weights, relative

from dense import libraries
from dense.backbone import OFFICIAL, TwinsBackbone, official_drop_path
from gvt import MODEL_NAMES, VARIANTS
from training import checkpoint
from training.errors import UserError

PAPER = [name for name in VARIANTS if name != "alt_gvt_demo"]
CLASSIFICATION = {key: name for name, key in MODEL_NAMES.items()}
DENSE = golden("dense")
EVERYDAY = "segmentation, mask corrected/alt_gvt_small"
PADS = {"segmentation": "published", "segmentation, mask corrected": "mask", "detection": "zero"}


def small(**options):
    return TwinsBackbone(**dict(variant="alt_gvt_demo", drop_path_rate=0.1) | options)


@pytest.mark.parametrize("case", [pytest.param(k, marks=[] if k == EVERYDAY else pytest.mark.slow) for k in DENSE])
def test_golden_maps(case):
    """The official segmentation and detection backbones, at every size that was recorded."""
    task, name = case.split("/")
    model = golden_weights(TwinsBackbone(name.removesuffix("_v0"), drop_path_rate=0.2, pad=PADS[task])).eval()
    assert (
        sum(p.numel() for p in model.parameters())
        == DENSE[case]["params"] - 1000 * (model.num_features + 1) - 2 * model.num_features
    )
    for size, expected in DENSE[case]["sizes"].items():
        with torch.inference_mode():
            maps = model(golden_images(1, *map(int, size.split("x"))))
        for x, facts in zip(maps, expected, strict=True):
            flat = x.flatten()
            assert list(x.shape) == facts["shape"]
            assert relative(flat[:4], facts["first4"]) < 1e-9
            assert relative(flat[-4:], facts["last4"]) < 1e-9
            probe = (flat * torch.cos(torch.arange(flat.numel(), dtype=torch.float64) * 0.31)).sum()
            for value, of in ((x.mean(), "mean"), (x.std(), "std"), (x.abs().mean(), "absmean"), (probe, "probe")):
                assert relative(value, facts[of]) < 1e-9


@pytest.mark.parametrize("variant", PAPER)
def test_names_are_the_official_ones(variant):
    """Those of the classification model without norm and head, and SVT's norms of the maps."""
    with torch.device("meta"):
        own = set(TwinsBackbone(variant, drop_path_rate=0.2).state_dict())
        classification = set(timm.create_model(CLASSIFICATION[variant]).state_dict())
    norms = {f"norm_list.{k}.{w}" for k in range(4) for w in ("weight", "bias")} if variant.startswith("alt") else set()
    assert own == (classification - {"norm.weight", "norm.bias", "head.weight", "head.bias"}) | norms


@pytest.mark.parametrize("variant", ["alt_gvt_demo", "pcpvt_small"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2)])
def test_every_parameter_gets_a_gradient(variant, out_indices):
    """So that no process has to look for unused ones. Also where later stages are left out."""
    model = TwinsBackbone(variant, drop_path_rate=0.0, out_indices=out_indices)
    maps = model(torch.randn(2, 3, 64, 96))
    assert [x.shape for x in maps] == [(2, VARIANTS[variant].dims[k], 16 >> k, 24 >> k) for k in out_indices]
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("size", [(1, 1), (31, 64), (200, 3), (33, 47)])
def test_any_size(size):
    maps = small().eval()(torch.randn(1, 3, *size))
    assert [tuple(x.shape[-2:]) for x in maps] == [
        tuple(max(32, side) // 2 ** (k + 2) for side in size) for k in range(4)
    ]
    assert all(x.isfinite().all() for x in maps)


def test_options_reach_the_model():
    model = small(drop_path_rate=0.3, pad="zero", grad_checkpointing=True)
    assert model.grad_checkpointing and model.blocks[0][0].attn.pad == "zero"
    assert model.blocks[-1][-1].drop_path.drop_prob == pytest.approx(0.3)


@pytest.mark.parametrize("wrong", [dict(depth=50), dict(norm_cfg=None), dict(init_cfg=None), dict(style="pytorch")])
def test_an_unknown_key_is_refused(wrong):
    with pytest.raises(TypeError, match=next(iter(wrong))):
        small(**wrong)


def test_a_missing_drop_path_is_refused():
    with pytest.raises(TypeError, match="drop_path_rate"):
        TwinsBackbone("alt_gvt_small")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(variant="pvt_small"), "none of pcpvt_small"),
        (dict(pad="reflect"), "none of mask"),
        (dict(out_indices=(4,)), "stages 0 to 3"),
    ],
)
def test_a_wrong_value_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        small(**wrong)


# ---------------------------------------------------------------- the libraries


def registry(library):
    libraries.load(library)
    return importlib.import_module(f"{library}.registry").MODELS


@pytest.mark.parametrize("library", OFFICIAL)
def test_registered_once_for_both_libraries(library):
    model = registry(library).build(dict(type="TwinsBackbone", variant="alt_gvt_demo", drop_path_rate=0.1))
    assert type(model) is TwinsBackbone
    assert "TwinsBackbone" not in registry(library).module_dict
    with pytest.raises(TypeError, match="depth"):
        registry(library).build(dict(type="TwinsBackbone", variant="alt_gvt_demo", drop_path_rate=0.1, depth=50))


# Class name, padding and drop path, as in the official folders.
NAMES = {
    "mmseg": {
        "pcpvt_small_v0": ("mask", 0.2), "pcpvt_base_v0": ("mask", 0.2), "pcpvt_large": ("mask", 0.2),
        "alt_gvt_small": ("mask", 0.2), "alt_gvt_base": ("mask", 0.2), "alt_gvt_large": ("mask", 0.3),
    },
    "mmdet": {
        "pcpvt_small": ("zero", 0.2), "pcpvt_base": ("zero", 0.2), "pcpvt_large": ("zero", 0.2),
        "alt_gvt_small": ("zero", 0.2), "alt_gvt_base": ("zero", 0.2), "alt_gvt_large": ("zero", 0.2),
    },
}  # fmt: skip
RESNET = dict(
    depth=50, num_stages=4, out_indices=(0, 1, 2, 3), norm_cfg=dict(type="BN"), norm_eval=True, style="pytorch"
)
UNREAD = {
    "mmseg": RESNET | dict(dilations=(1, 1, 1, 1), strides=(1, 2, 2, 2), contract_dilation=True, drop_path_rate=0.3),
    "mmdet": RESNET | dict(frozen_stages=1),
}


@pytest.mark.parametrize(("library", "name"), [(library, name) for library in NAMES for name in NAMES[library]])
def test_official_class_names(library, name, monkeypatch):
    warnings = captured_warnings(monkeypatch)
    pad, rate = NAMES[library][name]
    with torch.device("meta"):
        model = registry(library).build(dict(type=name, pretrained="x.pth", **UNREAD[library]))
    assert model.variant == name.removesuffix("_v0") and model.pretrained == "x.pth"
    assert model.blocks[-1][-1].drop_path.drop_prob == pytest.approx(rate) == official_drop_path(library, model.variant)
    assert {block.attn.pad for stage in model.blocks for block in stage if hasattr(block.attn, "pad")} == (
        {pad} if "alt" in name else set()
    )
    (line,) = warnings
    assert line.startswith(f"{name}: ignored, as in the official code: ")
    assert all(f"{key}=" in line for key in UNREAD[library])


@pytest.mark.parametrize("library", OFFICIAL)
@pytest.mark.parametrize("wrong", ["pad", "variant", "with_cp"])
def test_official_class_names_take_nothing_else(library, wrong):
    with torch.device("meta"), pytest.raises(TypeError, match=wrong):
        registry(library).build(dict(type="alt_gvt_small", **{wrong: "zero"}))


# ---------------------------------------------------------------- weights


def saved(folder, payload):
    path = folder / "weights.pth"
    checkpoint.save(path, payload)
    return str(path)


def captured_warnings(monkeypatch):
    lines = []
    monkeypatch.setattr("dense.backbone.warn", lines.append)
    return lines


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"model": state}, lambda state: {"state_dict": state}]
)
def test_classification_weights(wrap, tmp_path, monkeypatch):
    source = timm.create_model("alt_gvt_demo").state_dict()
    warnings = captured_warnings(monkeypatch)
    model = small(pretrained=saved(tmp_path, wrap(source)))
    before = model.patch_embeds[0].proj.weight.clone()
    assert torch.equal(model.patch_embeds[0].proj.weight, before) and not warnings  # the constructor reads nothing
    model.init_weights()
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in source.items() if name in own)
    total = len(own)
    assert warnings == [
        f"alt_gvt_demo: loaded {total - 8} of {total} tensors from {model.pretrained}; missing in the file, randomly initialized: norm_list; in the file, not used: norm, head"
    ]


def test_weights_for_the_first_stages_only(tmp_path):
    source = timm.create_model("alt_gvt_demo").state_dict()
    model = small(pretrained=saved(tmp_path, source), out_indices=(0, 1))
    model.init_weights()
    assert torch.equal(model.blocks[1][1].mlp.fc1.weight, source["blocks.1.1.mlp.fc1.weight"])


def test_no_pretrained_is_silent(monkeypatch):
    warnings = captured_warnings(monkeypatch)
    small().init_weights()
    assert not warnings


@pytest.mark.parametrize("payload", [{"something.else": torch.zeros(3)}, "pcpvt_small_v0", "alt_gvt_small"])
def test_weights_that_do_not_fit_are_refused(payload, tmp_path):
    state = timm.create_model(payload).state_dict() if isinstance(payload, str) else payload
    with pytest.raises(UserError, match="do not fit"):
        small(pretrained=saved(tmp_path, state)).init_weights()


def test_missing_weights_are_refused():
    with pytest.raises(UserError, match=r"no such file \(pretrained/alt_gvt_demo.pth\)"):
        small(pretrained="pretrained/alt_gvt_demo.pth").init_weights()


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_frozen_stages_have_no_gradient_and_no_drop_path(stages):
    """mmseg's name. The rest trains, with drop path."""
    model = small(frozen_stages=stages, drop_path_rate=0.5)
    assert model.train() is model and model.training
    parts = ("patch_embeds", "blocks", "pos_block", "norm_list")
    frozen = tuple(f"{part}.{stage}." for part in parts for stage in range(stages))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    for stage, blocks in enumerate(model.blocks):
        assert blocks[1].drop_path.training == (stage >= stages)
    if stages < 4:
        sum(each.sum() for each in model(torch.randn(1, 3, 64, 64))).backward()
        assert model.patch_embeds[0].proj.weight.grad is None and model.patch_embeds[3].proj.weight.grad is not None
    assert model.eval().training is False


@pytest.mark.parametrize("stages", [0, 5, -2])
def test_other_numbers_of_frozen_stages_are_an_error(stages):
    with pytest.raises(ValueError, match="frozen_stages="):
        small(frozen_stages=stages)


def test_nothing_is_frozen_by_default():
    assert all(parameter.requires_grad for parameter in small().train().parameters())
