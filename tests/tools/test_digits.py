"""The demo's data set."""

import numpy as np
from PIL import Image

from tools import digits


def images(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_the_layout_is_stratified_seeded_and_done_once(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    assert digits.write(a, size=32, seed=0) == {"train": 1437, "val": 360}
    digits.write(b, size=32, seed=0)
    assert images(a) == images(b) and len(images(a)) == 1797
    digits.write(c, size=32, seed=1)
    assert images(c).keys() != images(a).keys()
    for part, low, high in (("train", 139, 147), ("val", 34, 37)):
        counts = [len(list((a / part / str(digit)).iterdir())) for digit in range(10)]
        assert min(counts) >= low and max(counts) <= high
    path = next((a / "val" / "0").iterdir())
    image = Image.open(path)
    assert image.size == (32, 32) and image.mode == "RGB" and np.asarray(image).max() > 200
    before = path.stat().st_mtime_ns
    digits.write(a, size=32, seed=0)
    assert path.stat().st_mtime_ns == before
