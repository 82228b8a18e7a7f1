"""What a run tells of its epochs: summary.csv, curves.png, TensorBoard, Weights & Biases, and its lines with the ETA."""

import csv
import os
import pty
import subprocess
import sys
import types

import gvt  # noqa: F401  registers the models

# isort: split
import pytest
from conftest import ROOT, SMALL_RUN, log_lines, run_main
from PIL import Image

import main
import utils
from training import curves, loggers, options
from training.progress import LiveLine, Pace


def here(*words, **hooks):
    return main.run(options.parse_args([str(word) for word in words]), **hooks)


def small(toy, folder, *words):
    return [*SMALL_RUN, "--data-path", toy, "--warmup-epochs", 0, "--lr", "1e-2", "--output_dir", folder, *words]


def cut(monkeypatch, at):
    """Let a run end as by a kill before it writes the log of epoch `at`."""
    original = main.RunFolder.write_log

    def stop(folder, line):
        if line["epoch"] == at:
            raise KeyboardInterrupt
        original(folder, line)

    with monkeypatch.context() as patched:
        patched.setattr(main.RunFolder, "write_log", stop)
        yield


# ---------------------------------------------------------------- summary.csv and curves.png


def test_the_table_has_the_lines_of_the_log_after_a_crash_and_a_resume(toy, tmp_path, monkeypatch):
    words = small(toy, tmp_path, "--epochs", 3, "--eval-interval", 2)
    for _ in cut(monkeypatch, 1):
        with pytest.raises(KeyboardInterrupt):
            here(*words)
    assert here(*words, "--resume", "auto") == 0
    with open(tmp_path / "summary.csv", newline="") as file:
        header, *rows = csv.reader(file)
    lines = log_lines(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1, 2] and header == list(lines[0])
    as_text = [["" if value is None else str(value) for value in line.values()] for line in lines]
    assert rows == as_text and rows[0][header.index("test_acc1")] == ""


def test_curves_are_drawn_after_each_epoch(toy, tmp_path, monkeypatch):
    drawn, original = [], curves.draw
    monkeypatch.setattr(curves, "draw", lambda log, title: drawn.append(len(log)) or original(log, title))
    assert here(*small(toy, tmp_path, "--model-ema", "--epochs", 2, "--eval-interval", 2)) == 0
    assert drawn == [1, 2]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.width >= 1000


def test_points_of_the_curves_are_the_numbers_of_the_log():
    log = [{"epoch": k, "train_loss": 2.0 - k, "test_loss": 1.0, "test_acc1": a} for k, a in ((0, None), (1, 40.0))]
    log = [line | {"train_lr": 1e-3} for line in log]
    losses, accuracy, _ = curves.draw(log, "x").axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[2.0, 1.0], [1.0, 1.0]]
    assert list(accuracy.lines[0].get_xdata()) == [1] and list(accuracy.lines[0].get_ydata()) == [40.0]


