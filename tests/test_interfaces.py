"""The model as other libraries see it: timm's own model tests, torch.fx, counters, quantization, adapters, hooks."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import gvt

PAPER = [name for name in gvt.MODEL_NAMES if name != "alt_gvt_demo"]
# The two small models in the everyday tests, the others in the slow ones.
ALL_SIZES = [pytest.param(name, marks=[] if "small" in name else pytest.mark.slow) for name in PAPER]
SMALL = ["alt_gvt_demo", pytest.param("pcpvt_small_v0", marks=pytest.mark.slow)]


def build(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def images(batch=1, height=64, width=64, dtype=torch.float32):
    return torch.sin(torch.arange(batch * 3 * height * width, dtype=dtype)).reshape(batch, 3, height, width)


# ---------------------------------------------------------------- what timm asks of its models


@pytest.mark.parametrize("name", ALL_SIZES)
def test_forward_and_features(name):
    model, x = build(name), images(2)
    with torch.inference_mode():
        logits, tokens = model(x), model.forward_features(x)
        assert logits.shape == (2, 1000) and logits.isfinite().all()
        assert tokens.shape == (2, 4, model.num_features) and tokens.isfinite().all()
        assert torch.equal(model.forward_head(tokens), logits)
        pooled = model.forward_head(tokens, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size) and torch.equal(model.get_classifier()(pooled), logits)


@pytest.mark.parametrize("name", ALL_SIZES)
def test_backward(name):
    model = build(name, num_classes=42).train()
    logits = model(images(2))
    logits.mean().backward()
    assert logits.shape == (2, 42) and logits.isfinite().all()
    lacking = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not lacking and all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ALL_SIZES)
def test_default_cfg(name):
    model = build(name)
    cfg, state, x = model.default_cfg, model.state_dict(), images()
    assert cfg["architecture"] == name and cfg["num_classes"] == 1000 and cfg["pool_size"] is None
    assert cfg["input_size"] == (3, 224, 224) and not cfg["fixed_input_size"]
    assert f"{cfg['classifier']}.weight" in state and f"{cfg['first_conv']}.weight" in state
    assert len(cfg["mean"]) == len(cfg["std"]) == 3 and cfg["interpolation"] and 0 < cfg["crop_pct"] <= 1
    with torch.inference_mode():
        for classes, pool, shape in ((0, "avg", (1, model.num_features)), (0, "", (1, 4, model.num_features))):
            model.reset_classifier(classes, pool)
            assert model(x).shape == model.forward_head(model.forward_features(x)).shape == shape
            assert build(name, num_classes=classes, global_pool=pool)(x).shape == shape
        model.reset_classifier(7, "avg")
        assert model(x).shape == (1, 7) and model.num_classes == 7


@pytest.mark.parametrize("name", ALL_SIZES)
@pytest.mark.parametrize("feature_cls", ["getter", "fx", "hook"])
def test_features_only_gives_the_same_maps_whatever_collects_them(name, feature_cls):
    model = build(name)
    features = build(name, features_only=True, feature_cls=feature_cls)
    x, info = images(1, 70, 96), features.feature_info
    with torch.inference_mode():
        found, expected = features(x), model.forward_intermediates(x, intermediates_only=True)
    assert features.output_fmt.value == "NCHW" and list(info.out_indices) == [0, 1, 2, 3]
    assert len(found) == len(expected) == 4
    for each, truth, channels, reduction in zip(found, expected, info.channels(), info.reduction()):
        assert torch.equal(each, truth) and each.shape == (1, channels, 70 // reduction, 96 // reduction)


@pytest.mark.parametrize("feature_cls", ["getter", "fx", "hook"])
@pytest.mark.parametrize("indices", [(1, 3), (-3, -1), 2, (0,)])
def test_features_only_of_chosen_stages(indices, feature_cls):
    model = build("alt_gvt_demo")
    features = build("alt_gvt_demo", features_only=True, feature_cls=feature_cls, out_indices=indices)
    with torch.inference_mode():
        expected = model.forward_intermediates(images(), indices, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(features(images()), expected, strict=True))


@pytest.mark.parametrize("name", ALL_SIZES)
def test_forward_intermediates(name):
    model, x = build(name), images(2)
    with torch.inference_mode():
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, model.forward_features(x)) and len(maps) == len(model.feature_info) == 4
        for each, info in zip(maps, model.feature_info):
            assert each.shape == (2, info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])
        nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        assert all(torch.equal(a.permute(0, 3, 1, 2), b) for a, b in zip(nhwc, maps, strict=True))
        early = model.forward_intermediates(x, [0, 1], stop_early=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(early, maps[:2], strict=True))
        model.prune_intermediate_layers([1], prune_norm=True)
        assert torch.equal(model.forward_intermediates(x, [1], intermediates_only=True)[0], maps[1])


# ---------------------------------------------------------------- torch.fx, torchvision, torch.jit.trace


def logits_and_gradients(model, x):
    torch.manual_seed(1)
    model.zero_grad()
    logits = model(x)
    logits.square().sum().backward()
    return {"logits": logits.detach()} | {key: parameter.grad for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [64, 70])  # at 70 pixels windows have padding
@pytest.mark.parametrize("name", SMALL)
def test_symbolic_trace(name, size, fused, train):
    """Traced once for all sizes; dropout and drop path draw the same numbers."""
    model = build(name, num_classes=5, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2).double().train(train)
    model.set_fused_attn(fused)
    x, traced = images(2, size, size, torch.float64), torch.fx.symbolic_trace(model)
    found, expected = logits_and_gradients(traced, x), logits_and_gradients(model, x)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match="31 x 64 pixels: Twins needs at least 32 x 32"):
        traced(images(1, 31, 64, torch.float64))


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing:UserWarning")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [64, 70])
@pytest.mark.parametrize("name", SMALL)
def test_torchvisions_feature_extractor(name, size, fused):
    model = build(name, num_classes=5).double()
    model.set_fused_attn(fused)
    x = images(1, size, size, torch.float64)
    train_nodes, eval_nodes = get_graph_node_names(model)
    wanted = ["patch_embeds.0.norm", "blocks.1", "blocks.3.0.mlp.act", "head"]
    assert all(any(node.startswith(name) for node in nodes) for name in wanted for nodes in (train_nodes, eval_nodes))
    extract = create_feature_extractor(model, wanted).eval()
    found, seen = extract(x), {}
    for name in wanted:
        model.get_submodule(name).register_forward_hook(lambda *given, name=name: seen.update({name: given[-1]}))
    model(x)
    assert all(torch.equal(found[name], seen[name]) for name in wanted)
    found["head"].square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in extract.named_parameters()}
    expected = logits_and_gradients(model, x)
    assert all(torch.equal(gradients[key], expected[key]) for key, _ in model.named_parameters())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("name", SMALL)
def test_jit_trace(name):
    model, x = build(name), images(1, 70, 72)
    with torch.no_grad():
        assert torch.allclose(torch.jit.trace(model, x)(x.flip(0)), model(x.flip(0)), atol=1e-6)


# ---------------------------------------------------------------- counters, quantization, adapters, hooks

GMACS = (2.82e9, 2.93e9)  # without and with the products of attention


def test_thop_counts_every_layer():
    thop = pytest.importorskip("thop")
    macs, params = thop.profile(build("alt_gvt_small"), (images(1, 224, 224),), verbose=False)
    assert GMACS[0] <= macs <= GMACS[1] and params == 24_060_776


@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops_counts_every_layer(backend):
    ptflops = pytest.importorskip("ptflops")
    options = dict(as_strings=False, print_per_layer_stat=False, backend=backend)
    macs, params = ptflops.get_model_complexity_info(build("alt_gvt_small"), (3, 224, 224), **options)
    assert GMACS[0] <= macs <= GMACS[1] and params == 24_060_776


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
def test_dynamic_quantization_finds_every_linear_layer(name):
    model, x = build(name), images()
    layers = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert all(type(model.get_submodule(key)) is nn.Linear for key in layers)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    found = {key for key, each in small.named_modules() if isinstance(each, torch.ao.nn.quantized.dynamic.Linear)}
    assert found == layers and len(layers) == {"alt_gvt_small": 82, "pcpvt_small_v0": 81}[name]
    with torch.inference_mode():
        assert F.cosine_similarity(small(x), model(x)).item() > 0.99


def test_lora_adapts_every_linear_layer_it_is_told_of():
    peft = pytest.importorskip("peft")
    model, x = build("alt_gvt_demo", num_classes=5), images(2)
    expected, layers = model(x), r".*\.(attn\.(qkv|q|kv|proj)|mlp\.(fc1|fc2))"
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=layers))
    targets = [module for module in adapted.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(targets) == 36 and all(type(module.base_layer) is nn.Linear for module in targets)
    assert torch.allclose(adapted(x), expected, atol=1e-5)  # an adapter starts at zero
    adapted(x).square().sum().backward()
    assert all(module.lora_B["default"].weight.grad.any() for module in targets)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["alt_gvt_demo", "pcpvt_small_v0"])
def test_forward_hooks_fire_on_every_module(name, fused):
    """But containers, which nobody calls, and the dropout inside fused attention."""
    model, seen = build(name, num_classes=5), set()
    model.set_fused_attn(fused)
    for key, module in model.named_modules():
        module.register_forward_hook(lambda *_, key=key: seen.add(key))
    with torch.inference_mode():
        model(images())
    silent = {key: module for key, module in model.named_modules() if key not in seen}
    for key, module in silent.items():
        container = type(module) is nn.ModuleList
        assert container or isinstance(module, nn.Identity) or (fused and key.endswith("attn.attn_drop")), key


def test_nothing_warns():
    """What a plain user calls first."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("alt_gvt_demo", num_classes=5)(images()).sum().backward()
