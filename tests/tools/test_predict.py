"""tools.predict: what is in images of one's own, as evaluation would say it."""

import csv
import io
import json
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, make_images
from PIL import ExifTags, Image
from torch import nn

import gvt
import main as main_program
from tools import predict, sheets, trained, user_images
from training import checkpoint, options
from training.errors import exit_code


def run(*words) -> int:
    return exit_code("predict.py", predict.main, [str(word) for word in words])


def read(path: Path) -> list[dict]:
    text = path.read_text()
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        return [row | {"top": json.loads(row["top"]), "probability": float(row["probability"] or 0)} for row in rows]
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def noise(mode="RGB", size=(90, 70), seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4)).astype(np.uint8)
    image = Image.fromarray(pixels, "RGBA" if mode == "RGBA" else "RGBX").convert("RGBA" if mode == "RGBA" else "RGB")
    return image if mode in ("RGB", "RGBA") else image.convert(mode)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_a_row_for_each_image(suffix, toy, classifier, tmp_path, capsys):
    results = tmp_path / f"x{suffix}"
    assert run(toy / "val" / "ant", "--weights", classifier, "--device", "cpu", "--results", results, "--topk", 3) == 0
    rows = read(results)
    assert [row["path"] for row in rows] == sorted(map(str, (toy / "val" / "ant").iterdir()))
    for row in rows:
        assert list(row) == ["path", "label", "probability", "top", "error"] and row["error"] == ""
        assert len(row["top"]) == 3 and row["top"][0] == [row["label"], row["probability"]]
        assert sorted(row["top"], key=lambda pair: -pair[1]) == row["top"]
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("alt_gvt_demo, 4 classes, 32 x 32 pixels, cpu: ")
    for line, row in zip(out[1:27], rows):  # the table
        assert f"/val/ant/{Path(row['path']).name}" in line
        assert f"  {row['label']} {100 * row['probability']:.1f} %  " in line
    assert out[27].startswith("26 images: ") and out[27].endswith("images/s") and out[28] == str(results)


def kinds(folder: Path) -> None:
    """Write images of every kind that evaluation reads."""
    folder.mkdir(parents=True)
    noise().save(folder / "a.jpg")
    noise(seed=1).save(folder / "b.png")
    noise(seed=2).save(folder / "c.webp")
    noise("P", seed=3).save(folder / "d.gif")
    noise("L", seed=4).save(folder / "e.png")
    noise("RGBA", seed=5).save(folder / "f.png")
    noise("CMYK", seed=6).save(folder / "g.jpg")
    values = np.random.default_rng(7).integers(0, 65536, (50, 60)).astype(np.uint16)
    Image.fromarray(values).save(folder / "h.png")
    Image.new("RGB", (1, 1), (200, 10, 10)).save(folder / "i.png")
    noise(size=(40, 1), seed=8).save(folder / "j.png")


@pytest.mark.parametrize("alpha", ["white", "black"])
def test_images_predict_as_they_evaluate(alpha, classifier, tmp_path):
    """All kinds of images, with the size, crop and background of the checkpoint."""
    kinds(tmp_path / "val" / "ant")
    for name in ("bee", "cat", "dog"):
        make_images(tmp_path / "val", classes=(name,), each=1)
    payload = torch.load(classifier, weights_only=True)
    settings = dict(model="alt_gvt_demo", input_size=64, eval_crop_ratio=0.75, alpha=alpha)
    checkpoint.save(tmp_path / "x.pth", payload | {"args": settings})
    words = [*SMALL_RUN, "--input-size", 64, "--eval-crop-ratio", 0.75, "--alpha", alpha, "--data-path", tmp_path]
    words += ["--eval", "--resume", tmp_path / "x.pth", "--predictions", tmp_path / "expected.json"]
    assert main_program.run(options.parse_args([str(word) for word in words])) == 0
    out = ["--results", tmp_path / "x.json", "--device", "cpu", "--batch-size", 12]
    assert run(tmp_path / "val", "--weights", tmp_path / "x.pth", *out) == 0
    found, expected = (read(tmp_path / name) for name in ("x.json", "expected.json"))
    assert [row["path"] for row in found] == [row["path"] for row in expected] and len(found) == 13
    for row, evaluated in zip(found, expected):
        assert row["label"] == evaluated["prediction"]
        assert [name for name, _ in row["top"]] == [name for name, _ in evaluated["top"]]
        assert [value for _, value in row["top"]] == pytest.approx([v for _, v in evaluated["top"]], abs=2e-6)


