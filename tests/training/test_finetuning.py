"""Fine-tuning: other sizes and channels, frozen parts, and a learning rate for each part, each for what it does."""

import copy
import json

import gvt

# isort: split
import pytest
import timm
import torch
from conftest import SMALL_RUN, log_lines
from PIL import Image, ImageDraw
from runs import here, parse, same, small, stop_at, weights
from timm.optim import param_groups_layer_decay

import datasets
from tools import trained as tools_trained
from training import checkpoint, resume
from training.network import build_model, build_networks
from training.optimizer import build_optimizer, build_schedule, freeze_parts, train_mode

CPU = torch.device("cpu")


# ---------------------------------------------------------------- learning rates


def groups_of(optimizer):
    return [
        (group["lr_scale"], group["weight_decay"], list(map(id, group["params"]))) for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("name", ["alt_gvt_demo", "pcpvt_small_v0"])
def test_layer_decay_gives_timms_table_of_rates(name, capsys):
    args = parse("--model", name, "--layer-decay", 0.7, "--device", "cpu")
    model = build_model(args, 4)
    optimizer = build_optimizer(args, model, 1e-3)
    exempt = model.no_weight_decay()
    theirs = param_groups_layer_decay(model, 0.05, layer_decay=0.7, no_weight_decay_list=exempt)
    assert groups_of(optimizer) == [(g["lr_scale"], g["weight_decay"], list(map(id, g["params"]))) for g in theirs]
    depth = sum(map(len, model.blocks))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lr x ")]
    assert (
        len(lines) == depth + 2 and lines[-1] == "lr x 1: head.weight, norm.bias, norm.weight, head.bias" or lines[-1]
    )
    assert lines[-1].startswith("lr x 1: head.") and lines[-2].startswith("lr x 0.7: blocks.3.")
    assert lines[0].startswith(f"lr x {0.7 ** (depth + 1):.6g}: patch_embeds.0")


@pytest.mark.parametrize("warmup", [0, 5])
def test_the_first_rates_are_scaled_once(warmup):
    args = parse("--model", "alt_gvt_demo", "--layer-decay", 0.5, "--warmup-epochs", warmup)
    optimizer = build_optimizer(args, build_model(args, 4), 1e-3)
    build_schedule(args, optimizer)
    first = 1e-3 if warmup == 0 else args.warmup_lr
    assert [g["lr"] for g in optimizer.param_groups] == [first * g["lr_scale"] for g in optimizer.param_groups]


def test_the_heads_rate_is_times_layer_decay():
    args = parse("--model", "alt_gvt_demo", "--head-lr-scale", 10)
    model = build_model(args, 4)

    def rates(*words):
        optimizer = build_optimizer(parse("--model", "alt_gvt_demo", *words), model, 1e-3)
        groups = [(p, g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
        names = {parameter: name for name, parameter in model.named_parameters()}
        assert len(groups) == len(names)
        return {names[parameter]: (scale, decay) for parameter, scale, decay in groups}

    alone, both = rates("--head-lr-scale", 10), rates("--head-lr-scale", 10, "--layer-decay", 0.5)
    assert alone["head.weight"] == (10, 0.05) and alone["head.bias"] == (10, 0.0) and alone["norm.weight"] == (1, 0.0)
    assert (
        both["head.weight"] == (10, 0.05)
        and both["norm.weight"] == (0.5, 0.0)
        and both["blocks.3.1.norm1.weight"][0] == 0.5
    )


@pytest.mark.parametrize("words", [["--layer-decay", 0.7], ["--head-lr-scale", 5], ["--freeze", "stages:2"]])
@pytest.mark.slow
@pytest.mark.parametrize("at", [(0, 2), (1, 3)])
def test_resume_ends_with_the_same_bits(words, at, toy, tmp_path):
    """Stopped inside the first epoch, whose rates are not the schedule's alone, and inside the second."""
    assert here(*small(toy, tmp_path / "a", *words)) == 0
    assert here(*small(toy, tmp_path / "b", *words), on_poll=stop_at(*at)) == 143
    assert here(*small(toy, tmp_path / "b", *words, "--resume", "auto")) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    rates = [[line["train_lr"] for line in log_lines(tmp_path / name)] for name in "ab"]
    assert rates[0] == rates[1]
    assert here(*small(toy, tmp_path / "b", "--resume", "auto")) == 2  # without them, another run


def test_a_run_from_before_these_options_is_not_continued_with_one(toy, tmp_path, capsys):
    assert here(*small(toy, tmp_path, "--epochs", 1)) == 0
    stored = checkpoint.load(str(tmp_path / "checkpoint.pth"))
    assert not {"layer_decay", "freeze", "in_chans"} & (stored["recipe"].keys() | stored["args"].keys())
    assert here(*small(toy, tmp_path, "--epochs", 1, "--resume", "auto", "--layer-decay", 0.7)) == 2
    assert "layer_decay None -> 0.7" in capsys.readouterr().err
    changed = resume.changes({"layer_decay": 0.7}, {})
    assert changed == ["layer_decay 0.7 -> None"]


# ---------------------------------------------------------------- frozen parts


@pytest.mark.parametrize(
    ("part", "trained"),
    [("backbone", ("head.",)), ("stages:1", None), ("stages:4", ("head.", "norm."))],
)
def test_frozen_parts_have_no_gradient_no_state_and_no_drop_path(part, trained):
    args = parse("--model", "alt_gvt_demo", "--freeze", part, "--drop-path", 0.5, "--drop", 0.2)
    model = build_model(args, 4)
    freeze_parts(args, model)
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained is None:
        lists = ("patch_embeds.0.", "blocks.0.", "pos_block.0.")
        assert free == {name for name, _ in model.named_parameters() if not name.startswith(lists)}
    else:
        assert free == {name for name, _ in model.named_parameters() if name.startswith(trained)}
    optimizer = build_optimizer(args, model, 1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(free)
    train_mode(args, model)(model)
    assert model.training and not model.blocks[0][1].drop_path.training and not model.pos_drops[0].training
    assert model.blocks[3][1].drop_path.training == (part == "stages:1") and model.head.training
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved <= free and "head.weight" in moved  # drop path may skip a block
    assert len(optimizer.state) == len(free)


def test_a_frozen_backbone_stays_as_it_was_in_a_run(toy, tmp_path, capsys):
    assert here(*small(toy, tmp_path / "a", "--epochs", 1)) == 0
    source = tmp_path / "a" / "checkpoint.pth"
    assert here(*small(toy, tmp_path / "b", "--finetune", source, "--freeze", "backbone")) == 0
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert {name for name in a if not torch.equal(a[name], b[name])} == {"head.weight", "head.bias"}
    assert "frozen (--freeze backbone): 2479040 of 2480068 parameters" in capsys.readouterr().out
    assert log_lines(tmp_path / "b")[0]["n_parameters"] == 1028


def test_only_a_twins_has_stages(toy, tmp_path, capsys):
    assert here(*small(toy, tmp_path / "a", "--model", "resnet18", "--freeze", "stages:1")) == 2
    assert "only models of gvt.py have such stages (--freeze stages:1, --model resnet18)" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- weights


def test_pretrained_takes_timms_weights_and_a_new_head(monkeypatch, capsys):
    """The hub is not asked: timm reads the same weights from a file."""
    args, asked = parse("--model", "alt_gvt_small", "--pretrained"), []
    source = timm.create_model("alt_gvt_small", num_classes=1000)

    def load(model, *_, **__):
        asked.append(model.pretrained_cfg["hf_hub_id"])
        state = {name: value for name, value in source.state_dict().items() if not name.startswith("head.")}
        model.load_state_dict(state, strict=False)

    monkeypatch.setattr("timm.models._builder.load_pretrained", load)
    model, *_ = build_networks(args, ["a", "b"], CPU)
    assert asked == ["timm/twins_svt_small.in1k"] and model.head.weight.shape == (2, 512)
    assert torch.equal(model.blocks[0][0].attn.qkv.weight, source.blocks[0][0].attn.qkv.weight)


@pytest.mark.parametrize("model", ["alt_gvt_small", "alt_gvt_demo", "resnet18"])
def test_pretrained_without_a_network_is_one_line(model, toy, tmp_path, capsys):
    assert here(*small(toy, tmp_path / "a", "--model", model, "--pretrained")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("main.py: error: no weights (--pretrained: ") and error.endswith("as --finetune FILE")
    assert not (tmp_path / "a").exists()


def test_two_sources_of_weights_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--pretrained", "--finetune", "x.pth")
    assert "two sources of weights (--pretrained, --finetune x.pth): omit one" in capsys.readouterr().err


# ---------------------------------------------------------------- size, channels, normalization


def test_a_square_is_stored_as_one_number():
    assert parse("--input-size", 48).input_size == parse("--input-size", 48, 48).input_size == 48
    assert parse("--input-size", 64, 96).input_size == (64, 96) and parse("--input-size", 64, 96).sides == (64, 96)
    with pytest.raises(SystemExit):
        parse("--input-size", 1, 2, 3)


def test_wide_images_are_covered_and_cropped_in_their_ratio():
    """A point of the middle of each side stays there; nothing is squeezed."""
    image = Image.new("RGB", (300, 200))
    ImageDraw.Draw(image).ellipse((110, 60, 190, 140), fill="white")
    plain = datasets.build_transform(False, parse("--input-size", 64, 96, "--mean", 0, 0, 0, "--std", 1, 1, 1))
    seen = plain(image)[0] > 0.5
    assert seen.shape == (64, 96)
    height, width = seen.any(1).sum().item(), seen.any(0).sum().item()
    assert abs(height - width) <= 1 and height == pytest.approx(80 * 64 / 0.875 / 200, abs=1.5)
    train = datasets.build_transform(True, parse("--input-size", 64, 96))
    assert train(image).shape == (3, 64, 96)


def test_gray_images_have_one_channel_and_their_own_normalization():
    args = parse("--in-chans", 1, "--input-size", 40, "--reprob", 0)
    image = Image.new("RGB", (60, 60), (10, 200, 30))
    gray = image.convert("L").getpixel((0, 0)) / 255
    assert datasets.build_transform(False, args)(image).flatten()[0].item() == pytest.approx(
        (gray - 0.449) / 0.226, 1e-4
    )
    assert datasets.build_transform(True, args)(image).shape == (1, 40, 40)
    other = parse("--in-chans", 1, "--mean", 0.5, "--std", 0.25)
    assert datasets.build_transform(False, other)(image).flatten()[0].item() == pytest.approx((gray - 0.5) / 0.25, 1e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--in-chans", 1, "--mean", 0.1, 0.2, 0.3],
            "mean is [0.1, 0.2, 0.3], expected a number for each of 1 channels",
        ),
        (["--std", 0.5], "std is [0.5], expected a number for each of 3 channels"),
        (["--model-kwargs", "depth=3"], "cannot make alt_gvt_demo (--model-kwargs)"),
        (["--model-kwargs", "pretrained=True"], "its model_kwargs name pretrained"),
        (["--input-size", 16, 64], "too small (--input-size 16 64)"),
    ],
)
def test_numbers_that_do_not_fit_are_one_line(words, says, toy, tmp_path, capsys):
    assert here(*small(toy, tmp_path / "a", *words)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("main.py: error: ") and says in error and not (tmp_path / "a").exists()


@pytest.mark.slow
def test_whoever_reads_the_checkpoint_prepares_images_as_it_did(toy, tmp_path, capsys):
    """A gray, wide model of another normalization and padding: --eval, gvt.load and the tools give its score."""
    words = ["--in-chans", 1, "--mean", 0.4, "--std", 0.3, "--input-size", 40, 64, "--model-kwargs", "pad=zero"]
    assert here(*small(toy, tmp_path / "a", *words)) == 0
    line = log_lines(tmp_path / "a")[-1]
    file = tmp_path / "a" / "checkpoint.pth"
    predictions = tmp_path / "p.json"
    evaluate = ["--eval", "--resume", file, "--data-path", toy, "--device", "cpu", "--predictions", predictions]
    assert here(*evaluate, "--num_workers", 0) == 0
    out = capsys.readouterr().out
    assert f"* Acc@1 {line['test_acc1']:.3f} Acc@5 {line['test_acc5']:.3f}" in out
    stored = "--input-size 40 64, --eval-crop-ratio 0.875, --alpha white, --exif ignore, --in-chans 1, --mean 0.4"
    assert f"{stored}, --std 0.3, --model-kwargs pad=zero" in out
    row = json.loads(predictions.read_text())[0]
    model, transform, classes = gvt.load(str(file))
    made = tools_trained.load(str(file))
    image = Image.open(row["path"]).convert("RGB")
    assert model.blocks[0][0].attn.pad == "zero" and made.sides == (40, 64) and made.mean == (0.4,)
    for network, prepare in ((model, transform), (made.model, made.transform)):
        x = prepare(image)
        with torch.inference_mode():
            best = network(x[None]).softmax(1).max(1)
        assert x.shape == (1, 40, 64) and classes[best.indices.item()] == row["prediction"]
        assert best.values.item() == pytest.approx(row["probability"], abs=2e-5)


def test_weights_of_color_models_start_gray_ones(toy, tmp_path, capsys):
    assert here(*small(toy, tmp_path / "a", "--epochs", 1)) == 0
    args = parse(*SMALL_RUN, "--in-chans", 1, "--finetune", tmp_path / "a" / "checkpoint.pth")
    model, *_ = build_networks(args, ["ant", "bee", "cat", "dog"], CPU)
    stem = weights(tmp_path / "a")["patch_embeds.0.proj.weight"]
    assert torch.allclose(model.patch_embeds[0].proj.weight, stem.sum(1, keepdim=True))
    assert "adapted from 3 to 1 channels" in capsys.readouterr().out
