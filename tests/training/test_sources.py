"""Folders, tar and zip archives, lists, maps and shards of the same images: the same data sets, scores and losses."""

import csv
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, log_lines, make_images
from torch.utils.data import DataLoader

import datasets
import engine
import main
from training import archives, checkpoint, options, sources
from training.errors import UserError
from training.files import write_text

CLASSES = ("ant", "bee", "cat", "dog")
SPLITS = ("train", "val")
KINDS = ("folder", "tar", "zip", "deflated", "single", "swin", "list", "shards", "json shards")


def files(root, split):
    return sorted((root / split).rglob("*.png"), key=lambda path: (path.parent.name, path.name))


def shuffled(paths):
    return [paths[number] for number in np.random.default_rng(7).permutation(len(paths))]


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shards(root, out, split, *, as_json=False):
    """Images in no order in three shards, under keys of their own, with the class number beside."""
    for number in range(3):
        with tarfile.open(out / f"{split}-{number:06}.tar", "w") as tar:
            for path in shuffled(files(root, split))[number::3]:
                label, key = CLASSES.index(path.parent.name), f"{path.parent.name}_{path.stem}"
                add(tar, f"{key}.png", path.read_bytes())
                text = json.dumps({"label": label, "caption": "x"}) if as_json else f"{label}\n"
                add(tar, f"{key}.{'json' if as_json else 'cls'}", text.encode())
    (out / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def write_zip(path, named, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, source in named:
            file.write(source, name)


def layout(root, out, kind):
    """The images of root/train/CLASS and root/val/CLASS in another form; return its --data-path."""
    if kind == "folder":
        return root
    out.mkdir()
    if kind == "single":
        named = [(str(path.relative_to(root)), path) for split in SPLITS for path in shuffled(files(root, split))]
        write_zip(out / "all.zip", named)
        return out / "all.zip"
    for split in SPLITS:
        paths = shuffled(files(root, split))
        inside = [(f"{path.parent.name}/{path.name}", path) for path in paths]
        if kind == "tar":
            with tarfile.open(out / f"{split}.tar", "w") as tar:
                for name, path in inside:
                    tar.add(path, f"./{split}/{name}" if split == "train" else name)
        elif kind in ("zip", "deflated", "swin"):
            method = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
            write_zip(out / f"{split}.zip", inside, method)
            if kind == "swin":
                lines = [f"{name}\t{CLASSES.index(path.parent.name)}\n" for name, path in inside]
                (out / f"{split}_map.txt").write_text("".join(lines))
                (out / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        elif kind == "list":
            with open(out / f"{split}.csv", "w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["width", "path", "label"])
                for path in paths:
                    copy = out / "images" / split / f"{path.parent.name}_{path.name}"
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, copy)
                    rows.writerow([40, copy.relative_to(out), path.parent.name])
        else:
            write_shards(root, out, split, as_json=kind == "json shards")
    return out


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """120 images of 4 classes."""
    root = tmp_path_factory.mktemp("images")
    make_images(root / "train", classes=CLASSES, each=20)
    make_images(root / "val", classes=CLASSES, each=10, seed=1)
    return root


@pytest.fixture(scope="session")
def paths(images, tmp_path_factory):
    """--data-path of each kind."""
    return {kind: layout(images, tmp_path_factory.mktemp("kinds") / "data", kind) for kind in KINDS}


def arguments(data_path, *words):
    return options.parse_args(["--data-path", str(data_path), *map(str, words)])


def build(data_path, *words, split="train", transform=np.asarray, **settings):
    return datasets.build_dataset(split, arguments(data_path, *words), transform=transform, **settings)


def contents(dataset):
    return [(pixels.tobytes(), label) for pixels, label in (dataset[number] for number in range(len(dataset)))]


def refused(data_path, *words, split="val", **settings):
    with pytest.raises(UserError) as caught:
        build(data_path, *words, split=split, **settings)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


def here(*words):
    return main.run(options.parse_args([str(word) for word in words]))


# ---------------------------------------------------------------- the same images in every form


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_kind_has_the_same_images_in_the_same_order(kind, images, paths):
    for split, number in (("train", 80), ("val", 40)):
        expected, found = build(images, split=split), build(paths[kind], split=split)
        assert found.classes == list(CLASSES) and len(found) == number
        assert contents(found) == contents(expected)
        found.reader.report(final=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_does_not_depend_on_the_place(kind, paths, tmp_path):
    data = paths[kind]
    first = datasets.fingerprint(build(data), build(data, split="val"), root=str(data))
    copy = tmp_path / "elsewhere" / data.name
    copy.parent.mkdir()
    shutil.copytree(data, copy) if data.is_dir() else shutil.copy(data, copy)
    assert datasets.fingerprint(build(copy), build(copy, split="val"), root=str(copy)) == first
    if kind != "folder":
        assert first != datasets.fingerprint(build(data), root=str(data))


def test_the_fingerprint_of_a_folder_is_as_it_was(tmp_path):
    """Read off the version before archives: runs that began with it go on."""
    make_images(tmp_path / "train", classes=("ant", "bee"), each=11)
    make_images(tmp_path / "val", classes=("bee",), each=2)
    train = build(tmp_path)
    val = build(tmp_path, split="val", classes=train.classes)
    assert datasets.fingerprint(train, val, root=str(tmp_path)) == "42dad2f58a64b40d"


@pytest.fixture(scope="module")
def scores(paths, tmp_path_factory):
    """The lines of a run's log on a data set, without times."""

    def run(kind, *words):
        folder = tmp_path_factory.mktemp("runs") / "run"
        assert here(*SMALL_RUN, "--data-path", paths[kind], "--output_dir", folder, *words) == 0
        return [{k: v for k, v in line.items() if "loss" in k or "acc" in k} for line in log_lines(folder)]

    return run


@pytest.fixture(scope="module")
def of_a_folder(scores):
    return scores("folder")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
def test_losses_and_scores_are_the_same_to_the_last_digit(kind, scores, of_a_folder):
    found = scores(kind, "--num_workers", 2 if kind in ("zip", "shards") else 0)
    assert len(found) == 2 and found == of_a_folder
    assert {"train_loss", "test_loss", "test_acc1", "test_acc5"} <= found[0].keys()


@pytest.mark.slow
def test_weights_score_the_same_on_every_kind(paths, classifier, capsys):
    """Without names in the weights too: classes are found by looking."""
    results = set()
    for kind in KINDS:
        words = ["--eval", "--resume", classifier, "--device", "cpu", "--num_workers", 0, "--data-path", paths[kind]]
        assert here(*words) == 0
        results.add(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("* Acc@1")))
    assert len(results) == 1


@pytest.mark.slow
def test_a_stopped_run_on_a_zip_resumes_to_the_same_bits(paths, tmp_path, monkeypatch):
    words = [*SMALL_RUN, "--data-path", paths["deflated"]]
    assert here(*words, "--output_dir", tmp_path / "whole") == 0
    original = engine.train_one_epoch

    def stop(*args, **kwargs):
        if args[5] == 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(engine, "train_one_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        here(*words, "--output_dir", tmp_path / "parts")
    monkeypatch.setattr(engine, "train_one_epoch", original)
    assert here(*words, "--output_dir", tmp_path / "parts", "--resume", "auto") == 0
    a, b = (checkpoint.load(str(tmp_path / name / "checkpoint.pth"))["model"] for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def worker_handles(place):
    archives.read(place, "x")
    return dict(archives._handles)


@pytest.mark.parametrize("kind", ["tar", "deflated"])
def test_workers_open_their_own_handles(kind, paths):
    dataset = build(paths[kind])
    assert dataset[0]
    place = dataset.members[1]
    mine = archives._handles[place.archive]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        theirs = pool.apply(worker_handles, (place,))
    assert theirs[place.archive] != mine and len(theirs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["zip", "shards"])
def test_workers_of_every_kind(kind, method, paths):
    args = arguments(paths[kind], "--input-size", 32)
    dataset = build(paths[kind], transform=datasets.build_transform(False, args))
    alone = [(image.sum().item(), label) for image, label in dataset]
    loader = DataLoader(dataset, batch_size=1, num_workers=2, multiprocessing_context=method)
    assert [(image.sum().item(), label.item()) for image, label in loader] == alone


def test_shards_beyond_the_number_of_open_files(paths, monkeypatch):
    monkeypatch.setattr(archives, "OPEN", 2)
    dataset = build(paths["shards"])
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert len(contents(dataset)) == 80 and len(dataset.members.archives) == 3
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


# ---------------------------------------------------------------- which kind, and what is refused


def test_other_names_of_the_splits(images, paths, tmp_path):
    shutil.copytree(images / "train", tmp_path / "training")
    shutil.copy(paths["zip"] / "val.zip", tmp_path / "test1.zip")
    words = ("--train-split", "training", "--val-split", "test1")
    assert contents(build(tmp_path, *words)) == contents(build(images))
    assert contents(build(tmp_path, *words, split="val")) == contents(build(images, split="val"))
    assert "no such data folder" in refused(tmp_path)
    for name in ("../x", "", ".", "a/b", "x" * 61):
        with pytest.raises(SystemExit):
            arguments(tmp_path, "--val-split", name)


@pytest.mark.parametrize("kind", ["tar", "zip", "list", "shards"])
def test_two_kinds_of_one_split_are_refused_with_both_named(kind, images, paths, tmp_path):
    data = shutil.copytree(paths[kind], tmp_path / "data")
    shutil.copytree(images / "val", data / "val")
    line = refused(data)
    assert line.startswith("more than one data set for val (") and str(data / "val") in line
    assert any(str(path) in line for path in data.glob("val?*") if path.name != "val")
    assert len(build(data)) == 80


def test_what_is_no_data_set_is_refused(paths, tmp_path):
    assert "no such data folder" in refused(tmp_path)
    assert "no such data folder" in refused(tmp_path / "nowhere")
    (tmp_path / "val.tar.gz").write_bytes(b"\x1f\x8b")
    assert "a compressed archive" in refused(tmp_path)
    assert "neither a folder nor a zip archive" in refused(paths["tar"] / "val.tar")
    line = refused(paths["single"], "--val-split", "test")
    assert "all.zip!/test/): expected test/CLASS/*, found train, val" in line


def test_a_level_too_many_and_one_class_in_an_archive(images, tmp_path):
    inside = [(f"images/{path.parent.name}/{path.name}", path) for path in files(images, "train")]
    write_zip(tmp_path / "train.zip", inside)
    line = refused(tmp_path, split="train")
    assert "a class folder that holds only folders" in line and "train.zip!/images)" in line
    write_zip(tmp_path / "train.zip", [(f"ant/{path.name}", path) for path in files(images, "train")[:3]])
    assert "only one class" in refused(tmp_path, split="train")


def test_what_is_not_read_in_an_archive_is_counted(images, tmp_path, capsys):
    some = [(f"{path.parent.name}/{path.name}", path) for path in files(images, "train")[::15]]
    notes = tmp_path / "notes.txt"
    notes.write_text("x")
    more = ["ant/notes.txt", "loose.png", ".cache/x.png", "__MACOSX/ant/x.png", "ant/._0.png", "bee/.DS_Store"]
    write_zip(tmp_path / "train.zip", [*some, ("ant/sub/x.png", some[0][1]), *((name, notes) for name in more)])
    assert len(build(tmp_path)) == len(some) + 1
    said = capsys.readouterr().out
    assert "train.zip): 2 hidden or outside a class folder, 1 .txt" in said


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train.csv", "", "no images"),
        ("train.csv", "a.png,cat\n", "expected path,label in the first line"),
        ("train.csv", "path,label\na.png\n", "a row without path or label (TMP/train.csv, row 2)"),
        ("train.csv", "path,label\nx.png,cat\nx.png,dog\n", "an image that is listed twice (TMP/train.csv: x.png)"),
        ("train.csv", "path,label\nx.png,cat\ngone.png,dog\n", "1 images of a list are not there (TMP/train.csv)"),
        ("train.csv", "path,label\n\0,\xff\n".encode("latin1"), "cannot read a text file"),
        ("train_map.txt", "x.png 0\n", "not a line of a map (TMP/train_map.txt, line 1)"),
        ("train_map.txt", "x.png\tcat\n", "not a line of a map (TMP/train_map.txt, line 1)"),
        ("train_map.txt", "gone.png\t0\n", "an image that is not there, or listed twice (TMP/train.zip!/gone.png)"),
        ("train_map.txt", "x.png\t0\nx.png\t1\n", "an image that is not there, or listed twice"),
        ("train_map.txt", "x.png\t0\ny.png\t9\n", "a class number without a name (TMP/train_map.txt: 9; the class map"),
    ],
)
def test_lists_and_maps_that_cannot_be_right(name, content, says, images, tmp_path):
    for copy in ("x.png", "y.png"):
        shutil.copy(files(images, "train")[0], tmp_path / copy)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if name.endswith(".txt"):
        write_zip(tmp_path / "train.zip", [(copy, tmp_path / copy) for copy in ("x.png", "y.png")])
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert says.replace("TMP", str(tmp_path)) in refused(tmp_path, split="train")


def test_images_that_a_map_does_not_list_are_a_warning(paths, tmp_path, capsys):
    data = shutil.copytree(paths["swin"], tmp_path / "data")
    lines = (data / "val_map.txt").read_text().splitlines()
    (data / "val_map.txt").write_text("\n".join(lines[3:]))
    assert len(build(data, split="val")) == 37
    assert "3 images of" in capsys.readouterr().err


def test_shards_that_cannot_be_right(images, paths, tmp_path, capsys):
    image = files(images, "train")[0].read_bytes()
    for members, says in (
        ([("a.png", image)], "an image without a label (TMP/train-0.tar!/a.png): expected a.cls, or a label in a.json"),
        ([("a.png", image), ("a.json", b"{")], "an image without a label"),
        ([("a.png", image), ("a.json", b'{"label": null}')], "an image without a label"),
        ([("a.png", image), ("a.jpg", image), ("a.cls", b"0")], "two images of one key (TMP/train-0.tar!/a)"),
    ):
        with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
            for name, data in members:
                add(tar, name, data)
        assert says.replace("TMP", str(tmp_path)) in refused(tmp_path, split="train")
    data = shutil.copytree(paths["shards"], tmp_path / "data")
    (data / "val-000001.tar").unlink()
    assert build(data, split="val", classes=list(CLASSES))
    assert "1 shards are missing" in capsys.readouterr().err


# ---------------------------------------------------------------- names of classes


def test_numbers_without_names_are_in_their_order(images, tmp_path):
    with open(tmp_path / "train.csv", "w") as file:
        file.write("path,label\n")
        for number, path in enumerate(files(images, "train")[:24]):
            file.write(f"{path},{number % 12}\n")
    assert build(tmp_path).classes == [str(number) for number in range(12)]


def test_a_class_map_names_the_numbers(paths, tmp_path):
    for kind in ("swin", "shards"):
        data = shutil.copytree(paths[kind], tmp_path / kind)
        (data / "classes.txt").unlink()
        assert build(data).classes == ["0", "1", "2", "3"]
        names = tmp_path / "names.txt"
        names.write_text("w\nx\ny\nz\n")
        assert build(data, "--class-map", names).classes == ["w", "x", "y", "z"]
        names.write_text("w\nx\ny\nz\nunused\n")
        assert "a class without images" in refused(data, "--class-map", names, split="train")
        for text in ("", "a\n\nb\nc\nd\n", "a\na\nb\nc\n"):
            names.write_text(text)
            assert "not a class map" in refused(data, "--class-map", names, split="train")
    assert "cannot read a text file" in refused(paths["swin"], "--class-map", tmp_path / "gone", split="train")


def test_a_class_map_orders_the_folders(images, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("dog\ncat\nbee\nant\n")
    dataset = build(images, "--class-map", names)
    assert dataset.classes == ["dog", "cat", "bee", "ant"]
    assert Counter(label for path, label in dataset.samples if "/dog/" in path) == {0: 20}
    names.write_text("dog\ncat\nbee\n")
    assert "add it to the class map" in refused(images, "--class-map", names, split="train")


def test_a_class_map_gives_the_order_of_a_classifiers_outputs(paths, tmp_path):
    """Of one without names: 0 is the first output, whatever its name."""
    data = shutil.copytree(paths["shards"], tmp_path / "data")
    (data / "classes.txt").write_text("z\ny\nx\nw\n")
    named = build(data, split="val", head=4)
    assert named.classes == ["z", "y", "x", "w"]
    (data / "classes.txt").unlink()
    numbered = build(data, split="val", head=4)
    assert numbered.classes == ["0", "1", "2", "3"] and numbered.samples == named.samples
    assert "or name the numbers with --class-map" in refused(data, classes=["w", "x", "y", "z"])
    assert "val has 4 classes, the weights 9" in refused(data, head=9)


def test_a_class_of_val_that_training_does_not_know(paths):
    for kind in KINDS:
        assert "a class that training does not know" in refused(paths[kind], classes=["ant", "bee", "cat"])


# ---------------------------------------------------------------- a flat val folder


@pytest.fixture
def flat(images, tmp_path):
    """train/CLASS and a flat val; return the folder, and the class of each val image in the order of names."""
    data = tmp_path / "flat"
    shutil.copytree(images / "train", data / "train")
    (data / "val").mkdir()
    classes = []
    for number, path in enumerate(shuffled(files(images, "val")), start=1):
        shutil.copy(path, data / "val" / f"ILSVRC2012_val_{number:08}.png")
        classes.append(path.parent.name)
    return data, classes


@pytest.mark.parametrize("form", ["lines", "rows", "header"])
def test_labels_of_a_flat_val_folder(form, flat, images, tmp_path):
    data, classes = flat
    rows = [f"ILSVRC2012_val_{number:08}.png,{name}" for number, name in enumerate(classes, start=1)]
    lines = {"lines": classes, "rows": rows[::-1], "header": ["filename,synset", *rows]}[form]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    found = build(data, "--val-labels", tmp_path / "labels.csv", split="val", classes=list(CLASSES))
    assert sorted(contents(found)) == sorted(contents(build(images, split="val")))
    assert [label for _, label in found.samples] == sorted(label for _, label in found.samples)


def test_labels_that_do_not_belong_to_a_flat_val_folder(flat, paths, tmp_path, capsys):
    data, classes = flat
    labels = tmp_path / "labels.csv"
    words = ("--val-labels", labels)
    labels.write_text("\n".join(classes[1:]))
    assert "39 lines, 40 images" in refused(data, *words)
    labels.write_text("ILSVRC2012_val_00000001.png,ant\n")
    assert "39 images without a label" in refused(data, *words)
    labels.write_text("x.png,\n")
    rows = [f"ILSVRC2012_val_{number:08}.png,{name}" for number, name in enumerate(classes, start=1)]
    labels.write_text("\n".join([*rows, "other.png,ant"]))
    assert len(build(data, *words, split="val", classes=list(CLASSES))) == 40
    assert "1 of 41 labels" in capsys.readouterr().err
    assert "labels for what is no folder" in refused(paths["zip"], *words)
    assert "--val-labels FILE" in refused(data)


# ---------------------------------------------------------------- --val-fraction


@pytest.fixture
def train_only(images, tmp_path):
    data = tmp_path / "only"
    shutil.copytree(images / "train", data / "train")
    for path in files(data, "train"):
        if path.parent.name == "dog" and path.stem != "0":
            path.unlink()
    return data  # 20, 20, 20 and 1 images


def divide(data, *words):
    return [part.samples for part in sources.held_out(arguments(data, "--val-fraction", 0.25, *words))]


def test_a_part_of_every_class_is_held_out_by_the_seed(train_only, capsys):
    train, val = divide(train_only)
    assert Counter(name for _, name in val) == {"ant": 5, "bee": 5, "cat": 5}
    assert Counter(name for _, name in train) == {"ant": 15, "bee": 15, "cat": 15, "dog": 1}
    assert not set(train) & set(val) and train == sorted(train, key=lambda each: (each[1], each[0]))
    assert "val: 15 of 61 images of" in capsys.readouterr().out
    assert divide(train_only) == [train, val] and divide(train_only, "--seed", 1) != [train, val]
    assert divide(train_only, "--seed", -1)[0]
    with pytest.raises(UserError, match="no image is held out"):
        sources.held_out(arguments(train_only, "--val-fraction", 0.01))


def test_archives_are_divided_like_folders(images, paths, tmp_path):
    names = []
    for kind in ("folder", "zip"):
        data = shutil.copytree(paths[kind], tmp_path / kind)
        for path in data.glob("val*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        train, val = datasets.build_datasets(arguments(data, "--val-fraction", 0.25))
        assert len(train) == 60 and len(val) == 20
        names.append([path.removeprefix(str(data / "train")).lstrip(".zip!") for path, _ in val.samples])
        read = build(data, "--val-fraction", 0.25, split="val")
        assert contents(read) == contents(build(data, "--val-fraction", 0.25, split="val"))
    assert names[0] == names[1]


def test_val_beside_a_fraction_is_refused(images, paths):
    for kind in ("folder", "single"):
        with pytest.raises(UserError, match="two sets to validate on"):
            divide(paths[kind])


def test_the_division_is_read_back(train_only, tmp_path):
    odd = train_only / "train" / "ant" / os.fsdecode(b" \xff\r\n,.png")  # no UTF-8, and more than one line
    (train_only / "train" / "ant" / "1.png").rename(odd)
    args = arguments(train_only, "--val-fraction", 0.25)
    run = tmp_path / "run"
    run.mkdir()
    train, val = datasets.build_datasets(args)
    write_text(run / "split.csv", datasets.records(args, train, val)["split.csv"])
    (run / "checkpoint.pth").touch()
    first = divide(train_only)
    for source in (run, run / "checkpoint.pth"):
        assert divide(train_only, "--seed", 5, "--resume", source) == first
    (train_only / "train" / "ant" / "0.png").unlink()
    with pytest.raises(UserError, match="other images than the run divided"):
        divide(train_only, "--resume", run)


@pytest.mark.slow
def test_a_run_scores_what_it_held_out(train_only, tmp_path, capsys):
    run = tmp_path / "run"
    words = [*SMALL_RUN, "--data-path", train_only, "--output_dir", run]
    assert here(*words, "--val-fraction", 0.25, "--epochs", 1) == 0
    trained = log_lines(run)[-1]
    capsys.readouterr()
    evaluate = ["--eval", "--resume", run / "checkpoint.pth", "--data-path", train_only, "--device", "cpu"]
    assert here(*evaluate, "--predictions", tmp_path / "p.csv", "--num_workers", 0) == 0
    said = capsys.readouterr().out
    assert f"val: 15 of 61 images of {train_only / 'train'} held out, as in {run / 'split.csv'}" in said
    assert f"Acc@1 {trained['test_acc1']:.3f}" in said and f"loss {trained['test_loss']:.3f}" in said
    with open(tmp_path / "p.csv", newline="") as file:
        scored = {row["path"].removeprefix(str(train_only)) for row in csv.DictReader(file)}
    lines = (run / "split.csv").read_text().splitlines()
    stored = {row["path"] for row in csv.DictReader(lines) if row["split"] == "val"}
    assert scored == stored and len(stored) == 15 and len(lines) == 62
    (run / "split.csv").rename(run / "moved.csv")
    assert here(*evaluate) == 2
    assert "no record of the images held out" in capsys.readouterr().err
    make_images(train_only / "val", classes=("ant", "bee", "cat"), each=2)
    assert here(*evaluate) == 0
    assert "not what the run held out of train" in capsys.readouterr().out


def test_more_val_than_train_is_a_warning(images, tmp_path, capsys):
    shutil.copytree(images / "train", tmp_path / "val")
    shutil.copytree(images / "val", tmp_path / "train")
    datasets.check_sizes(*datasets.build_datasets(arguments(tmp_path)))
    assert "val has more images than train (80, 40): are the two swapped?" in capsys.readouterr().err
    datasets.check_sizes(*datasets.build_datasets(arguments(images)))
    assert not capsys.readouterr().err


# ---------------------------------------------------------------- the page about it


def test_the_export_of_the_page_makes_a_zip_that_is_read(images, tmp_path, monkeypatch):
    """With a stand-in for Hugging Face's package, whose rows hold the bytes of files."""

    class Rows(list):
        features = {"label": SimpleNamespace(names=["ant/x", *CLASSES[1:]])}

    class Splits(dict):
        def cast_column(self, column, kind):
            assert (column, kind) == ("img", {"decode": False})
            return self

    def rows(split):
        return Rows(
            {"img": {"bytes": path.read_bytes(), "path": None}, "label": CLASSES.index(path.parent.name)}
            for path in shuffled(files(images, split))
        )

    stand_in = types.ModuleType("datasets")
    stand_in.Image, stand_in.load_dataset = dict, lambda name: Splits(train=rows("train"), test=rows("val"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    (code,) = (block for block in blocks if "load_dataset" in block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    exec(code, {})
    monkeypatch.undo()
    for split in SPLITS:
        found = build(tmp_path / "data.zip", split=split)
        assert found.classes == ["ant_x", *CLASSES[1:]]
        assert sorted(contents(found)) == sorted(contents(build(images, split=split)))


@pytest.mark.parametrize("code", ["from datasets import load_dataset", "import datasets; datasets.load_dataset"])
def test_how_our_module_hides_the_package_of_that_name(code):
    done = subprocess.run([sys.executable, "-c", f"import gvt; {code}"], capture_output=True, text=True, cwd=ROOT)
    line = done.stderr.splitlines()[-1].split("(")[0].split(". Did")[0].strip()
    assert line in (ROOT / "docs" / "data.md").read_text()
