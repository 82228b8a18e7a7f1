"""Names of weights: to other libraries' formats and back without a changed bit, in their order; nothing dropped without
a word.
"""

import re

import pytest
import timm
import torch
from conftest import golden_weights

import gvt
from training import formats
from training.errors import UserError

VARIANTS = gvt.VARIANTS
PAPER = [key for key, variant in VARIANTS.items() if variant.timm]
HEAD = ["head.weight", "head.bias"]


def weights(key, *, num_classes=7, in_chans=3, norms=False):
    """A network's weights, cheap to make; each row and each tensor has values of its own, so that a swap shows."""
    with torch.device("meta"):
        shapes = {
            name: value.shape
            for name, value in gvt.Twins(VARIANTS[key], num_classes=num_classes, in_chans=in_chans).state_dict().items()
        }
    if norms:
        shapes |= {
            f"norm_list.{stage}.{kind}": (dim,)
            for stage, dim in enumerate(VARIANTS[key].dims)
            for kind in ("weight", "bias")
        }
    rows = {name: torch.arange(shape[0]) + 0.125 * rank for rank, (name, shape) in enumerate(shapes.items())}
    return {name: row.reshape(-1, *[1] * (len(shapes[name]) - 1)).expand(shapes[name]) for name, row in rows.items()}


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in state.items())