def test_the_logits_are_those_of_the_model(classifier, tmp_path):
    model, transform, _ = gvt.load(classifier)
    noise().save(tmp_path / "a.png")
    args = predict_args(tmp_path / "a.png", "--weights", classifier)
    found = trained.load(str(classifier))
    ((_, logits, _),) = user_images.outputs(args.images, found, found.model, torch.device("cpu"), args)
    with torch.no_grad():
        assert torch.allclose(logits, model(transform(noise())[None])[0], atol=1e-6, rtol=0)


def predict_args(*words):
    return user_images.new_parser("predict", "").parse_args([str(word) for word in words])


def test_images_are_turned_upright(classifier, tmp_path):
    upright, exif = noise(size=(60, 40)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    results = tmp_path / "x.json"
    assert run(tmp_path, "--weights", classifier, "--device", "cpu", "--results", results) == 0
    turned, expected = read(results)
    assert turned["path"].endswith("turned.png") and turned["top"] == expected["top"]
    words = ("--weights", classifier, "--device", "cpu", "--results", results, "--overwrite", "--exif", "ignore")
    assert run(tmp_path, *words) == 0 and read(results)[0]["top"] != expected["top"]


def test_unreadable_images_are_rows_and_the_others_go_on(classifier, tmp_path, capsys):
    make_images(tmp_path, classes=("x",), each=2)
    folder = tmp_path / "x"
    (folder / "empty.png").write_bytes(b"")
    (folder / "large.ppm").write_bytes(b"P6 20000 20000 255\n" + bytes(100))
    (folder / "narrow.png").write_bytes(b"")
    Image.new("1", (100_000, 1)).save(folder / "narrow.png")
    (folder / "text.jpg").write_text("<html>")
    (folder / "zz.png").symlink_to(tmp_path / "nothing")
    payload = torch.load(classifier, weights_only=True)
    checkpoint.save(tmp_path / "x.pth", payload | {"args": {"model": "alt_gvt_demo", "input_size": 64}})
    results = tmp_path / "x.json"
    words = ("--weights", tmp_path / "x.pth", "--device", "cpu", "--results", results, "--output", tmp_path / "out")
    assert run(folder, *words) == 1
    rows = {Path(row["path"]).name: row for row in read(results)}
    link = rows.pop("")  # a link to nothing has no image: its name is in the error
    assert "a link to nothing" in link["error"] and "zz.png" in link["error"]
    assert not rows["0.png"]["error"] and not rows["1.png"]["error"]
    says = {"empty.png": "an empty file", "large.ppm": "400000000 pixels", "text.jpg": "an HTML page"}
    says["narrow.png"] = "too narrow an image"
    for name, part in says.items():
        row = rows.pop(name)
        assert part in row["error"] and (row["label"], row["probability"], row["top"]) == ("", None, [])
        assert str(folder / name) in row["error"]
    captured = capsys.readouterr()
    assert captured.out.count("  error: ") == 5 and "2 images, 5 could not be read: " in captured.out
    assert "text.jpg  error: cannot read an image: an HTML page" in captured.out
    assert captured.err == "" and len(list((tmp_path / "out").iterdir())) == 3  # two copies and the sheet


def test_names_from_globs_stdin_and_folders(toy, classifier, tmp_path, monkeypatch, capsys):
    val = toy / "val"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{val}/dog/0.png\r\n\nmissing.png\n".encode())))
    words = (val / "cat" / "1*.png", "-", val / "dog" / "0.png", "--weights", classifier, "--device", "cpu")
    assert run(*words, "--results", tmp_path / "x.jsonl") == 1
    names = ["1.png", *(f"1{number}.png" for number in range(10))]
    expected = [str(val / "cat" / name) for name in sorted(names)]
    rows = read(tmp_path / "x.jsonl")
    assert [row["path"] for row in rows] == [*expected, f"{val}/dog/0.png", "missing.png"]  # each once
    assert [bool(row["error"]) for row in rows] == [False] * 12 + [True] and "No such file" in rows[-1]["error"]


def test_sheets_and_copies(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "PAGE", 4)
    make_images(tmp_path / "in", classes=("a", "b"), each=3)
    noise(size=(3000, 500)).save(tmp_path / "in" / "large.jpg")
    words = (tmp_path / "in", "--weights", classifier, "--device", "cpu", "--output", tmp_path / "out")
    assert run(*words) == 0
    copies = {f"{name}.jpg" for name in ("0", "0_2", "1", "1_2", "2", "2_2", "large")}
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == copies | {"contact_sheet.png", "contact_sheet.2.png"}  # of 4 and of 3 images
    for name, size in (("large.jpg", (1024, 171)), ("0.jpg", (256, 256))):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.format == "JPEG" and image.size == (size[0], size[1] + 4 * sheets.LINE + sheets.MARGIN)
    with Image.open(tmp_path / "out" / "contact_sheet.png") as image:
        assert image.width == 4 * (sheets.CELL + sheets.MARGIN) + sheets.MARGIN
    assert run(*words) == 2 and run(*words, "--overwrite") == 0


def test_bars_and_names_of_any_length():
    drawn = np.asarray(sheets.annotated(noise(size=(300, 256)), [("x" * 300, 1.0), ("y", 0.25), ("\u732b $x$", 0.0)]))
    blue = (np.abs(drawn.astype(int) - sheets.BLUE).sum(2) == 0).sum(1)
    room = 300 - 2 * sheets.MARGIN - 60
    rows = [256 + sheets.MARGIN // 2 + sheets.LINE * number + 2 for number in range(3)]
    assert blue[rows[0]] == pytest.approx(room, abs=2) and blue[rows[1]] == pytest.approx(room / 4, abs=2)
    assert blue[rows[2]] <= 1
    assert sheets.fitted("short", 100) == "short" and sheets.fitted("long " * 30, 100).endswith("...")
    lines = (("x" * 100, ""), ("a", "b"))
    assert sheets.contact_sheet([sheets.Cell(None, each, True) for each in lines]).width == 2 * 200 + 8


def test_progress_has_a_rate_and_an_end(toy, classifier, monkeypatch):
    text, real = io.StringIO(), user_images.tqdm
    monkeypatch.setattr(user_images, "tqdm", lambda **kwargs: real(**kwargs | dict(disable=False, file=text)))
    assert run(toy / "val" / "bee", "--weights", classifier, "--device", "cpu", "--batch-size", 5) == 0
    assert "25/25" in text.getvalue() and " images/s]" in text.getvalue() and "<" in text.getvalue()


class Constant(nn.Module):
    def forward(self, images):
        return torch.zeros(len(images), 4)


@pytest.mark.slow
def test_thousands_of_images_in_constant_memory(classifier, tmp_path, monkeypatch):
    """The second thousand images needs no more than the first; all would be 1.5 GB as the model sees them."""
    noise(size=(8, 8)).save(tmp_path / "0.png")
    (tmp_path / "in").mkdir()
    for number in range(2000):
        os.link(tmp_path / "0.png", tmp_path / "in" / f"{number}.png")
    found = trained.load(str(classifier))
    transform = gvt.loading.eval_transform(256, 1.0, found.mean, found.std)
    found = trained.Trained(**vars(found) | dict(model=Constant(), transform=transform, size=256))
    monkeypatch.setattr(trained, "load", lambda *_, **__: found)
    memory, shown = [], predict.shown

    def watched(*args):
        for row in shown(*args):
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
            yield row

    monkeypatch.setattr(predict, "shown", watched)
    words = (
        "--output",
        tmp_path / "out",
        "--results",
        tmp_path / "x.jsonl",
        "--device",
        "cpu",
        "--batch-size",
        8,
        "--num-workers",
        0,
    )
    assert run(tmp_path / "in", "--weights", "x", *words) == 0
    assert len(memory) == 2000 and len(read(tmp_path / "x.jsonl")) == 2000
    growth = [max(memory[k : k + 200]) - max(memory[:200]) for k in range(200, 2000, 200)]
    assert max(growth) < 30, growth  # MB


def test_an_output_that_is_not_finite_is_an_error(toy, classifier, monkeypatch, tmp_path):
    class Overflow(nn.Module):
        def forward(self, images):
            return torch.full((len(images), 4), float("inf"))

    found = trained.load(str(classifier))
    monkeypatch.setattr(trained, "load", lambda *_, **__: trained.Trained(**vars(found) | dict(model=Overflow())))
    words = ("--weights", "x", "--device", "cpu", "--amp-dtype", "bfloat16", "--results", tmp_path / "x.json")
    assert run(toy / "val" / "bee" / "0.png", *words) == 1
    (row,) = read(tmp_path / "x.json")
    assert "not finite" in row["error"] and "torch.bfloat16" in row["error"] and row["label"] == ""


@pytest.fixture
def wrong(toy, classifier, tmp_path):
    state = torch.load(classifier, weights_only=True)["model"]
    checkpoint.save(tmp_path / "none.pth", {name: x for name, x in state.items() if not name.startswith("head.")})
    (tmp_path / "mine.csv").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    return {"IMAGE": toy / "val" / "bee" / "0.png", "WEIGHTS": classifier, "TMP": tmp_path}


ERRORS = {
    "a missing image": ("TMP/x.png --weights WEIGHTS", "no such image or folder"),
    "no images": ("TMP/empty --weights WEIGHTS", "no images"),
    "missing weights": ("IMAGE --weights TMP/x.pth", "no such file"),
    "no classifier": ("IMAGE --weights TMP/none.pth", "no classifier in the weights"),
    "another model's weights": ("IMAGE --weights WEIGHTS --model alt_gvt_small", "the weights do not fit the model"),
    "an unknown model": ("IMAGE --weights WEIGHTS --model alt_gvt", "unknown model"),
    "results that exist": ("IMAGE --weights WEIGHTS --results TMP/mine.csv", "it exists already"),
    "results of another kind": ("IMAGE --weights WEIGHTS --results TMP/x.txt", "no such format"),
    "results in no folder": ("IMAGE --weights WEIGHTS --results TMP/none/x.csv", "no such folder"),
    "results that cannot be written": ("IMAGE --weights WEIGHTS --results /proc/x.csv", "cannot write (--results"),
    "a folder with files": ("IMAGE --weights WEIGHTS --output TMP/full", "the folder holds files"),
    "a file as a folder": ("IMAGE --weights WEIGHTS --output TMP/mine.csv --overwrite", "not a folder"),
    "a folder below a file": ("IMAGE --weights WEIGHTS --output TMP/mine.csv/x", "cannot make the folder"),
    "an unknown device": ("IMAGE --weights WEIGHTS --device gpu", "no such device"),
    "no weights": ("IMAGE", "--weights"),
    "an image as weights": ("IMAGE --weights IMAGE", "not a readable checkpoint"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_one_line_and_write_nothing(kind, wrong, capsys):
    line, says = ERRORS[kind]
    for name, value in wrong.items():
        line = line.replace(name, str(value))
    before = sorted(wrong["TMP"].rglob("*"))
    try:
        rc = run(*line.split())
    except SystemExit as stop:  # of the parser
        rc = stop.code
    error = capsys.readouterr().err
    assert rc == 2 and error.startswith("predict.py: error: ") and error.count("\n") == 1 and says in error
    assert sorted(wrong["TMP"].rglob("*")) == before and (wrong["TMP"] / "mine.csv").read_text() == "mine"


@pytest.mark.parametrize("option", ["--results", "--output"])
def test_a_full_disk_leaves_nothing_half_written(option, wrong, monkeypatch, capsys):
    def fail(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    out = wrong["TMP"] / "empty" / ("x.csv" if option == "--results" else "out")
    assert run(wrong["IMAGE"], "--weights", wrong["WEIGHTS"], "--device", "cpu", option, out) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error and option in error
    assert not [path for path in (wrong["TMP"] / "empty").rglob("*") if path.is_file()]


def test_results_inside_the_new_folder_and_replaced_ones(wrong, tmp_path):
    words = (wrong["IMAGE"], "--weights", wrong["WEIGHTS"], "--device", "cpu")
    assert run(*words, "--output", tmp_path / "out", "--results", tmp_path / "out" / "x.csv") == 0
    assert len(read(tmp_path / "out" / "x.csv")) == 1
    assert run(*words, "--results", tmp_path / "mine.csv", "--overwrite") == 0
    assert len(read(tmp_path / "mine.csv")) == 1


def test_names_that_no_terminal_prints(classifier, tmp_path, capsys):
    make_images(tmp_path, classes=("x",), each=1)
    name = b"a\n\xff" + b"b" * 200 + b".png"
    os.rename(tmp_path / "x" / "0.png", os.path.join(os.fsencode(tmp_path / "x"), name))
    words = ("--weights", classifier, "--device", "cpu", "--results", tmp_path / "x.csv", "--output", tmp_path / "out")
    assert run(tmp_path / "x", *words) == 0
    assert os.path.join(os.fsencode(tmp_path / "x"), name) in (tmp_path / "x.csv").read_bytes()
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert user_images.printable("a\n\udcffé") == "a\\n\\udcffé"


def test_a_reader_that_leaves_is_one_line(toy, classifier, monkeypatch, capfd):
    def leave(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(predict.tqdm, "write", leave)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert run(toy / "val" / "bee" / "0.png", "--weights", classifier, "--device", "cpu") == 2
    assert capfd.readouterr().err == "predict.py: error: nobody reads the output (stdout): stopped\n"


def test_readers_that_end_are_one_line(toy, classifier, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        yield

    monkeypatch.setattr(user_images, "build_loader", fail)
    assert run(toy / "val" / "bee" / "0.png", "--weights", classifier, "--device", "cpu") == 2
    assert "reading the images failed (DataLoader worker (pid 1) is killed" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_that_read_give_the_same(toy, classifier, tmp_path):
    for workers in (0, 2):
        words = ("--num-workers", workers, "--results", tmp_path / f"{workers}.csv", "--device", "cpu")
        assert run(toy / "val", "--weights", classifier, *words) == 0
    assert (tmp_path / "0.csv").read_text() == (tmp_path / "2.csv").read_text()
