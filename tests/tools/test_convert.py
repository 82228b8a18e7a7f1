"""tools/convert.py: files of every format, there and back with the same bits, opened by timm; errors are one line and
write nothing.
"""

import functools
import json
import os
import resource
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, golden_weights

import gvt
from tools import convert as tool
from tools import hub
from training import checkpoint, formats
from training.checkpoint import Checkpoint
from training.errors import UserError, exit_code

run = functools.partial(exit_code, "convert.py", tool.main)
HEAD = ["head.weight", "head.bias"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of a PCPVT and an SVT in float32, and their files."""
    folder = tmp_path_factory.mktemp("weights")
    states = {}
    for key in ("pcpvt_small", "alt_gvt_small", "alt_gvt_demo"):
        states[key] = golden_weights(gvt.Twins(gvt.VARIANTS[key], num_classes=5)).float().state_dict()
        checkpoint.save(folder / f"{key}.pth", {"model": states[key]})
    return folder, states


def opened(path):
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return Checkpoint.open(path).weights()


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in state.items())


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("key", ["pcpvt_small", "alt_gvt_small"])
@pytest.mark.parametrize("fmt", ["published", "timm", "mmseg", "mmpretrain"])
def test_there_and_back(files, tmp_path, key, fmt):
    folder, states = files
    there, back, report = tmp_path / "there.pth", tmp_path / "back.pth", tmp_path / "report.json"
    line = tool.convert(str(folder / f"{key}.pth"), there, fmt, report=report)
    assert line.startswith(f"{folder / key}.pth (published, {key}) -> {there} ({fmt}): ") and "\n" not in line
    assert ("head.weight" in line and "norm is kept" in line) == (fmt == "mmseg")
    payload = torch.load(there, weights_only=True)
    inside = {"published": "model", "mmseg": "state_dict", "mmpretrain": "state_dict"}.get(fmt)
    assert inside is None or list(payload) == [inside]
    written = payload if inside is None else payload[inside]
    expected, left_out, notes = formats.from_official(states[key], fmt, source="x")
    assert list(written) == list(expected)
    assert json.loads(report.read_text()) == {
        "source": str(folder / f"{key}.pth"),
        "format": "published",
        "written_as": fmt,
        "tensors": list(expected),
        "left_out": HEAD if fmt == "mmseg" else [],
        "notes": notes,
    }
    assert f"{len(written)} tensors" in line
    line = tool.convert(str(there), back, "published", no_head=fmt == "mmseg")
    assert f"({fmt if fmt.startswith('mm') else 'published'}, {key})" in line
    assert_same(opened(back), {name: value for name, value in states[key].items() if name not in left_out})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pth", "report.json", "there.pth"]


@pytest.mark.parametrize("key", ["pcpvt_small", "alt_gvt_small"])
def test_safetensors(files, tmp_path, key):
    folder, states = files
    out = tmp_path / "x.safetensors"
    tool.convert(str(folder / f"{key}.pth"), out, "safetensors")
    assert_same(safetensors.torch.load_file(out), states[key])
    with safetensors.safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("key", ["pcpvt_small", "alt_gvt_small"])
def test_timm_computes_the_same_in_float64(tmp_path, key):
    ours = golden_weights(gvt.Twins(gvt.VARIANTS[key], num_classes=5)).eval()
    checkpoint.save(tmp_path / "ours.pth", {"model": ours.state_dict()})
    tool.convert(str(tmp_path / "ours.pth"), tmp_path / "theirs.pth", "timm")
    theirs = timm.create_model(gvt.VARIANTS[key].timm, num_classes=5).double().eval()
    theirs.load_state_dict(torch.load(tmp_path / "theirs.pth", weights_only=True), strict=True)
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert (ours(image) - theirs(image)).abs().max() < 1e-11


# ---------------------------------------------------------------- the hub's folder


@pytest.mark.parametrize("key", ["pcpvt_small", "alt_gvt_small"])
def test_a_hub_folder_opens_in_timm(files, tmp_path, key):
    folder, states = files
    line = tool.convert(str(folder / f"{key}.pth"), tmp_path / "mine", "hub")
    assert f"({key}" not in line and f"{len(states[key])} tensors" in line
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    model = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True)
    assert type(model).__module__ == "timm.models.twins" and model.num_classes == 5
    assert (
        model.pretrained_cfg["crop_pct"] == 0.875
        and "tag" not in model.pretrained_cfg
        and "license" not in model.pretrained_cfg
    )
    assert list(model.state_dict()) == list(formats.from_official(states[key], "timm", source="x")[0])
    assert_same(dict(model.state_dict()), states[key])


PLAIN_TIMM = """
import sys
sys.path.insert(0, sys.argv[1])
from gvt_ops import torchvision_cpu
import timm
assert "gvt" not in sys.modules
print(type(timm.create_model("local-dir:" + sys.argv[2], pretrained=True)).__module__)
"""


@pytest.mark.slow
def test_a_hub_folder_opens_without_our_models(files, tmp_path):
    tool.convert(str(files[0] / "alt_gvt_small.pth"), tmp_path / "mine", "hub")
    command = [sys.executable, "-c", PLAIN_TIMM, str(ROOT), str(tmp_path / "mine")]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
        == "timm.models.twins\n"
    )


def run_folder(folder, name="alt_gvt_demo", size=32):
    """Write a checkpoint, and what lies beside it in a run's folder; return its path and the model."""
    model = golden_weights(timm.create_model(name, num_classes=4)).float().eval()
    args = {"model": name, "input_size": size, "eval_crop_ratio": 0.9}
    payload = {"model": model.state_dict(), "args": args, "class_names": ["ant", "bee", "cat", "dog"], "epoch": 1}
    checkpoint.save(folder / "run.pth", payload | {"model_ema": model.state_dict()})
    scores = [{"test_acc1": 80.0 + epoch, "test_acc5": 99.0, "test_loss": 0.5, "epoch": epoch} for epoch in range(3)]
    lines = [json.dumps(each | {f"ema_{key}": value - 1 for key, value in each.items()}) for each in scores]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    record = {"command": "python main.py --model x", "torch": "2.13.0", "timm": "1.0.31"}
    (folder / "environment.json").write_text(json.dumps(record))
    return str(folder / "run.pth"), model


def same_logits(model, other, size):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = other(x)
        return (getattr(logits, "logits", logits) - model(x)).abs().max() < 1e-5


def test_a_hub_folder_of_our_own_model(tmp_path):
    source, model = run_folder(tmp_path)
    line = tool.convert(source, tmp_path / "mine", "hub")
    assert line.endswith("its model is alt_gvt_demo, import gvt first")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert config["label_names"] == ["ant", "bee", "cat", "dog"] and "model_args" not in config
    opened = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
    assert isinstance(opened, gvt.Twins) and same_logits(model, opened, 32)
    cfg = opened.pretrained_cfg
    assert cfg["input_size"] == [3, 32, 32] and cfg["crop_pct"] == 1 and cfg["interpolation"] == "bicubic"
    assert cfg["label_names"] == ["ant", "bee", "cat", "dog"] and "license" not in cfg and "tag" not in cfg


@pytest.mark.parametrize(
    ("ema", "row"), [(False, "| 2 | 81.00 % | 99.00 % | 0.5000 |"), (True, "| 2 | 80.00 % | 98.00 % | -0.5000 |")]
)
def test_the_model_card(tmp_path, ema, row):
    """It has the scores of the checkpoint's epoch, not of the last one."""
    source, _ = run_folder(tmp_path)
    tool.convert(source, tmp_path / "mine", "hub", ema=ema)
    text = (tmp_path / "mine" / "README.md").read_text()
    assert row in text and "python main.py --model x" in text and "with torch 2.13.0, timm 1.0.31." in text
    assert "4 classes: ant, bee, cat, dog." in text and "32 x 32 pixels" in text and "license" not in text
    blocks = text.split("```python\n")[1:]
    assert len(blocks) == 2 and all(block.startswith("import gvt") for block in blocks)


def test_a_model_card_without_a_run(files, tmp_path):
    tool.convert(str(files[0] / "alt_gvt_small.pth"), tmp_path / "mine", "hub")
    text = (tmp_path / "mine" / "README.md").read_text()
    assert text.count("Unknown: no ") == 2 and "import gvt" not in text and "`twins_svt_small`" in text
    assert "5 classes." in text


SIZES = [("alt_gvt_small", 224, "twins_svt_small"), ("alt_gvt_small", 448, "twins_svt_small")]
SIZES += [("alt_gvt_small", size, "alt_gvt_small") for size in (32, 64, 256, 384)]
SIZES += [("pcpvt_small", 384, "twins_pcpvt_small"), ("alt_gvt_demo", 224, "alt_gvt_demo")]


@pytest.mark.parametrize(("variant", "size", "name"), SIZES)
def test_timms_name_only_where_timm_computes_the_same(variant, size, name):
    assert hub.architecture(variant, size) == name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("alt_gvt_small", 64),
        ("alt_gvt_small", 224),
        ("alt_gvt_small", 448),
        ("pcpvt_small_v0", 64),
        ("alt_gvt_demo", 32),
    ],
)
def test_timm_and_transformers_open_a_hub_folder(tmp_path, name, size):
    transformers = pytest.importorskip("transformers")
    source, model = run_folder(tmp_path, name, size)
    tool.convert(source, tmp_path / "mine", "hub")
    opened = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
    assert isinstance(opened, gvt.Twins) == (name == "alt_gvt_demo" or (name, size) == ("alt_gvt_small", 64))
    other = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "mine").eval()
    assert same_logits(model, opened, size) and same_logits(model, other, size)
    assert opened.pretrained_cfg["label_names"] == list(other.config.id2label.values()) == ["ant", "bee", "cat", "dog"]


