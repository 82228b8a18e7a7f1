"""python -m tools.check_data CONFIG: planted faults of images, labels and annotations, all in one go."""

import csv
import os
import shutil

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import numpy as np
from PIL import Image
from toys import DETECTOR, SEGMENTOR, ade_toy, annotations, coco_toy, write

from dense import libraries
from tools import check_data
from training.errors import exit_code


def toy(folder, library):
    if library == "mmseg":
        return write(folder / "config.py", SEGMENTOR, data=(data := ade_toy(folder / "data"))), data
    data = coco_toy(folder / "data")
    return write(folder / "config.py", DETECTOR, data=data, setting="mask_rcnn_3x_swin", masks=True), data


def found(config, folder):
    out, here = folder / "findings.csv", os.getcwd()
    try:
        code = exit_code("check_data.py", check_data.main, [str(config), "--csv", str(out), "--workers", "0"])
    finally:
        os.chdir(here)  # the tool goes where train.py runs
    with open(out, newline="") as file:
        return code, [(row["path"], row["problem"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("library", libraries.TASKS)
def test_no_false_alarm(library, tmp_path, capsys):
    assert found(toy(tmp_path, library)[0], tmp_path) == (0, [])
    number = 28 if library == "mmseg" else 10
    assert capsys.readouterr().out.endswith(f"{number} files, 0 findings\n")


def test_faults_of_segmentation(tmp_path):
    config, data = toy(tmp_path, "mmseg")
    images, labels = data / "images", data / "annotations"
    train, val = images / "training", images / "validation"
    planted = {
        train / "training_0.jpg": (lambda path: path.write_bytes(path.read_bytes()[:300]), "cannot read an image"),
        val / "validation_0.jpg": (lambda path: path.write_bytes(b""), "empty file"),
        val / "validation_1.jpg": (
            lambda path: shutil.copy(train / "training_1.jpg", path),
            "the same file is in train",
        ),
        labels / "training" / "training_2.png": (
            lambda path: Image.fromarray(np.full((64, 80), 7, np.uint8)).save(path),
            "labels of no class",
        ),
        labels / "training" / "training_3.png": (
            lambda path: Image.fromarray(np.ones((20, 20), np.uint8)).save(path),
            "labels of another size",
        ),
        labels / "validation" / "validation_2.png": (lambda path: path.write_bytes(b"x"), "cannot read the labels"),
        labels / "validation" / "validation_3.png": (lambda path: path.unlink(), "images without label files"),
    }
    for path, (plant, _) in planted.items():
        plant(path)
    code, rows = found(config, tmp_path)
    assert code == 1
    for path, (_, says) in planted.items():
        assert any(path.name in "".join(row) and says in row[1] for row in rows), (path, rows)
    names = [path.name for path in planted]
    # The labels of the image that was replaced are another image's now.
    assert all(any(name in "".join(row) for name in [*names, "validation_1.png", "annotations"]) for row in rows), rows


def test_faults_of_detection(tmp_path):
    config, data = toy(tmp_path, "mmdet")
    (data / "train2017" / f"{0:012}.jpg").write_bytes(b"<!DOCTYPE html>")
    (data / "val2017" / f"{1:012}.jpg").unlink()
    with annotations(data, "train2017") as content:
        content["images"][2] |= dict(width=99, height=77)
    with annotations(data, "val2017") as content:
        content["annotations"][0]["bbox"] = [1, 2, 3]
    code, rows = found(config, tmp_path)
    assert code == 1 and len(rows) == 4
    for says in ("an HTML page", "No such file", "77 x 99", "instances_val2017.json"):
        assert any(says in "".join(row) for row in rows), (says, rows)


def test_configs_of_no_task_are_refused(tmp_path, capsys):
    (tmp_path / "config.py").write_text("x = 1\n")
    assert exit_code("check_data.py", check_data.main, [str(tmp_path / "config.py")]) == 2
    assert exit_code("check_data.py", check_data.main, [str(tmp_path / "none.py")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