def test_without_matplotlib_a_line_says_so_and_the_run_goes_on(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    assert here(*small(toy, tmp_path)) == 0
    assert capsys.readouterr().out.count("no curves.png: matplotlib is missing (pip install ") == 1
    assert not (tmp_path / "curves.png").exists()


def test_a_failing_logger_is_warned_of_once_and_never_ends_a_run(toy, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError("no room for a figure")

    monkeypatch.setattr(curves, "draw", fail)
    assert here(*small(toy, tmp_path)) == 0
    error = capsys.readouterr().err
    assert error.count("curves.png is left out from here on, the run goes on: MemoryError: no room for a figure") == 1
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0, 1]


# ---------------------------------------------------------------- TensorBoard and Weights & Biases


@pytest.mark.parametrize(("option", "package"), [("--log-tensorboard", "tensorboard"), ("--log-wandb", "wandb")])
def test_a_missing_package_is_one_line(option, package, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    assert here(*small(toy, tmp_path / "run", option)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"main.py: error: {package} is missing ({option}): pip install {package}"
    assert not (tmp_path / "run").exists()


class FakeWriter:
    made = []

    def __init__(self, log_dir, purge_step):
        self.log_dir, self.purge_step, self.scalars, self.closed = log_dir, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, name, value, global_step):
        self.scalars.append((name, value, global_step))

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_tensorboard_gets_the_figures_and_hides_what_is_trained_again(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=FakeWriter))
    monkeypatch.setattr(loggers, "find_spec", lambda name: True)
    FakeWriter.made.clear()
    words = small(toy, tmp_path, "--epochs", 3, "--log-tensorboard")
    for _ in cut(monkeypatch, 1):
        with pytest.raises(KeyboardInterrupt):
            here(*words)
    assert here(*words, "--resume", "auto") == 0
    first, second = FakeWriter.made
    assert first.log_dir == str(tmp_path / "tb") and (first.purge_step, second.purge_step) == (0, 1)
    assert second.closed
    found = {(name, step): value for writer in (first, second) for name, value, step in writer.scalars}
    for line in log_lines(tmp_path):
        for name in ("train_loss", "train_lr", "test_loss", "test_acc1"):
            assert found[name, line["epoch"]] == line[name]


class FakeRun:
    def __init__(self, fail_at=None):
        self.logged, self.finished, self.fail_at = [], False, fail_at

    def log(self, values, step):
        if step == self.fail_at:
            raise OSError("no network")
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb_continues_its_run_after_a_resume(toy, tmp_path, monkeypatch):
    calls, runs = [], []

    def init(**settings):
        calls.append(settings)
        runs.append(FakeRun())
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setattr(loggers, "find_spec", lambda name: True)
    monkeypatch.setenv("WANDB_PROJECT", "birds")
    words = small(toy, tmp_path / "run", "--epochs", 3, "--log-wandb")
    for _ in cut(monkeypatch, 2):
        with pytest.raises(KeyboardInterrupt):
            here(*words)
    assert here(*words, "--resume", "auto") == 0
    assert [call["id"] for call in calls] == [calls[0]["id"]] * 2 and calls[0]["resume"] == "allow"
    assert calls[0]["project"] == "birds" and calls[0]["name"] == "run" and calls[0]["config"]["lr"] == 1e-2
    assert calls[0]["dir"] == str(tmp_path / "run")
    lines = log_lines(tmp_path / "run")
    logged = [entry for run in runs for entry in run.logged]
    assert [step for step, _ in logged] == [0, 1, 2] and runs[-1].finished
    assert [values["test_acc1"] for _, values in logged] == [line["test_acc1"] for line in lines]
    assert here(*words, "--overwrite") == 0 and calls[2]["id"] != calls[0]["id"]


@pytest.mark.parametrize("where", ["init", "log"])
def test_wandb_without_a_network_is_a_warning(where, toy, tmp_path, monkeypatch, capsys):
    def init(**settings):
        if where == "init":
            raise RuntimeError("api_key not configured (no-tty)")
        return FakeRun(fail_at=0)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setattr(loggers, "find_spec", lambda name: True)
    assert here(*small(toy, tmp_path, "--log-wandb")) == 0
    reason = "RuntimeError: api_key not configured (no-tty)" if where == "init" else "OSError: no network"
    assert capsys.readouterr().err.count(f"wandb is left out from here on, the run goes on: {reason}") == 1


@pytest.mark.slow
def test_the_real_loggers_where_they_are_installed(toy, tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    words = small(toy, tmp_path, "--log-tensorboard", "--log-wandb")
    done = run_main(*words, env={"WANDB_MODE": "offline"})
    assert done.returncode == 0 and "left out" not in done.stderr
    assert list((tmp_path / "tb").glob("events.*")) and list((tmp_path / "wandb").glob("offline-run-*"))


# ---------------------------------------------------------------- the lines of a run


@pytest.mark.parametrize(
    "durations",
    [
        [1.0] * 100,
        [30.0] + [1.0] * 99,  # the first compiles, and starts the workers
        [5.0] * 8 + [1.0] * 92,
        [0.1, 0.1, 0.1, 3.7] * 25,  # batches that come four at a time
        [1.0 + 0.1 * (k % 7) for k in range(100)],
    ],
)
def test_the_eta_is_right_at_half_of_the_loop(durations, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(utils.time, "perf_counter", lambda: clock[0])

    class Batches:
        def __iter__(self):
            for seconds in durations:
                yield [[0]]
                clock[0] += 60 * seconds

    for _ in utils.MetricLogger().log_every(Batches(), len(durations), "Epoch: [0]"):
        pass
    line = next(line for line in capsys.readouterr().out.splitlines() if "[50/100]" in line.replace(" ", ""))
    parts = line.split("eta: ")[1].split("  ")[0]
    days, _, hours = parts.rpartition("day")
    h, m, s = map(int, hours.replace("s, ", "").replace(", ", "").split(":"))
    found = (int(days) if days else 0) * 86400 + 3600 * h + 60 * m + s
    assert found == pytest.approx(60 * sum(durations[51:]), rel=0.15)


def test_the_eta_of_a_run_leaves_out_its_slow_start():
    pace = Pace()
    assert pace.left(10) == 0
    for seconds in (90.0, 10.0, 11.0, 9.0, 10.0):
        pace.add(seconds)
    assert pace.left(5) == pytest.approx(50, rel=0.15)


@pytest.mark.slow
def test_files_get_plain_lines(toy, tmp_path):
    done = run_main(*small(toy, tmp_path))
    assert done.returncode == 0 and not {"\r", "\x1b"} & set(done.stdout + done.stderr)
    assert "Epoch: [0]  [0/6]  eta: 0:00:0" in done.stdout
    assert "Epoch: [0] of 2 done, the run's eta: 0:00:0" in done.stdout


@pytest.mark.slow
def test_a_terminal_gets_one_line_that_changes(toy, tmp_path):
    parent, child = pty.openpty()
    command = [sys.executable, str(ROOT / "main.py"), *map(str, small(toy, tmp_path, "--epochs", 1))]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "60"}
    program = subprocess.Popen(command, stdout=child, stderr=subprocess.DEVNULL, env=settings, cwd=ROOT)
    os.close(child)
    seen = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the end of a terminal
            break
        if not part:
            break
        seen += part
    assert program.wait() == 0
    text = seen.decode()
    live = [part for part in text.split("\x1b[2K") if part.startswith(("Epoch: [0]  [", "Test:  ["))]
    assert live and all("eta:" in part and len(part.split("\r")[0]) < 60 and "\n" not in part for part in live[:-1])
    plain = [line.split("\x1b[2K")[-1] for line in text.replace("\r\n", "\n").split("\n")]
    assert not any(line.startswith("Epoch: [0]  [") for line in plain)
    assert any(line.startswith("Epoch: [0] Total time: ") for line in plain)


def test_a_terminal_that_cannot_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert not LiveLine().wanted