def test_a_hub_folder_of_other_channels_types_and_without_a_classifier(tmp_path):
    state = {
        name: value.half()
        for name, value in gvt.Twins(gvt.VARIANTS["alt_gvt_small"], in_chans=1, num_classes=0).state_dict().items()
    }
    checkpoint.save(tmp_path / "x.pth", state)
    tool.convert(str(tmp_path / "x.pth"), tmp_path / "mine", "hub", no_head=True)
    assert_same(opened(tmp_path / "mine"), state)
    model = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True)
    assert model.num_classes == 0 and torch.equal(model.norm.weight, state["norm.weight"].float())


@pytest.mark.parametrize("fmt", ["published", "safetensors", "hub"])
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(files, tmp_path, fmt):
    """No file may be larger than 1 MB: as on a full disk, the error comes in the midst of writing."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write \(.*x\): .*File too large") as caught:
            tool.convert(str(files[0] / "alt_gvt_small.pth"), tmp_path / "x", fmt)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what is taken from a file


def test_an_official_segmentor(files, tmp_path):
    state = files[1]["alt_gvt_demo"]
    file = {f"backbone.{name}": value for name, value in state.items()} | {"decode_head.conv_seg.weight": torch.ones(3)}
    checkpoint.save(tmp_path / "seg.pth", {"meta": {"CLASSES": ("a", "b")}, "state_dict": file, "optimizer": {}})
    line = tool.convert(str(tmp_path / "seg.pth"), tmp_path / "x.pth", "published", report=tmp_path / "x.json")
    assert "(dense, alt_gvt_demo)" in line and line.endswith(
        "left out with the rest of the model: 1 (decode_head.conv_seg.weight)"
    )
    assert json.loads((tmp_path / "x.json").read_text())["left_out"] == ["decode_head.conv_seg.weight"]
    assert_same(opened(tmp_path / "x.pth"), state)


def test_ema(files, tmp_path):
    state = files[1]["alt_gvt_demo"]
    checkpoint.save(
        tmp_path / "run.pth",
        {"model": state, "model_ema": {name: value + 1 for name, value in state.items()}, "epoch": 3},
    )
    tool.convert(str(tmp_path / "run.pth"), tmp_path / "plain.pth", "timm")
    tool.convert(str(tmp_path / "run.pth"), tmp_path / "ema.pth", "timm", ema=True)
    assert_same(opened(tmp_path / "plain.pth"), state)
    assert torch.equal(opened(tmp_path / "ema.pth")["norm.bias"], state["norm.bias"] + 1)


def test_no_head(files, tmp_path):
    line = tool.convert(str(files[0] / "alt_gvt_demo.pth"), tmp_path / "x.pth", "published", no_head=True)
    assert line.endswith("not held by it: 2 (head.weight, head.bias)")
    with pytest.raises(UserError, match="--no-head"):
        tool.convert(str(tmp_path / "x.pth"), tmp_path / "y.pth", "timm")
    assert "no classifier in the source" in tool.convert(
        str(tmp_path / "x.pth"), tmp_path / "y.pth", "timm", no_head=True
    )


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("fmt", ["published", "safetensors", "hub"])
def test_what_exists_is_left_alone(files, tmp_path, fmt):
    out = tmp_path / "x"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        tool.convert(str(files[0] / "alt_gvt_small.pth"), out, fmt)
    with pytest.raises(UserError, match="exists already"):
        tool.convert(str(files[0] / "alt_gvt_small.pth"), tmp_path / "y", fmt, report=out)
    assert out.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_names_that_cannot_be_written(files, tmp_path):
    source = str(files[0] / "alt_gvt_demo.pth")
    with pytest.raises(UserError, match="no such folder"):
        tool.convert(source, tmp_path / "none" / "x.pth", "timm")
    with pytest.raises(UserError, match="one name for two files"):
        tool.convert(source, tmp_path / "x.pth", "timm", report=tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "text.pth").write_text("not weights")
    checkpoint.save(folder / "other.pth", {"model": torch.nn.Linear(2, 3).state_dict()})
    checkpoint.save(folder / "strange.pth", {"model": files[1]["alt_gvt_demo"] | {"gamma": torch.ones(1)}})
    checkpoint.save(folder / "demo.pth", {"model": files[1]["alt_gvt_demo"]})
    return folder


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("missing.pth", ("--to", "timm"), "no such file"),
        ("text.pth", ("--to", "timm"), "not a readable checkpoint"),
        ("other.pth", ("--to", "timm"), "these weights are no Twins"),
        ("strange.pth", ("--to", "mmseg"), "1 unknown (gamma)"),
        ("demo.pth", ("--to", "timm", "--ema"), "no averaged weights"),
        ("demo.pth", ("--to", "timm", "--report", "/"), "it exists already (/)"),
        ("demo.pth", ("--to", "timn"), "timn"),
        ("demo.pth", (), "--to"),
    ],
)
def test_errors_are_one_line_and_write_nothing(wrong, tmp_path, name, options, part, capsys):
    try:
        rc = run([str(wrong / name), str(tmp_path / "x"), *options])
    except SystemExit as stop:  # of the parser
        rc = stop.code
    captured = capsys.readouterr()
    assert rc == 2 and captured.out == ""
    assert captured.err.startswith("convert.py: error: ") and captured.err.count("\n") == 1 and part in captured.err
    assert list(tmp_path.iterdir()) == []


def test_debug_raises(wrong, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINS_DEBUG", "1")
    with pytest.raises(UserError):
        run([str(wrong / "text.pth"), str(tmp_path / "x"), "--to", "timm"])


@pytest.mark.slow
def test_as_a_module_from_elsewhere(wrong, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tools.convert",
        str(wrong / "demo.pth"),
        "x.pth",
        "--to",
        "mmseg",
        "--report",
        "x.json",
    ]
    env = os.environ | {"PYTHONWARNINGS": "error::UserWarning", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.pth"]