def without(state, *prefixes):
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("key", VARIANTS)
def test_there_and_back(key):
    state = weights(key)
    assert formats.variant_of(state) == key
    for fmt in formats.FORMATS:
        if fmt == "hub" and not VARIANTS[key].timm:
            continue
        theirs, left_out, notes = formats.from_official(state, fmt, source="x.pth")
        back, found, others = formats.to_official(theirs, source="y.pth")
        assert found == (fmt if fmt in ("mmseg", "mmpretrain") else "published") and others == []
        assert left_out == (HEAD if fmt == "mmseg" else [])
        assert_same(back, without(state, "head.") if fmt == "mmseg" else state)
        assert ["norm is kept" in note and "models have none" in note for note in notes] == (
            [True] if fmt == "mmseg" else []
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_stay(dtype):
    state = {name: value.to(dtype) for name, value in weights("alt_gvt_demo").items()}
    theirs, *_ = formats.from_official(state, "mmseg", source="x")
    assert_same(formats.to_official(theirs, source="x")[0], without(state, "head."))


def test_published_names_come_back_as_they_are():
    state = weights("alt_gvt_demo")
    back, found, left_out = formats.to_official(state, source="x")
    assert found == "published" and left_out == [] and list(back) == list(state)
    assert all(back[name] is state[name] for name in state)


def test_a_prefix_of_all_names_goes():
    state = weights("alt_gvt_demo")
    assert_same(formats.to_official({f"module.{name}": value for name, value in state.items()}, source="x")[0], state)
    mixed = {"module.norm.weight": state["norm.weight"], "norm.bias": state["norm.bias"]}
    assert formats.to_official(mixed, source="x")[0].keys() == mixed.keys()


# ---------------------------------------------------------------- names and order


@pytest.mark.parametrize("key", PAPER)
def test_order(key):
    """Published: our model's own. timm: timm's. Whatever the order in the file was."""
    state = weights(key)
    shuffled = dict(sorted(state.items()))
    assert list(shuffled) != list(state)
    with torch.device("meta"):
        theirs = timm.create_model(VARIANTS[key].timm).state_dict()
    assert list(formats.from_official(shuffled, "published", source="x")[0]) == list(state)
    assert list(formats.from_official(shuffled, "timm", source="x")[0]) == list(theirs) != list(state)


EXAMPLES = [  # published, mmsegmentation, mmpretrain: by the converters of those libraries
    ("patch_embeds.1.proj.weight", "patch_embeds.1.projection.weight", "backbone.patch_embeds.1.projection.weight"),
    ("patch_embeds.1.norm.bias", "patch_embeds.1.norm.bias", "backbone.patch_embeds.1.norm.bias"),
    ("pos_block.3.proj.0.weight", "position_encodings.3.proj.weight", "backbone.position_encodings.3.proj.weight"),
    ("blocks.0.0.attn.qkv.weight", "layers.0.0.attn.qkv.weight", "backbone.stages.0.0.attn.qkv.weight"),
    ("blocks.0.0.attn.proj.bias", "layers.0.0.attn.proj.bias", "backbone.stages.0.0.attn.proj.bias"),
    ("blocks.0.1.attn.q.weight", "layers.0.1.attn.attn.in_proj_weight", "backbone.stages.0.1.attn.q.weight"),
    ("blocks.0.1.attn.kv.bias", "layers.0.1.attn.attn.in_proj_bias", "backbone.stages.0.1.attn.kv.bias"),
    ("blocks.0.1.attn.proj.bias", "layers.0.1.attn.attn.out_proj.bias", "backbone.stages.0.1.attn.proj.bias"),
    ("blocks.0.1.attn.sr.weight", "layers.0.1.attn.sr.weight", "backbone.stages.0.1.attn.sr.weight"),
    ("blocks.0.1.attn.norm.weight", "layers.0.1.attn.norm.weight", "backbone.stages.0.1.attn.norm.weight"),
    ("blocks.2.10.norm2.weight", "layers.2.10.norm2.weight", "backbone.stages.2.10.norm2.weight"),
    ("blocks.2.10.mlp.fc1.weight", "layers.2.10.ffn.layers.0.0.weight", "backbone.stages.2.10.ffn.layers.0.0.weight"),
    ("blocks.2.10.mlp.fc2.bias", "layers.2.10.ffn.layers.1.bias", "backbone.stages.2.10.ffn.layers.1.bias"),
    ("norm.weight", "norm.weight", "backbone.norm_after_stage3.weight"),
    ("head.bias", None, "head.fc.bias"),
]


def test_names_in_other_libraries():
    state = weights("alt_gvt_base")
    mmseg, mmpretrain = (formats.from_official(state, fmt, source="x")[0] for fmt in ("mmseg", "mmpretrain"))
    for published, in_mmseg, in_mmpretrain in EXAMPLES:
        assert published in state and (in_mmseg is None or in_mmseg in mmseg)
        assert torch.equal(state[published], mmpretrain[in_mmpretrain])
        if in_mmseg and "in_proj" not in in_mmseg:
            assert torch.equal(state[published], mmseg[in_mmseg])
    gone = {name.split(".")[0] for name in (*mmseg, *mmpretrain)}
    assert gone == {"patch_embeds", "layers", "norm", "position_encodings", "backbone", "head"}
    assert len(mmpretrain) == len(state)
    gsa = sum(name.endswith(".kv.weight") for name in state)
    assert len(mmseg) == len(state) - 2 * gsa - 2


@pytest.mark.parametrize("key", ["pcpvt_small", "alt_gvt_small"])
def test_q_is_the_first_rows_and_kv_the_others(key):
    state = weights(key)
    mmseg, *_ = formats.from_official(state, "mmseg", source="x")
    back, *_ = formats.to_official(mmseg, source="x")
    for name in (name for name in mmseg if "in_proj" in name):
        block, kind = re.fullmatch(r"layers\.(\d+\.\d+)\.attn\.attn\.in_proj_(weight|bias)", name).groups()
        q, kv, fused = f"blocks.{block}.attn.q.{kind}", f"blocks.{block}.attn.kv.{kind}", mmseg[name]
        dim = len(fused) // 3
        assert torch.equal(fused[:dim], state[q]) and torch.equal(fused[dim:], state[kv])
        for part in (back[q], back[kv]):  # tensors of their own: a file of them holds no other's memory
            assert part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize("key", PAPER)
@pytest.mark.slow
def test_logits_in_timm(key):
    """Strictly loaded, in float64: the same numbers as in our model."""
    ours = golden_weights(gvt.Twins(VARIANTS[key], num_classes=10)).eval()
    theirs = timm.create_model(VARIANTS[key].timm, num_classes=10).double().eval()
    theirs.load_state_dict(formats.from_official(ours.state_dict(), "timm", source="x")[0], strict=True)
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert (ours(image) - theirs(image)).abs().max() < 1e-11


# ---------------------------------------------------------------- segmentors and detectors


def segmentor(backbone):
    others = [
        "decode_head.conv_seg.weight",
        "auxiliary_head.convs.0.bn.running_mean",
        "neck.fpn_convs.0.conv.bias",
        "data_preprocessor.mean",
    ]
    return {f"backbone.{name}": value for name, value in backbone.items()} | {
        name: torch.ones(2) for name in others
    }, others


@pytest.mark.parametrize("module", ["", "module."])
def test_the_backbone_of_a_published_segmentor(module):
    state = weights("alt_gvt_demo", norms=True)
    file, others = segmentor(state)
    back, found, left_out = formats.to_official({module + name: value for name, value in file.items()}, source="x")
    assert found == "dense" and left_out == others
    assert_same(back, state)
    assert formats.variant_of(back) == "alt_gvt_demo"


def test_the_backbone_of_a_segmentor_that_mmsegmentation_trained():
    """Its network has norms after each stage, and neither a final norm nor a classifier."""
    state = without(weights("alt_gvt_demo", norms=True), "head.", "norm.")
    theirs, left_out, notes = formats.from_official(state, "mmseg", source="x")
    assert left_out == notes == [] and "norm_list.3.bias" in theirs
    back, found, left_out = formats.to_official(segmentor(theirs)[0], source="x")
    assert found == "mmseg" and len(left_out) == 4
    assert_same(back, state)
    assert formats.variant_of(back) == "alt_gvt_demo"


def test_the_norms_after_stages_are_in_the_files_that_hold_them():
    state = weights("alt_gvt_small", norms=True)
    norms = [name for name in state if name.startswith("norm_list.")]
    for fmt in formats.FORMATS:
        theirs, left_out, _ = formats.from_official(state, fmt, source="x")
        assert [name for name in left_out if name not in HEAD] == (
            norms if fmt in ("timm", "hub", "mmpretrain") else []
        )
        assert ("norm_list.0.weight" in theirs) == (fmt in ("published", "safetensors", "mmseg"))
    assert list(formats.from_official(state, "published", source="x")[0])[-len(norms) :] == norms


# ---------------------------------------------------------------- nothing in silence


@pytest.mark.parametrize("fmt", ["published", "mmseg", "mmpretrain", "dense"])
def test_an_unknown_name_stays_and_is_reported(fmt):
    state = weights("alt_gvt_demo")
    theirs = segmentor(state)[0] if fmt == "dense" else formats.from_official(state, fmt, source="x")[0]
    back, found, left_out = formats.to_official(
        theirs | {"gamma.x": torch.ones(1), "layers.0.0.gamma": torch.ones(1)}, source="x"
    )
    assert {"gamma.x", "layers.0.0.gamma"} <= back.keys() and not {"gamma.x", "layers.0.0.gamma"} & set(left_out)
    with pytest.raises(
        UserError, match=r"\(x.pth\): alt_gvt_demo is nearest, with 2 unknown \(gamma.x, layers.0.0.gamma\)"
    ):
        formats.variant_of(back, source="x.pth")


def test_heads_without_a_backbone_are_not_left_out():
    back, _, left_out = formats.to_official({"decode_head.conv_seg.weight": torch.ones(1)}, source="x")
    assert list(back) == ["decode_head.conv_seg.weight"] and left_out == []


def test_two_tensors_for_one_weight():
    state = {"backbone.norm.weight": torch.ones(1), "norm.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"two tensors for one weight \(x.pth, norm.weight\)"):
        formats.to_official(state, source="x.pth")


@pytest.mark.parametrize("value", [torch.ones(4, 2), torch.tensor(1.0)])
def test_what_cannot_be_split_is_an_error_later(value):
    theirs, *_ = formats.from_official(weights("alt_gvt_demo"), "mmseg", source="x")
    back, *_ = formats.to_official(theirs | {"layers.0.1.attn.attn.in_proj_weight": value}, source="x")
    with pytest.raises(
        UserError, match=r"2 missing \(blocks.0.1.attn.q.weight, .* 1 unknown \(blocks.0.1.attn.attn.in_proj_weight\)"
    ):
        formats.variant_of(back)


def test_q_and_kv_of_two_types_are_not_joined():
    state = weights("alt_gvt_demo")
    state["blocks.0.1.attn.q.weight"] = state["blocks.0.1.attn.q.weight"].half()
    with pytest.raises(UserError, match="q and kv differ in type"):
        formats.from_official(state, "mmseg", source="x")


@pytest.mark.parametrize("fmt", formats.FORMATS)
def test_a_classifier_is_not_forgotten(fmt):
    state = weights("pcpvt_small")
    headless = without(state, "head.")
    if fmt != "mmseg":
        with pytest.raises(UserError, match=r"no classifier \(x.pth\): give --no-head"):
            formats.from_official(headless, fmt, source="x.pth")
    theirs, left_out, notes = formats.from_official(headless, fmt, source="x", no_head=True)
    assert left_out == [] and (fmt == "mmseg" or notes == ["no classifier in the source"])
    assert_same(formats.to_official(theirs, source="x")[0], headless)
    theirs, left_out, _ = formats.from_official(state, fmt, source="x", no_head=True)
    assert left_out == HEAD
    assert_same(formats.to_official(theirs, source="x")[0], headless)


def test_a_final_norm_is_not_forgotten():
    state = without(weights("pcpvt_small"), "head.", "norm.")
    with pytest.raises(UserError, match="no classifier and no final norm"):
        formats.from_official(state, "timm", source="x")
    assert formats.from_official(state, "timm", source="x", no_head=True)[2] == [
        "no classifier in the source",
        "no final norm in the source",
    ]
    with pytest.raises(UserError, match="no final norm .* timm"):
        formats.from_official(state, "hub", source="x", no_head=True)


def test_the_demos_model_has_a_hub_folder_too():
    state = weights("alt_gvt_demo")
    held, left_out, notes = formats.from_official(state, "hub", source="x.pth")
    assert held.keys() == state.keys() and not left_out and not notes


# ---------------------------------------------------------------- which model


@pytest.mark.parametrize(("num_classes", "in_chans"), [(1000, 1), (2, 5), (0, 3)])
def test_classes_and_channels_are_free(num_classes, in_chans):
    assert formats.variant_of(weights("alt_gvt_small", num_classes=num_classes, in_chans=in_chans)) == "alt_gvt_small"


def without_one(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: without_one(s, "norm.bias"), "1 missing (norm.bias)"),
        (lambda s: without_one(s, "head.bias"), "1 missing (head.bias)"),
        (lambda s: without_one(s, "blocks.0.1.attn.kv.bias"), "1 missing (blocks.0.1.attn.kv.bias)"),
        (lambda s: s | {"head.bias": torch.ones(8)}, "1 of another shape (head.bias)"),
        (lambda s: s | {"head.weight": torch.tensor(1.0)}, "2 of another shape (head.weight, head.bias)"),
        (
            lambda s: s | {"patch_embeds.0.proj.weight": torch.ones(3)},
            "1 of another shape (patch_embeds.0.proj.weight)",
        ),
        (lambda s: s | {"norm.bias": torch.ones(256, dtype=torch.int64)}, "1 of whole numbers (norm.bias)"),
        (
            lambda s: s | {"norm_list.0.bias": torch.ones(32)},
            "7 missing (norm_list.0.weight, norm_list.1.weight, norm_list.1.bias)",
        ),
    ],
)
def test_what_is_wrong_is_said(change, expected):
    with pytest.raises(UserError) as caught:
        formats.variant_of(change(weights("alt_gvt_demo")), source="x.pth")
    assert (
        str(caught.value)
        == f"these weights are no Twins (x.pth): alt_gvt_demo is nearest, with {expected}: is it the right file?"
    )


@pytest.mark.parametrize("state", [{}, {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(2)}])
def test_other_networks(state):
    with pytest.raises(UserError, match="are no Twins"):
        formats.variant_of(state)
