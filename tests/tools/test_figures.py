"""tools/figures.py: the images show what the records and the demos say."""

import functools
import json

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from tools import figures
from tools.readme_tables import read_json, record
from training.errors import exit_code

run = functools.partial(exit_code, "figures.py", figures.main)


def texts(figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}


def test_speed():
    shown = texts(figures.speed())
    for task in ("inference", "training"):
        for case in read_json(record(f"cpu_{task}"), "cases")["cases"]:
            eager = [ratio["median"] for ratio in case["ratios"] if ratio["ours"] == ratio["mode"] == "eager"]
            assert f"{eager[0]:.2f}" in shown
    assert {"PCPVT\nSmall", "SVT\nLarge", "float32", "bfloat16"} <= shown


def test_model():
    figure = figures.model()
    assert {"LSA", "GSA", "LN", "MLP", "Twins-SVT", "PCPVT"} <= texts(figure)
    svt, pcpvt = (line.get_xydata() for line in figure.axes[1].lines[:2])
    assert svt[:, 1].tolist() == [81.7, 83.2, 83.7] and pcpvt[:, 1].tolist() == [81.2, 82.7, 83.1]
    rates, _ = figures.rates("cpu_inference", "bfloat16")
    assert svt[:, 0].tolist() == [rates[f"alt_gvt_{size}", "ours"] for size in ("small", "base", "large")]


def test_other_networks_are_shown_if_they_were_measured_on_the_same_machine(monkeypatch):
    rates = {"cpu_inference": figures.rates("cpu_inference", "bfloat16")}
    rates["cpu_peers"] = {("alt_gvt_small", "pvt_v2_b2"): 10.0}, rates["cpu_inference"][1]
    monkeypatch.setattr(figures, "rates", lambda name, dtype: rates[name])
    assert "PVTv2-B2" in texts(figures.model())
    rates["cpu_peers"] = rates["cpu_peers"][0], "another CPU"
    assert "PVTv2-B2" not in texts(figures.model())


def test_demo(tmp_path, monkeypatch):
    log = [dict(epoch=epoch, train_loss=2.0 - epoch, test_loss=1.0, test_acc1=50.0 + epoch) for epoch in range(2)]
    (tmp_path / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in log))
    (tmp_path / "checkpoint_best.pth").touch()
    image = np.zeros((32, 32, 3))
    monkeypatch.setattr(figures.plot_run, "predict", lambda *args: [(image, "3", "3")] * 23 + [(image, "3", "8")])
    figure = figures.demo(tmp_path)
    assert any("23 of 24 correct" in text for text in texts(figure))
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[2.0, 1.0], [1.0, 1.0]]
    titles = [axis.title for axis in figure.axes[2:]]
    assert [title.get_color() for title in titles] == ["black"] * 23 + ["tab:red"]


def test_dense(tmp_path):
    """Left halves are labels, right halves results."""
    for name in ("segmentor", "detector"):
        (tmp_path / name / "images").mkdir(parents=True)
        for number in figures.SCENES:
            pixels = np.zeros((8, 16, 3), np.uint8)
            pixels[:, 8:] = number
            Image.fromarray(pixels).save(tmp_path / name / "images" / f"{number:04d}.png")
    shown = [axis.images[0].get_array().max() for axis in figures.dense(tmp_path).axes]
    assert shown == [value for number in figures.SCENES for value in (0, number, number)]


def test_the_program(tmp_path, capsys, monkeypatch):
    assert run(["speed", "--output", str(tmp_path / "images")]) == 0
    with Image.open(tmp_path / "images" / "speed.png") as image:
        assert image.width > 1200
    assert run(["sped", "--output", str(tmp_path)]) == 2
    assert "no such image (sped): choose from model" in capsys.readouterr().err
    monkeypatch.setitem(figures.FIGURES, "demo", lambda: figures.demo(tmp_path))
    monkeypatch.setitem(figures.FIGURES, "dense", lambda: figures.dense(tmp_path))
    capsys.readouterr()
    for name, command in (("demo", "make demo"), ("dense", "make demo-dense")):
        assert run([name, "--output", str(tmp_path)]) == 2
        assert f"run `{command}` first" in capsys.readouterr().err


def test_all_images_without_names(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {"a": Figure, "b": Figure})
    assert run(["--output", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
