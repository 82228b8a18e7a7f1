"""tools/plot_logs.py: the official runs are all there, the plot shows what it was given, and bad logs are one
line.
"""

import functools
import json

import pytest
from PIL import Image

from tools import plot_logs
from training.errors import exit_code

run = functools.partial(exit_code, "plot_logs.py", plot_logs.main)

# First epoch, epochs, best Acc@1 and its epoch, last Acc@1 of each official run.
PUBLISHED = {
    "pcpvt_s": (0, 300, 81.226, 286, 81.140),
    "pcpvt_b": (0, 300, 82.722, 292, 82.720),
    "pcpvt_l": (4, 296, 83.058, 292, 83.022),
    "svt_s": (0, 300, 81.722, 291, 81.712),
    "svt_b": (0, 300, 83.160, 298, 83.036),
    "svt_l": (0, 300, 83.666, 290, 83.650),
}


def line(epoch: int, **changes) -> str:
    return (
        json.dumps(
            {"train_lr": 1e-3, "train_loss": 2.0 - 0.1 * epoch, "test_acc1": 50.0 + epoch, "epoch": epoch} | changes
        )
        + "\n"
    )


@pytest.fixture
def run_folder(tmp_path):
    """A run of six epochs."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "log.txt").write_text("".join(map(line, range(6))))
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in place of their files."""
    drawn = []
    monkeypatch.setattr(plot_logs.Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    return drawn


def legends(figure) -> list[list[str]]:
    return [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]


def test_published_runs():
    found = {}
    for name, log in plot_logs.published_logs().items():
        best = max(log, key=lambda epoch: epoch["test_acc1"])
        assert [epoch["epoch"] for epoch in log] == list(range(300 - len(log), 300))
        found[name] = (log[0]["epoch"], len(log), best["test_acc1"], best["epoch"], log[-1]["test_acc1"])
    assert found == PUBLISHED


def test_plot(run_folder, tmp_path, capsys):
    output = tmp_path / "curves.png"
    assert run([str(run_folder), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    with Image.open(output) as image:
        assert image.format == "PNG"
        assert image.width > 1000 and image.height > 300
        colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24)}
        assert {(255, 255, 255), (31, 119, 180)} <= colors  # the page, and the line of the first log


def test_a_log_over_the_published_ones(run_folder, figures):
    assert run([str(run_folder)]) == 0
    (figure,) = figures
    assert legends(figure) == [[str(run_folder)], list(PUBLISHED)]
    for axis, key in zip(figure.axes, ("train_loss", "test_acc1", "train_lr")):
        lines = {drawn.get_label(): drawn for drawn in axis.lines}
        own = lines[str(run_folder)]
        log = [json.loads(text) for text in (run_folder / "log.txt").read_text().splitlines()]
        assert list(own.get_xdata()) == list(range(6))
        assert list(own.get_ydata()) == [epoch[key] for epoch in log]
        assert list(lines["svt_b"].get_xdata()) == list(range(6))  # no further than ours
        assert list(lines["pcpvt_l"].get_xdata()) == [4, 5]
        assert lines["svt_b"].get_linewidth() < own.get_linewidth()
        red, green, blue, _ = lines["svt_b"].get_color()
        assert red == green == blue


def test_published_runs_alone(figures):
    assert run([]) == 0
    assert legends(figures[0]) == [list(PUBLISHED)]
    assert [len(drawn.get_xdata()) for drawn in figures[0].axes[1].lines] == [
        epochs for _, epochs, *_ in PUBLISHED.values()
    ]
    assert len({drawn.get_color() for drawn in figures[0].axes[1].lines}) == 6


def test_choice_of_published_runs(run_folder, figures):
    assert run([str(run_folder / "log.txt"), "--published", "svt_s", "pcpvt_s"]) == 0
    assert run([str(run_folder), "--no-published"]) == 0
    assert legends(figures[0]) == [[str(run_folder)], ["svt_s", "pcpvt_s"]]
    assert legends(figures[1]) == [[str(run_folder)]]


def test_log_of_one_epoch(tmp_path):
    (tmp_path / "one.txt").write_text(line(0))
    assert run([str(tmp_path / "one.txt"), "-o", str(tmp_path / "one.png")]) == 0
    assert (tmp_path / "one.png").exists()


BAD = {
    "empty": ("", "empty log"),
    "not JSON": (line(0) + "Epoch: [1]\n", "line 2): give"),
    "cut off": (line(0) + line(1)[:20] + "\n", "not JSON"),
    "not an object": ("[1, 2]\n", "no number for epoch"),
    "of another program": ('{"epoch": 0, "loss": 1.0}\n', "no number for train_loss, test_acc1, train_lr"),
    "with a word for a number": (line(0, train_loss="high"), "no number for train_loss"),
    "not text": ("\udcff\udcfe", "not a log"),
}


@pytest.mark.parametrize("content, part", BAD.values(), ids=BAD)
def test_a_bad_log_is_one_line(content, part, tmp_path, capsys):
    log = tmp_path / "log.txt"
    log.write_bytes(content.encode(errors="surrogateescape"))
    assert_one_line([str(log), "-o", str(tmp_path / "curves.png")], part, capsys)
    assert not (tmp_path / "curves.png").exists()


def test_a_missing_log_is_one_line(tmp_path, capsys):
    assert_one_line([str(tmp_path / "none.txt")], "none.txt): give", capsys)
    assert_one_line([str(tmp_path)], "log.txt): give", capsys)  # a folder without one


def test_other_errors_are_one_line(run_folder, tmp_path, capsys):
    for name in ("'swin_t' (choose from", "pcpvt_s", "pcpvt_b", "pcpvt_l", "svt_s", "svt_b", "svt_l"):
        assert_one_line(["--published", "swin_t"], name, capsys)
    assert_one_line(["--no-published"], "nothing to draw", capsys)
    assert_one_line([str(run_folder), "-o", str(tmp_path / "none" / "curves.png")], "cannot write", capsys)
    assert_one_line([str(run_folder), "-o", str(tmp_path / "curves.nonsense")], "cannot write", capsys)


def assert_one_line(argv, part, capsys):
    try:
        code = run(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("plot_logs.py: error: ")
    assert part in error
    assert error.count("\n") == 1
