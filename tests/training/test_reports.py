"""Files about an evaluation: exact for any number of processes, and equal to the printed score."""

import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, launch, run_main
from PIL import Image

import main
from training import options, reports, resume
from training.errors import UserError

CLASSES = ("ant", "bee", "cat", "dog")


def words(classifier, toy, *more):
    return [*SMALL_RUN, "--eval", "--resume", str(classifier), "--data-path", str(toy), *map(str, more)]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def check_files(printed, folder, toy):
    """The files of 101 images: each once, with the label of its folder; top-1 as printed."""
    rows = read_csv(folder / "p.csv")
    assert sorted(row["path"] for row in rows) == sorted(map(str, toy.glob("val/*/*.png"))) and len(rows) == 101
    assert all(row["label"] == row["path"].split("/")[-2] for row in rows)
    correct = sum(row["label"] == row["prediction"] for row in rows)
    assert re.search(r"\* Acc@1 (\S+)", printed)[1] == f"{100 * correct / 101:.3f}" and 0 < correct < 101
    table = read_csv(folder / "c.csv")
    assert [row["class"] for row in table] == list(CLASSES)
    assert [int(row["support"]) for row in table] == [26, 25, 25, 25]
    assert sum(int(row["correct"]) for row in table) == correct
    for row in table:
        assert row["top1"] == f"{100 * int(row['correct']) / int(row['support']):.3f}"
        for name in CLASSES:
            number = sum(each["label"] == row["class"] and each["prediction"] == name for each in rows)
            assert int(row[f"predicted {name}"]) == number
    with Image.open(folder / "c.png") as drawn:
        assert drawn.format == "PNG" and min(drawn.size) > 400
    return rows


def test_the_files_of_an_evaluation(classifier, toy, tmp_path, capsys):
    files = ("--per-class", tmp_path / "c.csv", "--predictions", tmp_path / "p.csv")
    assert main.run(options.parse_args(words(classifier, toy, *files))) == 0
    rows = check_files(capsys.readouterr().out, tmp_path, toy)
    for row in rows:
        top = json.loads(row["top"])
        assert sorted(name for name, _ in top) == sorted(CLASSES)  # fewer than five classes: all of them
        assert [row["prediction"], float(row["probability"])] == top[0]
        assert sum(value for _, value in top) == pytest.approx(1, abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.csv", "c.png", "p.csv"]
    assert main.run(options.parse_args(words(classifier, toy, *files))) == 2
    assert "it exists already (--per-class" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_three_processes_write_the_same_files(classifier, toy, tmp_path, shared):
    """101 images are no multiple of 3: shared among the processes, or all evaluated by each."""
    files = ["--per-class", tmp_path / "c.csv", "--predictions", tmp_path / "p.csv"]
    done = run_main(*words(classifier, toy, *files, *["--dist-eval"] * shared), launcher=launch(3))
    assert done.returncode == 0, done.stderr
    rows = check_files(done.stdout, tmp_path, toy)
    alone = tmp_path / "alone.csv"
    assert main.run(options.parse_args(words(classifier, toy, "--predictions", alone))) == 0
    for row, expected in zip(rows, read_csv(alone), strict=True):
        assert (row["path"], row["prediction"]) == (expected["path"], expected["prediction"])


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_parts_come_back_in_the_order_of_the_images(world):
    whole = torch.arange(5), torch.arange(10).view(5, 2)
    parts = [tuple(column[rank::world] for column in whole) if rank < 5 else None for rank in range(world)]
    assert all(torch.equal(a, b) for a, b in zip(reports.in_order(parts, 5), whole, strict=True))


@pytest.mark.parametrize(
    ("name", "says"),
    [("x.txt", "no such format"), ("none/x.csv", "no such folder"), (".csv", "no such format"), ("", "no such format")],
)
def test_a_wrong_name_is_refused_before_anything_is_computed(tmp_path, name, says):
    args = options.parse_args(["--eval", "--resume", "x", "--predictions", str(tmp_path / name)])
    with pytest.raises(UserError, match=says):
        reports.EvalRecord(args)


def test_one_name_for_two_files_is_refused(tmp_path):
    name = str(tmp_path / "x.csv")
    with pytest.raises(UserError, match="one name for two files"):
        reports.EvalRecord(options.parse_args(["--eval", "--predictions", name, "--per-class", name]))


def test_figures_need_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="matplotlib is missing .--per-class"):
        reports.EvalRecord(options.parse_args(["--eval", "--per-class", str(tmp_path / "x.csv")]))


def test_the_options_are_not_of_a_runs_recipe():
    args = options.parse_args(["--per-class", "x.csv", "--predictions", "y.csv"])
    assert resume.recipe(vars(args)) == resume.recipe(vars(options.parse_args([])))


def test_the_options_are_for_evaluation():
    args = options.parse_args(["--per-class", "x.csv", "--predictions", "y.csv"])
    assert options.without_effect(args) == dict.fromkeys(("per_class", "predictions"), "it is for --eval")


def test_rows_by_suffix(tmp_path):
    rows = [dict(path="a\udcff.png", top=[["x", 0.5]]), dict(path='b "1",.png', top=[])]
    for name in ("x.csv", "x.json", "x.jsonl"):
        reports.write_rows(tmp_path / name, "--results", ("path", "top"), iter(rows))
    assert json.loads((tmp_path / "x.json").read_text()) == rows
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == rows
    text = (tmp_path / "x.csv").read_bytes().decode(errors="surrogateescape")
    assert [row | {"top": json.loads(row["top"])} for row in csv.DictReader(io.StringIO(text))] == rows
    reports.write_rows(tmp_path / "y.json", "--results", ("path",), [])
    assert json.loads((tmp_path / "y.json").read_text()) == []


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def fail(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        reports.write_rows(tmp_path / "x.csv", "--results", ("path",), [dict(path="a")])
    assert list(tmp_path.iterdir()) == []


def test_many_classes_are_drawn_as_their_most_confused_pairs():
    labels = np.repeat(np.arange(60), 10)
    predictions = labels.copy()
    predictions[30:37], predictions[50:53] = 7, 0  # 7 images of class 3 as class 7, 3 of class 5 as class 0
    assert reports.most_confused(labels, predictions) == [(3, 7, 7), (5, 0, 3)]
    classes = [f"a ${number}$ of {'long ' * 10}" for number in range(60)]
    figure = reports.draw_confusion(classes, labels, predictions)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [7, 3]
    assert axes.get_yticklabels()[0].get_text().startswith("a $3$ of long")
    figure.savefig(io.BytesIO(), format="png")
    assert len(reports.draw_confusion(classes[:50], labels[:500], predictions[:500] % 50).axes) == 2  # and its colors


def test_a_class_without_images_has_no_score():
    lines = "".join(reports.class_lines(["a", "b"], np.array([0, 0]), np.array([0, 1])))
    assert lines == "class,support,correct,top1,predicted a,predicted b\na,2,1,50.000,1,1\nb,0,0,,0,0\n"


def test_images_without_files_are_numbered():
    class Images:
        classes = ["a", "b"]

    rows = list(reports.prediction_rows(Images(), np.array([1]), np.array([[1, 0]]), np.array([[0.75, 0.25]])))
    assert rows == [dict(path="number 0", label="b", prediction="b", probability=0.75, top=[["b", 0.75], ["a", 0.25]])]
