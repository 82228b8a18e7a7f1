"""The model: equal to the published numbers and to timm's models, at any size, in any way that it can be run."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import golden, golden_images, golden_weights, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import AttentionExtract
from torch import nn
from torch.profiler import ProfilerActivity, profile

import gvt
import gvt_ops
from gvt import MODEL_NAMES, VARIANTS
from gvt_ops import attention
from gvt_ops.window_attention import from_windows, to_windows

PARAMETERS = {
    "pcpvt_small_v0": (24_106_216, 304),
    "pcpvt_base_v0": (43_828_456, 520),
    "pcpvt_large_v0": (60_989_672, 754),
    "alt_gvt_small": (24_060_776, 290),
    "alt_gvt_base": (56_070_952, 384),
    "alt_gvt_large": (99_271_400, 384),
}
PAPER = list(PARAMETERS)
SMALL_SVT, DEMO = "alt_gvt_small", "alt_gvt_demo"
# The two small models in the everyday tests, the others in the slow ones.
ALL_SIZES = [pytest.param(name, marks=[] if "small" in name else pytest.mark.slow) for name in PAPER]


def build(name, **options):
    return timm.create_model(name, **options)


# ---------------------------------------------------------------- what was published


@pytest.mark.parametrize("name", PAPER)
def test_parameter_and_tensor_counts(name):
    with torch.device("meta"):
        model = build(name)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == PARAMETERS[name]


@pytest.mark.parametrize("name", PAPER)
def test_registration_order_is_the_published_one(name):
    """Optimizer states are indexed by it (facts of the published code, run)."""
    with torch.device("meta"):
        names = list(build(name).state_dict())
    svt = name.startswith("alt")
    parts = list(dict.fromkeys(key.split(".")[0] for key in names))
    assert parts == (
        ["patch_embeds", "norm", "head", "pos_block", "blocks"]
        if svt
        else ["patch_embeds", "blocks", "norm", "head", "pos_block"]
    )
    block = [
        key.removeprefix("blocks.0.1.").removesuffix(".weight")
        for key in names
        if key.startswith("blocks.0.1.") and "weight" in key
    ]
    attention = ["attn.q", "attn.kv", "attn.proj", "attn.sr", "attn.norm"]
    assert block == (
        ["norm1", "norm2", "mlp.fc1", "mlp.fc2", *attention]
        if svt
        else ["norm1", *attention, "norm2", "mlp.fc1", "mlp.fc2"]
    )
    assert "blocks.0.0.attn.qkv.weight" in names if svt else "blocks.0.0.attn.q.weight" in names
    assert "blocks.3.1.attn.sr.weight" not in names


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "large" in n else []) for n in golden("classification")]
)
def test_golden_logits(name):
    expected = golden("classification")[name]
    model = golden_weights(build(name)).eval()
    assert len(model.state_dict()) == expected["keys"]
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    with torch.inference_mode():
        logits = model(golden_images(2, 224, 224))
    assert relative(logits[:, :8], expected["first8"]) < 1e-9
    assert relative(logits.mean(), expected["mean"]) < 1e-9
    assert relative(logits.std(), expected["std"]) < 1e-9
    assert relative(logits.abs().max(), expected["absmax"]) < 1e-9
    assert logits.argmax(1).tolist() == expected["argmax"]


DENSE = golden("dense")
DENSE_CASES = [(key, size) for key, value in DENSE.items() for size in value["sizes"]]
DENSE_PADS = {"segmentation": "published", "segmentation, mask corrected": "mask", "detection": "zero"}


@pytest.mark.parametrize(
    ("key", "size"),
    [pytest.param(k, s, marks=pytest.mark.slow if "large" in k or "448" in s else []) for k, s in DENSE_CASES],
)
def test_golden_maps_of_the_published_dense_backbones(key, size):
    """Each way of padding, against the published segmentation and detection backbones (whose SVT norms each map)."""
    task, name = key.split("/")
    name = name if name.startswith("alt") or name.endswith("_v0") else f"{name}_v0"
    model = golden_weights(build(name, pad=DENSE_PADS[task])).eval()
    norms = [nn.Identity()] * 4
    if name.startswith("alt"):
        dims = VARIANTS[MODEL_NAMES[name]].dims
        norms = [golden_weights(nn.LayerNorm(dim, eps=1e-6), f"norm_list.{k}.") for k, dim in enumerate(dims)]
    with torch.inference_mode():
        maps = model.forward_maps(golden_images(1, *map(int, size.split("x"))), range(4), norms=norms)
    for x, expected in zip(maps, DENSE[key]["sizes"][size], strict=True):
        x = x.permute(0, 3, 1, 2)
        flat = x.flatten()
        assert list(x.shape) == expected["shape"]
        assert relative(flat[:4], expected["first4"]) < 1e-9
        assert relative(flat[-4:], expected["last4"]) < 1e-9
        probe = (flat * torch.cos(torch.arange(flat.numel(), dtype=torch.float64) * 0.31)).sum()
        for value, of in ((x.mean(), "mean"), (x.std(), "std"), (x.abs().mean(), "absmean"), (probe, "probe")):
            assert relative(value, expected[of]) < 1e-9


# ---------------------------------------------------------------- timm's models


LARGER = ((256, 320), "zero")  # in the everyday tests only where there is something to pad
SIZED = [*((name, (224, 224), "mask") for name in PAPER), *((name, *LARGER) for name in PAPER)]
EVERYDAY = {("pcpvt_small_v0", (224, 224), "mask"), ("alt_gvt_small", (224, 224), "mask"), ("alt_gvt_small", *LARGER)}


@pytest.mark.parametrize(
    ("name", "size", "pad"), [pytest.param(*case, marks=[] if case in EVERYDAY else pytest.mark.slow) for case in SIZED]
)
def test_logits_and_gradients_equal_timms(name, size, pad):
    torch.manual_seed(0)
    ours = build(name, num_classes=10, pad=pad).double().eval()
    theirs = build(VARIANTS[MODEL_NAMES[name]].timm, num_classes=10, img_size=size).double().eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    a, b = ours(images), theirs(images)
    assert (a - b).abs().max() < 1e-11
    a.square().sum().backward()
    b.square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[parameter_name].grad).abs().max() < 1e-11, parameter_name


def test_timms_own_names_are_timms():
    assert type(build("twins_svt_small")).__module__ == "timm.models.twins"


# ---------------------------------------------------------------- windows and padding


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(1, 5))
def test_windows_there_and_back(B, rows, columns, h, w, C):
    x = torch.arange(B * rows * h * columns * w * C).reshape(B, rows * h, columns * w, C)
    windows = to_windows(x, h, w)
    assert windows.shape == (B * rows * columns, h * w, C)
    assert torch.equal(windows[-1].reshape(h, w, C), x[-1, -h:, -w:])
    assert torch.equal(from_windows(windows, h, w, rows * h, columns * w), x)


def window_by_window(lsa, x, keys):
    """LSA spelled out: every window by itself, softmax over the tokens that keys says. keys: "real", or "all" with zero
    padding.
    """
    side, heads = lsa.window, lsa.heads
    B, H, W, C = x.shape
    out = torch.zeros_like(x)
    padded = F.pad(x, (0, 0, 0, -W % side, 0, -H % side))
    for top in range(0, H, side):
        for left in range(0, W, side):
            real = x[:, top : top + side, left : left + side]
            h, w = real.shape[1:3]
            seen = real if keys == "real" else padded[:, top : top + side, left : left + side]
            q, _, _ = lsa.qkv(real).reshape(B, h * w, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
            _, k, v = lsa.qkv(seen).flatten(1, 2).reshape(B, -1, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) / (C // heads) ** 0.5).softmax(-1)
            out[:, top : top + side, left : left + side] = lsa.proj((weights @ v).transpose(1, 2).reshape(B, h, w, C))
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 17), st.integers(1, 17), st.sampled_from(gvt.PADS), st.booleans())
def test_lsa_equals_attention_window_by_window(H, W, pad, fused):
    torch.manual_seed(H * 100 + W)
    lsa = gvt.LocalAttention(8, 2, window=7, pad=pad).double().eval()
    lsa.fused_attn = fused
    x = torch.randn(2, H, W, 8, dtype=torch.float64)
    one_side = (H % 7 == 0) != (W % 7 == 0)
    keys = "real" if pad == "mask" or (pad == "published" and not one_side) else "all"
    assert (lsa(x) - window_by_window(lsa, x, keys)).abs().max() < 1e-12


def test_the_published_mask_fails_where_one_side_needs_padding():
    x = torch.randn(1, 14, 16, 8, dtype=torch.float64)
    lsa = gvt.LocalAttention(8, 2, window=7, pad="published").double()
    published, zero, mask = (out for lsa.pad in ("published", "zero", "mask") for out in [lsa(x)])
    assert torch.equal(published, zero) and (published - mask).abs().max() > 1e-3


@pytest.mark.parametrize("pad", gvt.PADS)
def test_without_padding_the_bits_are_those_of_plain_windows(pad):
    torch.manual_seed(0)
    lsa = gvt.LocalAttention(8, 2, window=7, pad=pad)
    x = torch.randn(2, 14, 21, 8)
    q, k, v = lsa.qkv(to_windows(x, 7, 7)).reshape(-1, 49, 3, 2, 4).permute(2, 0, 3, 1, 4)
    plain = from_windows(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), 7, 7, 14, 21)
    assert torch.equal(lsa(x), lsa.proj(plain))


def test_an_unknown_way_of_padding_is_refused():
    with pytest.raises(ValueError, match="pad='reflect' is none of mask, zero, published"):
        build(DEMO, pad="reflect")


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (224, 100), (65, 257)])
@pytest.mark.parametrize("name", [DEMO, "pcpvt_small_v0"])
def test_any_size_from_32(name, size):
    model = build(name, num_classes=3).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 3, *size)).isfinite().all()


def test_a_smaller_picture_is_refused():
    with pytest.raises(ValueError, match="31 x 64 pixels: Twins needs at least 32 x 32"):
        build(DEMO)(torch.randn(1, 3, 31, 64))


# ---------------------------------------------------------------- ways to run it


@pytest.mark.parametrize("name", [DEMO, "pcpvt_small_v0"])
def test_fused_and_unfused_agree(name):
    model = golden_weights(build(name, num_classes=10)).eval()
    x = golden_images(2, 72, 104)
    with torch.inference_mode():
        fused = model(x)
        model.set_fused_attn(False)
        assert (fused - model(x)).abs().max() < 1e-12


def test_tensors_reach_the_fused_kernel():
    """One call for each block, in the layout that the fused kernel takes."""
    model = build(DEMO).eval()
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
        model(torch.randn(1, 3, 224, 224))
    calls = {event.key: event.count for event in trace.key_averages()}
    assert calls.get("aten::_scaled_dot_product_flash_attention_for_cpu") == sum(VARIANTS[DEMO].depths)


@pytest.mark.parametrize("pad", ["mask", "zero"])
def test_more_windows_than_a_cuda_grid_are_taken_in_parts(pad, monkeypatch):
    model, x = build(DEMO, pad=pad).double().eval(), torch.randn(3, 3, 72, 104, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(x)
        monkeypatch.setattr(attention, "max_batch", lambda q, k, accelerated: 4)
        assert torch.allclose(model(x), expected, rtol=1e-12)


def test_attention_maps():
    """timm's extractor sees each block's map: rows sum to one, and nothing falls on padding."""
    model = build(DEMO).eval()
    model.set_fused_attn(False)
    maps = AttentionExtract(model, method="hook", names=["blocks.*.*.attn.attn_drop"])(torch.randn(1, 3, 256, 256))
    assert len(maps) == sum(VARIANTS[DEMO].depths)
    for seen in maps.values():
        assert (seen.sum(-1) - 1).abs().max() < 1e-5
    first = maps[
        "blocks.0.0.attn.attn_drop"
    ]  # 64 x 64 tokens: ten windows a side, the last with 64 - 63 = 1 real row or column
    assert first.shape == (100, 1, 49, 49)
    corner = first[-1, 0].reshape(7, 7, 7, 7)  # the window in the corner has one real token
    assert torch.allclose(corner[0, 0, 0, 0], torch.ones(())) and corner[0, 0].sum() == corner[0, 0, 0, 0]


@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), (72, 104)])
@pytest.mark.parametrize("name", [DEMO, pytest.param("pcpvt_small_v0", marks=pytest.mark.slow)])
def test_no_graph_break_under_compile(name, size):
    model = build(name, num_classes=5).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_inductor_gives_the_same_logits_and_gradients():
    model = build(DEMO, num_classes=5)
    compiled, x = gvt_ops.compile(copy.deepcopy(model)), torch.randn(2, 3, 72, 104)
    a, b = model(x), compiled(x)
    assert torch.allclose(a, b, atol=1e-4)
    a.square().sum().backward()
    b.square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), compiled.parameters()):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3), name


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_export(fused):
    model = build(DEMO, num_classes=5).eval()
    model.set_fused_attn(fused)
    x = torch.randn(2, 3, 72, 104)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    with torch.no_grad():
        three = torch.cat([x, x[:1]])
        assert torch.allclose(program.module()(three), model(three), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", [DEMO, "pcpvt_small_v0"])
@pytest.mark.parametrize("fused", [True, False])
def test_precisions(name, dtype, fused):
    """Padded and masked windows too; half precision within its own rounding of float32."""
    torch.manual_seed(0)
    model = build(name, num_classes=5).eval()
    model.set_fused_attn(fused)
    x = torch.randn(2, 3, 72, 104)
    with torch.inference_mode():
        expected = model(x)
        logits = model.to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < (1e-5 if dtype == torch.float64 else 0.05) * expected.abs().max()


@pytest.mark.parametrize("part", ["block", "mlp"])
@pytest.mark.parametrize("name", [DEMO, "pcpvt_small_v0"])
def test_gradient_checkpointing_gives_equal_gradients(name, part):
    """With dropout and drop path on: the recomputation draws the same random numbers. In training alone, and until it
    is turned off.
    """
    model = build(name, num_classes=5, drop_path_rate=0.3, drop_rate=0.1)
    again = copy.deepcopy(model)
    again.set_grad_checkpointing(part=part)
    calls = []
    again.blocks[0][0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 64, 64)
    for m in (model, again):
        torch.manual_seed(0)
        m(x).square().sum().backward()
    assert len(calls) == 2
    for (key, p), q in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(p.grad, q.grad), key
    again.eval()(x).sum().backward()
    again.train().set_grad_checkpointing(False)
    again(x).sum().backward()
    assert len(calls) == 4
    with pytest.raises(ValueError, match="is none of block, mlp"):
        again.set_grad_checkpointing(part="head")


@pytest.mark.parametrize("name", [DEMO, *ALL_SIZES])
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = build(name, num_classes=3)
    F.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([0, 2])).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Otherwise DistributedDataParallel copies it, and warns.
    assert not [key for key, p in model.named_parameters() if p.grad.stride() != p.stride()]


@pytest.mark.parametrize("name", [DEMO, "pcpvt_small_v0"])
def test_no_pictures(name):
    model = build(name, num_classes=3)
    logits = model(torch.zeros(0, 3, 40, 72))
    logits.sum().backward()
    assert logits.shape == (0, 3)


def test_drop_path_rates_grow_linearly():
    model = build("pcpvt_small_v0", drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.blocks for block in stage]
    assert rates == pytest.approx([0.3 * i / 15 for i in range(16)])
    assert isinstance(model.blocks[0][0].drop_path, nn.Identity)


# ---------------------------------------------------------------- initial weights


@pytest.mark.parametrize("name", ALL_SIZES)
def test_initial_moments(name):
    """Linear N(0, 0.02^2), convolution N(0, 2 / fan_out), bias 0, norm 1 and 0 (published _init_weights)."""
    torch.manual_seed(0)
    for key, module in build(name).named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.weight.eq(1).all() and module.bias.eq(0).all(), key
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            std = 0.02
            if isinstance(module, nn.Conv2d):
                kernel = module.kernel_size[0] * module.kernel_size[1]
                std = (2 / (kernel * module.out_channels / module.groups)) ** 0.5
            n = module.weight.numel()
            assert module.weight.mean().abs() < 5 * std / n**0.5, key
            assert abs(module.weight.std() / std - 1) < 5 / (2 * n) ** 0.5, key
            assert (module.weight.pow(4).mean() / std**4 - 3).abs() < 5 * (96 / n) ** 0.5, (
                key
            )  # a normal's fourth moment
            assert module.bias.eq(0).all(), key


@pytest.mark.parametrize("name", ALL_SIZES)
def test_a_fresh_models_loss_for_a_uniform_target(name):
    torch.manual_seed(0)
    with torch.inference_mode():
        logits = build(name).eval()(torch.randn(4, 3, 224, 224))
    loss = (logits.logsumexp(1) - logits.mean(1)).mean().item()
    assert 6.908 <= round(loss, 3) <= 6.930


# ---------------------------------------------------------------- timm's interface


def test_features_only_as_timm_users_know_it():
    torch.manual_seed(0)
    model = build(DEMO).eval()
    features = build(DEMO, features_only=True, out_indices=(1, 3)).eval()
    features.model.load_state_dict(
        model.state_dict(), strict=False
    )  # all but the final norm and head, which it does not have
    assert features.feature_info.channels() == [64, 256] and features.feature_info.reduction() == [8, 32]
    assert features.feature_info.module_name() == ["blocks.1", "blocks.3"]
    x = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        maps = features(x)
        last, all_maps = model.forward_intermediates(x)
        assert [m.shape for m in maps] == [(2, 64, 12, 8), (2, 256, 3, 2)]
        assert torch.equal(maps[0], all_maps[1]) and torch.equal(maps[1], all_maps[3])
        assert torch.equal(last, model.forward_features(x)) and last.shape == (2, 6, 256)
        assert torch.equal(model.forward_head(last), model(x))
        assert torch.equal(model.forward_head(last, pre_logits=True), last.mean(1))


def test_forward_intermediates_equals_timms():
    ours, theirs = build(SMALL_SVT, num_classes=0).eval(), build("twins_svt_small", num_classes=0, img_size=64).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        for options in (
            dict(indices=2, norm=True),
            dict(indices=[0, -2]),
            dict(indices=[1], stop_early=True, intermediates_only=True),
        ):
            a, b = ours.forward_intermediates(x, **options), theirs.forward_intermediates(x, **options)
            if not options.get("intermediates_only"):
                assert torch.allclose(a[0], b[0], atol=1e-4)
                a, b = a[1], b[1]
            assert len(a) == len(b) and all(torch.allclose(m, n, atol=1e-4) for m, n in zip(a, b))
        nhwc = ours.forward_intermediates(x, [2], output_fmt="NHWC", intermediates_only=True)[0]
        assert nhwc.shape == (1, 14, 14, 256)


def test_bad_indices_and_formats_are_refused():
    model, x = build(DEMO), torch.randn(1, 3, 32, 32)
    for bad in ([4], [-5], 0, []):
        with pytest.raises(ValueError, match="expected stages 0 to 3"):
            model.forward_intermediates(x, bad)
    with pytest.raises(ValueError, match="NCHW, NHWC"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruning_keeps_what_is_asked_for():
    model = build(DEMO).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        whole = model.forward_intermediates(x, [1], intermediates_only=True)
        assert model.prune_intermediate_layers([1]) == [1]
        assert len(model.blocks) == 2 and isinstance(model.head, nn.Identity) and isinstance(model.norm, nn.Identity)
        assert torch.equal(model.forward_intermediates(x, [1], intermediates_only=True)[0], whole[0])
        assert model(x).shape == (1, 64, 64)  # tokens of the last stage that is left


def test_classifier_can_be_replaced():
    model = build(DEMO, drop_path_rate=0.1).to(torch.bfloat16).eval()
    assert model.get_classifier() is model.head and model.head.out_features == 1000
    model.reset_classifier(7)
    assert model.head.weight.dtype == torch.bfloat16 and not model.head.training and model.num_classes == 7
    x = torch.randn(2, 3, 32, 64, dtype=torch.bfloat16)
    assert model(x).shape == (2, 7)
    model.reset_classifier(7, global_pool="")
    assert model(x).shape == (2, 2, 7)
    model.reset_classifier(0, global_pool="avg")
    assert model(x).shape == (2, 256)


def test_weight_decay_groups_and_layer_groups():
    model = build(SMALL_SVT)
    assert model.no_weight_decay() == {f"pos_block.{k}.proj.0.{w}" for k in range(4) for w in ("weight", "bias")}
    theirs = build("twins_svt_small")
    group = timm.models.group_parameters
    for coarse in (False, True):
        ours = group(model, model.group_matcher(coarse), reverse=True)
        assert ours == group(theirs, theirs.group_matcher(coarse), reverse=True)


def test_default_cfg():
    cfg = build(SMALL_SVT).default_cfg
    assert (
        cfg["hf_hub_id"] == "timm/twins_svt_small.in1k"
        and cfg["crop_pct"] == 0.875
        and cfg["interpolation"] == "bicubic"
    )
    assert cfg["classifier"] == "head" and cfg["first_conv"] == "patch_embeds.0.proj" and not cfg["fixed_input_size"]
    assert "hf_hub_id" not in build(DEMO).default_cfg or not build(DEMO).default_cfg["hf_hub_id"]


def test_pretrained_takes_timms_weights(tmp_path):
    """The hub's file, as if it had been downloaded: strict, and with another head."""
    source = build("twins_svt_small")
    file = tmp_path / "twins_svt_small.pth"
    torch.save(source.state_dict(), file)
    model = build(SMALL_SVT, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    other = build(SMALL_SVT, pretrained=True, num_classes=5, pretrained_cfg_overlay=dict(file=str(file)))
    assert torch.equal(other.norm.weight, source.norm.weight) and other.head.out_features == 5


def test_pretrained_without_a_network_is_one_line(caplog):
    with pytest.raises(
        RuntimeError, match="no weights from https://huggingface.co/timm/twins_svt_small.in1k"
    ) as caught:
        build(SMALL_SVT, pretrained=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [dict(depht=4), dict(patch_size=4), dict(qkv_bias=True)])
def test_an_unknown_argument_is_refused(wrong):
    with pytest.raises(TypeError, match=next(iter(wrong))):
        build(DEMO, **wrong)


@pytest.mark.parametrize("img_size", [64, (224, 256)])
def test_the_size_of_images_is_accepted_and_without_effect(img_size):
    """timm's own Twins takes it; ours takes images of any size."""
    model = build(DEMO, img_size=img_size, num_classes=3)
    assert model(torch.zeros(1, 3, 40, 72)).shape == (1, 3)
