"""image_demo.py of both tasks: what is drawn and written is what the model predicts, without annotations."""

import sys

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image
from toys import CLASSES, DETECTOR, ROOT, SEGMENTOR, noise, run, write

from dense import demo, libraries
from tools import web
from training.errors import exit_code

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",  # of mmdetection's masks
    "ignore:Warning. The .* is out of bounds:UserWarning",  # of mmengine, for boxes at the edge
    "ignore:.*instance named of:UserWarning",  # of mmengine, where one process makes two visualizers
)


@pytest.fixture(scope="module", params=libraries.TASKS)
def trained(request, tmp_path_factory):
    """A config, a checkpoint of its model with random weights that finds something, and the library's name."""
    library, folder = request.param, tmp_path_factory.mktemp(request.param)
    libraries.load(library)
    text = (SEGMENTOR, {}) if library == "mmseg" else (DETECTOR, dict(setting="mask_rcnn_3x_swin", masks=True))
    config = write(folder / "config.py", text[0], data=folder, **text[1])
    with open(config, "a") as file:
        file.write("model.update(test_cfg=dict(rcnn=dict(score_thr=0.0)))\n" if library == "mmdet" else "")
    with DefaultScope.overwrite_default_scope(library), libraries.quiet():
        torch.manual_seed(0)
        registry = __import__(f"{library}.registry", fromlist=["MODELS"]).MODELS
        model = registry.build(Config.fromfile(config).model)
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / "weights.pth")
    return library, config, folder / "weights.pth"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(noise(48, 80)).save(folder / "a.jpg")
    Image.fromarray(noise(40, 64)[..., 0]).save(folder / "more" / "a.png")
    return folder


def read(path):
    with Image.open(path) as file:
        return np.asarray(file)


def call(library, capsys, *words):
    code = exit_code(
        "image_demo.py", lambda argv: demo.run(demo.demo_parser(library).parse_args(argv), library), [*map(str, words)]
    )
    return code, capsys.readouterr()


def test_results_are_the_models(trained, images, tmp_path, capsys):
    library, config, weights = trained
    out = tmp_path / "out"
    more = ["--save-labels"] if library == "mmseg" else ["--save-json", "--score-thr", "0.0", "--max-boxes", "5"]
    code, printed = call(library, capsys, images, config, weights, "--out-dir", out, *more)
    assert code == 0 and f"2 of 2 images, results in {out}" in printed.out
    for name, (width, height) in dict(a=(80, 48), a_2=(64, 40)).items():
        drawn = read(out / f"{name}.png")
        assert drawn.shape[1] > width and drawn.shape[0] >= height  # the legend is beside it
    predictor = demo.Predictor(str(config), str(weights), [], library, "cpu")
    pixels, result = predictor(str(images / "a.jpg"))
    assert np.array_equal(pixels, read(images / "a.jpg"))
    if library == "mmseg":
        labels = read(out / "a_labels.png")
        assert np.array_equal(labels, result.pred_sem_seg.data[0].numpy() + 1)  # reduce_zero_label
        drawn = read(out / "a.png")[:48, :80]
        color = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.float32)[labels - 1]
        assert np.array_equal(drawn, (pixels * 0.5 + color * 0.5).round().astype(np.uint8))
        assert any(name in printed.out for name in CLASSES)
    else:
        from pycocotools.coco import COCO

        coco = COCO(out / "predictions.json")
        first = coco.loadAnns(coco.getAnnIds([1]))
        assert len(first) == 5 and coco.imgs[1]["width"] == 80 and len(coco.cats) == 80
        best = result.pred_instances[:5]
        found = np.array([each["bbox"] for each in first])
        found[:, 2:] += found[:, :2]
        assert np.allclose(found, best.bboxes.numpy(), atol=1e-3)
        assert [each["score"] for each in first] == pytest.approx(best.scores.tolist())
        assert np.array_equal(coco.annToMask(first[0]), best.masks[0].numpy())
        assert not np.array_equal(read(out / "a.png")[:48, :80], pixels)


def test_an_image_is_predicted_as_it_is_shown(trained, tmp_path):
    library, config, weights = trained
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(48, 80)).save(tmp_path / "x.png", exif=exif)
    pixels, result = demo.Predictor(str(config), str(weights), [], library, "cpu")(str(tmp_path / "x.png"))
    assert np.array_equal(pixels, np.rot90(noise(48, 80), -1)) and result.ori_shape == (80, 48)


def test_unreadable_images_are_a_line_each(trained, images, tmp_path, capsys):
    library, config, weights = trained
    (images / "broken.jpg").write_bytes(b"%PDF-1.4")
    (images / "notes.txt").write_text("x")
    code, printed = call(library, capsys, images, config, weights, "--out-dir", tmp_path / "out")
    assert code == 1 and "2 of 3 images" in printed.out and "1 .txt" in printed.out
    assert f"cannot read an image ({images / 'broken.jpg'}): a PDF file" in printed.out
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_errors_are_one_line_and_write_nothing(trained, images, tmp_path, capsys):
    library, config, weights = trained
    out = tmp_path / "out"
    other = "mmdet" if library == "mmseg" else "mmseg"
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "x").write_text("")
    for words, says in (
        ([images, config], "IMAGES... CONFIG CHECKPOINT"),
        ([tmp_path / "none.jpg", config, weights], "no such image or folder"),
        ([images, tmp_path / "none.py", weights], "no such config"),
        ([images, config, tmp_path / "none.pth"], "none.pth"),
        ([images, config, weights, "--out-dir", tmp_path / "held"], "the folder holds files"),
    ):
        words = words if "--out-dir" in words else [*words, "--out-dir", out]
        code, printed = call(library, capsys, *words)
        assert code == 2 and says in printed.err and printed.err.count("\n") == 1
    assert (
        exit_code(
            "x",
            lambda argv: demo.run(demo.demo_parser(other).parse_args(argv), other),
            [str(w) for w in (images, config, weights, "--out-dir", out)],
        )
        == 2
    )
    assert not out.exists() and "a config for" in capsys.readouterr().err


@pytest.mark.slow
def test_the_commands(trained, images, tmp_path):
    library, config, weights = trained
    folder = ROOT / libraries.TASKS[library]
    done = run(
        [sys.executable, "image_demo.py", images / "a.jpg", config, weights, "--out-dir", tmp_path / "out"], folder
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "a.png").exists()


def test_the_page_draws_what_image_demo_draws(trained, images, tmp_path, capsys):
    library, config, weights = trained
    code, _ = call(library, capsys, images / "a.jpg", config, weights, "--out-dir", tmp_path / "out")
    drawn, found = web.overlay(library, str(config), str(weights), "cpu")(str(images / "a.jpg"))
    assert code == 0 and drawn == (tmp_path / "out" / "a.png").read_bytes()
    assert found == "nothing found" if library == "mmdet" else any(name in found for name in CLASSES)
