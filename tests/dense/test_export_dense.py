"""export.py of both tasks: the file computes what the model computes, refuses other sizes, and errors are one line."""

import json
import sys

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from toys import CLASSES, DETECTOR, ROOT, SEGMENTOR, run, write

from dense import demo, libraries
from gvt_ops import accelerate
from tools import export_dense as tool
from tools import runtimes
from training.errors import exit_code


def random_weights(library, folder, text, **values):
    """Write a config and a checkpoint of its model with random weights; return both names."""
    libraries.load(library)
    config, weights = write(folder / "config.py", text, data=folder, **values), folder / "weights.pth"
    with DefaultScope.overwrite_default_scope(library), libraries.quiet():
        torch.manual_seed(0)
        registry = __import__(f"{library}.registry", fromlist=["MODELS"]).MODELS
        torch.save(dict(state_dict=registry.build(Config.fromfile(config).model).state_dict(), meta={}), weights)
    return str(config), str(weights)


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    return random_weights("mmseg", tmp_path_factory.mktemp("mmseg"), SEGMENTOR)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    facts = dict(setting="mask_rcnn_3x_swin", masks=True)
    return random_weights("mmdet", tmp_path_factory.mktemp("mmdet"), DETECTOR, **facts)


def call(library, source, folder, fmt, *words):
    """Run the tool; return the exit code and the output's path."""
    path = folder / f"out{runtimes.SUFFIXES[fmt]}"
    words = [*source, "--to", fmt, "--output", str(path), *words]
    return exit_code("export.py", lambda argv: tool.main(library, argv), words), path


def model_of(library, source):
    return accelerate(demo.Predictor(*source, [], library, "cpu").model, enable=False)


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def refused(file, *sizes):
    for size in sizes:
        with pytest.raises(Exception, match=r"(?i)shape|dimension|size"):
            file(images(1, 3, *size))


def test_labels_of_a_segmentor(segmentor, tmp_path, capsys):
    code, path = call("mmseg", segmentor, tmp_path, "pt2")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.pt2", "out.pt2.json"]
    x, file = images(1, 3, 32, 32), runtimes.open_file("pt2", path)
    with torch.inference_mode():
        logits = model_of("mmseg", segmentor).encode_decode(x, [dict(img_shape=(32, 32))])
    labels = file(x)
    assert labels.shape == (1, 32, 32) and torch.equal(labels, logits.argmax(1)) and len(labels.unique()) > 1
    refused(file, (64, 64), (32, 64), (64, 32))
    assert json.loads((tmp_path / "out.pt2.json").read_text()) == {
        "model": "config",
        "class_names": list(CLASSES),
        "input_size": [3, 32, 32],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
        "channels": "RGB",
        "precision": "float32",
    }
    assert "1 x 3 x 32 x 32" in printed.out and "images/s" in printed.out
    assert "labels of config" in printed.out and "takes one at a time, 32 x 32 pixels" in printed.out


@pytest.mark.slow
@pytest.mark.parametrize("fmt", tool.FORMATS)
def test_logits_of_a_segmentor(segmentor, tmp_path, fmt, capsys):
    """Of any number of oblong images."""
    words = ["--logits", "--dynamic-batch", "--size", "64", "96"]
    code, path = call("mmseg", segmentor, tmp_path, fmt, *words)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "takes any number at a time, 64 x 96 pixels" in printed.out and "3 x 3 x 64 x 96" in printed.out
    file, model = runtimes.open_file(fmt, path), model_of("mmseg", segmentor)
    for batch in (1, 2, 5):
        x = images(batch, 3, 64, 96)
        with torch.inference_mode():
            expected = model.encode_decode(x, [dict(img_shape=(64, 96))])
        assert expected.shape == (batch, 3, 64, 96) and (file(x) - expected).abs().max() < 1e-4
    refused(file, (96, 64), (32, 32), (128, 192))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", tool.FORMATS)
def test_maps_of_a_detector(detector, tmp_path, fmt, capsys):
    code, path = call("mmdet", detector, tmp_path, fmt)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "map_0, map_1, map_2, map_3, map_4 of config" in printed.out and "64 x 64 pixels" in printed.out
    x, file = images(1, 3, 64, 64), runtimes.open_file(fmt, path)
    with torch.inference_mode():
        expected = model_of("mmdet", detector).extract_feat(x)
    assert [each.shape[2:] for each in expected] == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    assert max((got - each).abs().max() for got, each in zip(file(x), expected, strict=True)) < 1e-4
    refused(file, (32, 32), (64, 96))


def test_a_label_is_as_wrong_as_its_logit_is_low():
    logits = torch.tensor([1.0, 3.0, 2.5]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    labels = torch.ones(1, 2, 2, dtype=torch.int64)
    assert tool.label_difference(labels, logits) == 0
    labels[0, 1, 0] = 2
    assert tool.label_difference(labels, logits) == 0.5
    labels[0, 0, 0] = 3
    assert tool.label_difference(labels, logits) == float("inf")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda logits: logits + 0.01, "largest difference to PyTorch"),
        (lambda logits: logits, "it takes images of 64 x 32 pixels"),
    ],
)
def test_a_wrong_file_is_not_kept(segmentor, tmp_path, monkeypatch, capsys, wrong, reason):
    model = model_of("mmseg", segmentor)
    monkeypatch.setattr(tool, "write", lambda *args: None)
    monkeypatch.setattr(
        runtimes, "open_file", lambda *args: lambda x: wrong(model.encode_decode(x, [dict(img_shape=(32, 32))]))
    )
    assert call("mmseg", segmentor, tmp_path, "pt2", "--logits")[0] == 1
    error = capsys.readouterr().err
    assert error.startswith("export.py: error: wrong, and not kept (") and reason in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--size", "16", "64"], "32 pixels are the least"),
        (["--output", "out.onnx"], "end its name in .pt2"),
        (["--output", "nowhere/out.pt2"], "no such folder (--output nowhere/out.pt2)"),
        (["--cfg-options", "model.test_cfg.mode=slide"], "sliding window"),
        (["--cfg-options", "model.decode_head.num_classes=7"], "do not fit the model"),
    ],
)
def test_errors_are_one_line_and_write_nothing(segmentor, tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    assert call("mmseg", segmentor, tmp_path, "pt2", *words)[0] == 2
    error = capsys.readouterr().err
    assert error.startswith("export.py: error: ") and error.count("\n") == 1 and part in error
    assert not list(tmp_path.iterdir())


def test_what_exists_is_left_alone(segmentor, tmp_path, capsys):
    (tmp_path / "out.pt2.json").write_text("mine")
    assert call("mmseg", segmentor, tmp_path, "pt2")[0] == 2
    assert "it exists already" in capsys.readouterr().err and (tmp_path / "out.pt2.json").read_text() == "mine"


def test_a_config_of_the_other_library(detector, tmp_path, capsys):
    assert call("mmseg", detector, tmp_path, "pt2")[0] == 2
    error = capsys.readouterr().err
    assert "segmentation needs one for mmseg" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("library", libraries.TASKS)
def test_the_scripts_run(library, segmentor, detector, tmp_path):
    source, folder = segmentor if library == "mmseg" else detector, ROOT / libraries.TASKS[library]
    done = run([sys.executable, "export.py", *source, "--to", "pt2", "--output", tmp_path / "out.pt2"], folder)
    assert done.returncode == 0 and not done.stderr and (tmp_path / "out.pt2").is_file()
