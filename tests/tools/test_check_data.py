"""python -m tools.check_data: thirty planted faults of thirty in a thousand files, and no false alarm."""

import csv
import io
import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from tools import check_data
from training.errors import exit_code

CLASSES = ("ant", "bee", "cat", "dog")


def image(seed, size=(40, 32)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A folder of 1,000 good files of many kinds."""
    root = tmp_path_factory.mktemp("data")
    kinds = ("x.png", "x.jpg", "x.webp", "x.gif", "x.bmp", "x.tif", "x.jpeg", "x.JPG")
    for number in range(1000):
        split, name = "val" if number % 5 == 0 else "train", CLASSES[number % 7 % 4]
        path = root / split / name / kinds[number % 8].replace("x", f"{number:04}")
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = ("RGB", "L", "P", "RGB")[number // 8 % 4]
        image(number).convert("RGB" if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else mode).save(path)
    return root


@pytest.fixture
def data(thousand, tmp_path):
    return shutil.copytree(thousand, tmp_path / "data", copy_function=os.link)


def replaced(path, content):
    path.unlink()
    path.write_bytes(content)


def found(data, tmp_path, *words):
    """Run the tool; return its exit code and the rows of its CSV."""
    out = tmp_path / "findings.csv"
    code = exit_code("check_data.py", check_data.main, ["--data-path", str(data), "--csv", str(out), *words])
    with open(out, newline="") as file:
        return code, [(row["path"], row["problem"]) for row in csv.DictReader(file)]


def test_no_false_alarm(data, tmp_path, capsys):
    assert found(data, tmp_path, "--workers", "0") == (0, [])
    assert capsys.readouterr().out.endswith("1000 files, 0 findings\n")


def plant(data):
    """Plant thirty faults; return the path of each with a word of its finding."""
    files = {
        suffix: sorted(data.glob(f"train/*/*{suffix}")) for suffix in (".png", ".jpg", ".gif", ".webp", ".bmp", ".tif")
    }
    planted = {}
    for suffix, share in (
        (".png", 0.5),
        (".jpg", 0.5),
        (".gif", 0.5),
        (".webp", 0.5),
        (".bmp", 0.5),
        (".tif", 0.5),
        (".jpg", 0.9),
        (".png", 0.95),
    ):
        path = files[suffix].pop()
        content = path.read_bytes()
        replaced(path, content[: int(len(content) * share)])
        planted[path] = "cannot read an image"
    contents = {
        b"": "empty file",
        bytes(5000): "zeros only",
        b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
        b"<!DOCTYPE html>404": "HTML",
        b"\0\0\0\x18ftypheic\0\0\0\0": "HEIC",
        b"%PDF-1.4": "PDF",
        b"text": "cannot read",
        b"\x89PNG\r\n\x1a\n" + bytes(40): "cannot read",
    }
    for content, says in contents.items():
        planted[path := files[".jpg"].pop()] = says
        replaced(path, content)
    corrupt = files[".png"].pop()
    content = bytearray(corrupt.read_bytes())
    content[len(content) // 2] ^= 255
    replaced(corrupt, bytes(content))
    planted[corrupt] = "cannot read an image"
    for values, says in (([[0.0, 999.0]], "0 to 999"), ([[-1.0, 1.0]], "-1 to 1")):
        planted[path := files[".tif"].pop()] = says
        path.unlink()
        Image.fromarray(np.float32(values)).save(path)
    planted[path := files[".png"].pop()] = "too large"
    path.unlink()
    Image.new("1", (14_000, 13_000)).save(path)
    # links, pipes, folders
    planted[gone := data / "train" / "ant" / "gone.png"] = "a link to nothing"
    gone.symlink_to("nowhere.png")
    planted[loop := data / "train" / "bee" / "loop"] = "leads back above itself"
    loop.symlink_to("..")
    planted[pipe := data / "train" / "cat" / "pipe.jpg"] = "not a regular file"
    os.mkfifo(pipe)
    planted[empty := data / "train" / "empty"] = "a class without images"
    empty.mkdir()
    planted[nested := data / "train" / "nested"] = "a class folder that holds only folders"
    (nested / "sub").mkdir(parents=True)
    planted[unknown := data / "val" / "eel"] = "a class that training does not know"
    unknown.mkdir()
    image(1234).save(unknown / "x.png")
    # the same bytes
    for source, target, says in (
        (files[".png"].pop(), data / "val" / "twin.png", "the same file is in"),
        (files[".jpg"].pop(), data / "val" / "twin.jpg", "the same file is in"),
        (files[".bmp"].pop(), data / "train" / "other.bmp", "the same file has another class"),
        (files[".webp"].pop(), data / "val" / "other.webp", "the same file has another class"),
    ):
        name = source.parent.name if "twin" in target.name else CLASSES[CLASSES.index(source.parent.name) - 1]
        shutil.copy(source, target := target.parent / name / target.name)
        planted[target] = says
    return planted


def test_thirty_faults_of_thirty(data, tmp_path, capsys):
    planted = plant(data)
    assert len(planted) == 30
    code, rows = found(data, tmp_path, "--workers", "2")
    assert code == 1
    missed = [
        path for path, says in planted.items() if not any(str(path) in "".join(row) and says in row[1] for row in rows)
    ]
    assert not missed
    false = [row for row in rows if not any(str(path) in "".join(row) for path in planted)]
    assert not false and len(rows) == 31  # a class that holds an empty folder has two faults
    assert "findings" in capsys.readouterr().out


def test_errors_of_use(data, tmp_path, capsys):
    for words in ([], ["config.py", "--data-path", "x"], ["--data-path", str(tmp_path / "none")]):
        assert exit_code("check_data.py", check_data.main, words) == 2
    assert (
        exit_code("check_data.py", check_data.main, ["--data-path", str(data), "--csv", str(tmp_path / "no" / "x.csv")])
        == 2
    )
    assert "--csv" in capsys.readouterr().err


def test_images_in_archives(tmp_path):
    """A file cut off, one that is in both parts, and one of two classes; a hostile archive is one line."""
    whole = {f"{name}/{number}.png": number for number, name in enumerate(CLASSES * 3)}
    for part, first in (("train", 0), ("val", 100)):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for name, number in whole.items():
                buffer = io.BytesIO()
                image(77 if number == 2 else first + number).save(buffer, "PNG")
                data = buffer.getvalue()
                file.writestr(name, data[:300] if (part, number) == ("train", 1) else data)
                if (part, number) == ("train", 0):
                    file.writestr("dog/same.png", data)
    code, rows = found(tmp_path, tmp_path, "--workers", "2")
    assert code == 1 and [path for path, _ in rows] == [
        f"{tmp_path / 'train.zip'}!/bee/1.png",
        f"{tmp_path / 'train.zip'}!/dog/same.png",
        f"{tmp_path / 'val.zip'}!/cat/2.png",
    ]
    assert all(words in row[1] for words, row in zip(("cannot read", "another class", "is in train"), rows))
    with zipfile.ZipFile(tmp_path / "val.zip", "a") as file:
        file.writestr("../evil.png", b"x")
    assert exit_code("check_data.py", check_data.main, ["--data-path", str(tmp_path)]) == 2
