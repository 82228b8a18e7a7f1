"""tools/scenes.py: the same digits in ADE20K's and in COCO's format, by the seed, and val's digits apart from
train's.
"""

import json

import numpy as np
import pytest
from PIL import Image

from tools import scenes
from tools.digits import split_digits

COUNTS = {"train": 12, "val": 5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    scenes.write(root / "ade", root / "coco", counts=COUNTS, seed=0)
    return root / "ade", root / "coco"


def decode(lengths):
    size = lengths["size"]
    values = np.repeat(np.arange(len(lengths["counts"])) % 2, lengths["counts"])
    return values.reshape(size, order="F").astype(bool)


@pytest.mark.parametrize("part", COUNTS)
def test_both_formats_say_the_same(folders, part):
    ade, coco = folders
    record = json.loads((coco / "annotations" / f"instances_{scenes.COCO[part]}.json").read_text())
    names = {category["id"]: category["name"] for category in record["categories"]}
    assert len(record["images"]) == COUNTS[part] and list(names.values()) == list("0123456789")
    assert len({each["id"] for each in record["annotations"]}) == len(record["annotations"])
    for image in record["images"]:
        labels = np.array(Image.open(ade / "annotations" / scenes.ADE[part] / image["file_name"]))
        pixels = [
            np.array(Image.open(folder / image["file_name"]))
            for folder in (ade / "images" / scenes.ADE[part], coco / scenes.COCO[part])
        ]
        assert np.array_equal(*pixels) and pixels[0].shape == (image["height"], image["width"], 3)
        expected = np.ones_like(labels)  # background
        found = [each for each in record["annotations"] if each["image_id"] == image["id"]]
        assert 1 <= len(found) <= scenes.MOST
        for each in found:
            mask = decode(each["segmentation"])
            assert each["area"] == mask.sum() > 20
            x, y, width, height = each["bbox"]
            assert mask[y : y + height, x : x + width].sum() == mask.sum()
            assert mask[y].any() and mask[y + height - 1].any() and mask[:, x].any() and mask[:, x + width - 1].any()
            assert (expected[mask] == 1).all()  # no digit on another
            expected[mask] = int(names[each["category_id"]]) + 2
        assert np.array_equal(labels, expected)


def test_the_seed_decides(folders, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        scenes.write(tmp_path / name / "ade", tmp_path / name / "coco", counts=COUNTS, seed=seed)
    kept = {path.relative_to(folders[0]): path.read_bytes() for path in folders[0].rglob("*.png")}
    assert len(kept) == 2 * sum(COUNTS.values())
    for name, equal in (("same", True), ("other", False)):
        assert all((tmp_path / name / "ade" / path).read_bytes() == content for path, content in kept.items()) is equal


def test_a_digit_of_val_is_not_in_train():
    train, val = ({number for number, _, _ in digits} for digits in split_digits(0).values())
    assert len(train) + len(val) == 1797 and not train & val


def test_run_lengths_begin_with_zeros():
    assert scenes.run_lengths(np.array([[True, False], [True, True]])) == dict(size=[2, 2], counts=[0, 2, 1, 1])
    assert scenes.run_lengths(np.zeros((2, 3), bool)) == dict(size=[2, 3], counts=[6])
