"""tools/plot_run.py: curves and predictions of a run."""

import sys

import pytest
from conftest import SMALL_RUN
from PIL import Image

import main
from tools import plot_run
from training import options
from training.errors import UserError


def test_curves_and_predictions(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    words = [*SMALL_RUN, "--epochs", "1", "--data-path", str(toy), "--output_dir", str(tmp_path / "run")]
    assert main.run(options.parse_args(words)) == 0
    predictions = plot_run.predict(tmp_path / "run", str(toy), 10)
    assert len(predictions) == 10 and {label for _, label, _ in predictions} == {"ant", "bee", "cat", "dog"}
    assert all(pixels.shape == (32, 32, 3) and pixels.min() >= 0 and pixels.max() <= 1 for pixels, _, _ in predictions)
    plot_run.main([str(tmp_path / "run"), "--data-path", str(toy), "--output", str(tmp_path / "x.png")])
    with Image.open(tmp_path / "x.png") as drawn:
        assert drawn.size[0] > 1000
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "x.png")


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no log"):
        plot_run.main([str(tmp_path), "--data-path", "x"])
