"""Walking folders: which files are images, what is counted, and links."""

from collections import Counter
from pathlib import Path

import pytest
from conftest import make_images
from PIL import Image

import datasets
from training import options
from training.errors import UserError
from training.folders import log_unread, numbered_names, suffixes, walk


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def build(folder, *words, split="train", **settings):
    args = options.parse_args(["--data-path", str(folder), *words])
    return datasets.build_dataset(split, args, transform=None, **settings)


def test_suffixes_are_those_of_the_formats_that_are_read():
    known = {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".bmp",
        ".jp2",
        ".mpo",
        ".ppm",
        ".avif",
    }
    assert known <= suffixes() and not {".eps", ".pdf", ".fits", ".mpg", ".txt", ".svg", ".heic"} & suffixes()


def test_files_in_the_order_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ("b.png", "a.PNG", "sub/c.jpg", "sub-x/d.jpg", "sub/deep/e.jpeg", "Z.bmp"):
        touch(tmp_path / "cat" / name)
    expected = [path for path, _ in ImageFolder(str(tmp_path)).samples]
    assert walk(tmp_path / "cat", Counter()) == expected and len(expected) == 6


def test_what_is_not_read_is_counted_by_suffix(tmp_path, capsys):
    for name in ("1.heic", "2.HEIC", "notes.txt", "README", "a.png"):
        touch(tmp_path / name)
    unread = Counter()
    assert walk(tmp_path, unread) == [str(tmp_path / "a.png")]
    log_unread(unread, tmp_path)
    assert capsys.readouterr().out == f"files that are not read ({tmp_path}): 2 .heic, 1 without a suffix, 1 .txt\n"


def test_what_other_programs_leave_is_ignored(tmp_path):
    for name in ("._a.png", ".DS_Store", "Thumbs.db", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "b.png"):
        touch(tmp_path / name)
    unread = Counter()
    assert walk(tmp_path, unread) == [str(tmp_path / "b.png")] and not unread


def test_other_suffixes_train(tmp_path):
    """Half of a class renamed .gif, another all .jfif."""
    make_images(tmp_path / "train", classes=("cat", "dog"), each=4)
    for path in sorted((tmp_path / "train" / "dog").iterdir()):
        path.rename(path.with_suffix(".jfif"))
    for path in sorted((tmp_path / "train" / "cat").iterdir())[:2]:
        path.rename(path.with_suffix(".gif"))
    assert len(build(tmp_path)) == 8


# ---------------------------------------------------------------- links


def test_linked_files_and_folders_are_read(tmp_path):
    make_images(tmp_path / "store", classes=("cat", "dog"), each=2)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "store" / "cat")
    touch(tmp_path / "train" / "dog" / "notes.txt")
    for path in (tmp_path / "store" / "dog").iterdir():
        (tmp_path / "train" / "dog" / path.name).symlink_to(path)
    assert len(build(tmp_path)) == 4


@pytest.mark.parametrize("target", [".", "..", "../..", "../dog"])
def test_a_link_that_leads_back_is_refused(target, tmp_path):
    """Also where two folders link to each other."""
    make_images(tmp_path / "train", classes=("cat", "dog"), each=1)
    (tmp_path / "train" / "cat" / "loop").symlink_to(target)
    if target == "../dog":
        (tmp_path / "train" / "dog" / "loop").symlink_to("../cat")
    with pytest.raises(UserError, match="a link that leads back above itself .*loop -> "):
        build(tmp_path)


def test_a_link_to_nothing_is_named(tmp_path):
    make_images(tmp_path / "train", classes=("cat", "dog"), each=1)
    (tmp_path / "train" / "cat" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"a link to nothing \(.*gone.png -> nowhere.png\)"):
        build(tmp_path)


# ---------------------------------------------------------------- classes


def test_a_level_too_many_is_named(tmp_path):
    make_images(tmp_path / "train" / "images", classes=("cat", "dog"), each=1)
    with pytest.raises(UserError) as caught:
        build(tmp_path)
    where = tmp_path / "train"
    assert str(caught.value).startswith(f"a class folder that holds only folders ({where / 'images'}: cat, dog): ")


def test_one_class_is_refused(tmp_path):
    make_images(tmp_path / "train", classes=("cat",), each=2)
    with pytest.raises(UserError, match=r"only one class \(.*cat\)"):
        build(tmp_path)
    make_images(tmp_path / "val", classes=("cat",), each=2)
    assert len(build(tmp_path, split="val", classes=["ant", "cat"])) == 2  # a part of val may be scored


@pytest.mark.parametrize("first", [0, 1])
def test_folders_named_by_numbers_are_in_their_order(first, capsys):
    names = [str(number) for number in range(first, first + 12)]
    assert datasets.match_classes(sorted(names), None, 12) == names
    assert f"named {first} to {names[-1]}" in capsys.readouterr().out
    assert datasets.match_classes(sorted(names), sorted(names), 12) == sorted(names)  # the names of its checkpoint hold
    assert datasets.match_classes(["0", "2", "10"], None, 3) == ["0", "10", "2"]  # no numbers of classes


def test_options_reach_the_reader(tmp_path):
    make_images(tmp_path / "train", classes=("cat", "dog"), each=1)
    reader = build(tmp_path, "--alpha", "black", "--exif", "apply", "--max-pixels", "9").reader
    assert (reader.alpha, reader.exif, reader.max_pixels) == ("black", "apply", 9)
    with pytest.raises(UserError, match="too large an image"):
        reader(str(next(Path(tmp_path / "train" / "cat").iterdir())))


def test_one_pixel_images_are_read(tmp_path):
    touch(tmp_path / "train" / "cat" / "x.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "train" / "cat" / "x.png")
    make_images(tmp_path / "train", classes=("dog",), each=1)
    data = build(tmp_path)
    assert data.reader(data.samples[0][0]).size == (1, 1)


def test_files_of_one_name_are_numbered():
    assert numbered_names(["a/x.png", "b/X.png", "x_2.png", "c/x.jpg"]) == ["x", "X_2", "x_2_2", "x_3"]
