"""--bad-images skip: training images that cannot be read are replaced by others of their class, exactly."""

import shutil

import pytest
import torch
from conftest import errors_of, launch, log_lines, run_main
from runs import here, parse, same, small, stop_at, weights

import datasets
from training import bad_images, files
from training.errors import UserError

BROKEN = ("bee/3.png", "cat/0.png")


@pytest.fixture
def broken(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "data")
    for name in BROKEN:
        (tmp_path / "data" / "train" / name).write_bytes(b"no image")
    return tmp_path / "data"


def listed(folder):
    return sorted(line.split("\t") for line in (folder / "bad_images.txt").read_text().splitlines())


def batches(data, folder, *words):
    folder.mkdir()
    args = parse(*small(data, folder, "--bad-images", "skip", *words))
    train_set, _ = datasets.build_datasets(args)
    loader = datasets.build_train_loader(args, train_set, torch.device("cpu"))
    loader.sampler.set_epoch(1)
    return [(images.pixels, labels) for images, labels in loader]


def test_the_same_images_whatever_the_number_of_workers(broken, toy, tmp_path):
    alone = batches(broken, tmp_path / "a")
    shared = batches(broken, tmp_path / "b", "--num_workers", 2)
    whole = batches(toy, tmp_path / "c")
    assert len(alone) == len(shared) == len(whole) == 6
    for (images, labels), (others, other_labels), (_, expected) in zip(alone, shared, whole):
        assert torch.equal(images, others) and torch.equal(labels, other_labels) and torch.equal(labels, expected)
    changed = [a != b for x, y in zip(alone, whole) for a, b in zip(map(hash_of, x[0]), map(hash_of, y[0]))]
    assert sum(changed) == len(BROKEN)
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert [path for path, _ in listed(folder)] == [str(broken / "train" / name) for name in BROKEN]
        assert all("cannot read an image" in reason for _, reason in listed(folder))
    assert not (tmp_path / "c" / "bad_images.txt").exists()


def hash_of(image):
    return image.numpy().tobytes()


def test_a_run_resumes_exactly_and_names_them_once(broken, tmp_path, capsys):
    words = ["--bad-images", "skip"]
    assert here(*small(broken, tmp_path / "whole", *words)) == 0
    assert capsys.readouterr().out.count("bad images: 2 so far, replaced by others of their class; listed in ") == 1
    part = small(broken, tmp_path / "part", *words)
    assert here(*part, on_poll=stop_at(1, 2)) == 143
    assert here(*part, "--resume", "auto") == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "part"))
    assert listed(tmp_path / "whole") == listed(tmp_path / "part") and len(listed(tmp_path / "part")) == 2


def test_a_run_that_one_ended_continues_without_it(broken, tmp_path, capsys):
    words = small(broken, tmp_path / "run")
    assert here(*words) == 2  # by default, an error
    assert "main.py: error: cannot read an image (" in capsys.readouterr().err
    assert not (tmp_path / "run" / "bad_images.txt").exists()
    assert here(*words, "--resume", "auto", "--bad-images", "skip") == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_end_the_run_in_a_line(workers, broken, tmp_path, capsys):
    words = ["--bad-images", "skip", "--max-bad", 1, "--num_workers", workers]
    assert here(*small(broken, tmp_path / "run", *words)) == 2
    (error,) = errors_of(capsys.readouterr().err)
    assert error.startswith("main.py: error: more than 1 training images cannot be read (--max-bad 1): repair those ")
    assert len(listed(tmp_path / "run")) == 2


def test_a_class_of_broken_images_ends_the_run_in_a_line(broken, tmp_path, capsys):
    for path in (broken / "train" / "dog").iterdir():
        path.write_bytes(b"")
    assert here(*small(broken, tmp_path / "run", "--bad-images", "skip")) == 2
    (error,) = errors_of(capsys.readouterr().err)
    assert error.startswith("main.py: error: no image of a class can be read (dog): replace them, or remove the class")


def test_validation_never_skips(toy, broken, tmp_path, capsys):
    (broken / "val" / "bee" / "3.png").write_bytes(b"no image")
    assert here(*small(broken, tmp_path / "run", "--bad-images", "skip", "--epochs", 1)) == 2
    (error,) = errors_of(capsys.readouterr().err)
    assert error.startswith("main.py: error: cannot read an image (") and "val" in error


def test_the_replacement_changes_with_the_epoch_and_stays_in_the_class():
    labels = [0] * 20 + [1] * 20
    bad = bad_images.BadImages(labels, seed=-1, file=None, most=0)
    drawn = [list(bad.candidates(epoch, 25)) for epoch in range(6)]
    assert all(order[0] == 25 and sorted(order) == list(range(20, 40)) for order in drawn)
    assert len({order[1] for order in drawn}) > 1 and drawn[2] == list(bad.candidates(2, 25))


def test_lines_are_added_once(tmp_path):
    file = tmp_path / "bad_images.txt"
    assert [files.add_line(file, key, "x") for key in ("a", "b", "a", "a b")] == [1, 2, 2, 3]
    assert files.lines(file) == [b"a\tx", b"b\tx", b"a b\tx"]


def test_a_list_that_cannot_be_written_is_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    bad = bad_images.BadImages([0], seed=0, file=tmp_path / "file" / "bad_images.txt", most=1)
    with pytest.raises(UserError, match="cannot write"):
        bad.note("a.png", 0, UserError("x"))


@pytest.mark.slow
def test_two_processes_share_the_list(broken, tmp_path):
    words = small(broken, tmp_path / "run", "--bad-images", "skip", "--num_workers", 1, "--batch-size", 4)
    done = run_main(*words, launcher=launch(2))
    assert done.returncode == 0, done.stderr
    assert [path for path, _ in listed(tmp_path / "run")] == [str(broken / "train" / name) for name in BROKEN]
    assert len(log_lines(tmp_path / "run")) == 2
