"""Signals, errors of data loading, and systems that lack what Linux has."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL_RUN, errors_of
from without_linux import windows_lock

import main
from training import errors, files, options, processes
from training.processes import StopSignals

# ---------------------------------------------------------------- signals


def test_the_second_ctrl_c_is_the_systems():
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # launchers send it twice: it only asks
        assert stop.received == "SIGTERM" and signal.getsignal(signal.SIGINT) == stop._note
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT" and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_so():
    """As a shell has it for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGINT)
        errors.end_at_interrupt("main.py")
        signal.raise_signal(signal.SIGINT)
        assert stop.received is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_process_with_nothing_to_save_ends_in_one_line():
    code = "import signal; from training import errors; errors.end_at_interrupt('main.py'); "
    code += "signal.raise_signal(signal.SIGINT); print('on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "main.py: stopped: stopped by SIGINT\n")


def test_a_tool_ends_in_one_line(capsys):
    assert errors.exit_code("tool.py", lambda argv: signal.raise_signal(signal.SIGINT), []) == 130
    assert capsys.readouterr().err == "tool.py: stopped: stopped by SIGINT\n"


# ---------------------------------------------------------------- data loading

SHORT = "shared memory is too small ("
WORKER = (
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\nRuntimeError: "
)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (WORKER + "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", SHORT),
        ("DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
         "shared memory. Please try to raise your shared memory limit.", SHORT),
        ("unable to open shared memory object </torch_1> in read-write mode: No space left on device (28)", SHORT),
        ("DataLoader cannot start its workers: [Errno 28] No space left on device", SHORT),
        ("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)", "data loading"),
        ("Too many open files. Communication with the workers is no longer possible.", "data loading failed ("),
        ("DataLoader worker (pid 1) is killed by signal: Killed. ", "data loading failed (DataLoader worker (pid 1)"),
    ],
)  # fmt: skip
def test_a_failure_of_workers_is_one_line(message, says):
    code, line = processes.explain(RuntimeError(message))
    assert code == 1 and line.startswith(says) and "\n" not in line and len(line) < 250
    assert says != SHORT or ("--shm-size" in line and "--num_workers" in line)


def test_other_errors_of_workers_and_kernels_are_not_explained_away():
    for message in (WORKER + "mat1 and mat2 shapes", "out of resource: shared memory, Required: 1, Hardware limit: 0"):
        assert processes.explain(RuntimeError(message)) is None


def test_small_shared_memory_ends_a_run_in_one_line(toy, tmp_path, monkeypatch, capsys):
    """A batch that finds no room: in the status too, where it was a traceback of 2 KB."""
    message = WORKER + "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"

    def fail(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(main.engine, "train_one_epoch", fail)
    words = [*SMALL_RUN, "--data-path", toy, "--output_dir", tmp_path / "run"]
    assert main.run(options.parse_args([str(word) for word in words])) == 1
    (line,) = errors_of(capsys.readouterr().err)
    assert line.startswith(f"main.py: error: {SHORT}")
    assert line.endswith(json.loads((tmp_path / "run" / "status.json").read_text())["reason"])
    message = "another\nerror\n" * 100
    with pytest.raises(RuntimeError):
        main.run(options.parse_args([str(word) for word in [*words, "--overwrite"]]))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["reason"] == "another"


# ---------------------------------------------------------------- other systems


@pytest.mark.parametrize("system", ["Linux", "Windows"])
def test_a_folder_has_one_owner(system, tmp_path, monkeypatch):
    """Another process is told who it is; the lock ends with its process, even by kill -9."""
    if system == "Windows":
        monkeypatch.setattr(files, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", windows_lock())
    lock = files.Lock(tmp_path)
    assert lock.taken_by is None
    child = os.fork()
    if child == 0:  # locks are of a process
        answers = files.owner(tmp_path), files.Lock(tmp_path).taken_by
        os._exit(0 if answers == (f"process {os.getppid()} on {files.socket.gethostname()}",) * 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
    lock.release()
    child = os.fork()
    if child == 0:
        held = files.Lock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL if held.taken_by is None else signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and files.owner(tmp_path) is None


def test_a_folder_is_not_opened_where_it_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setattr(files.sys, "platform", "win32")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("a folder was opened"))
    files.sync_folder(tmp_path)


def test_no_time_limit_without_the_signal(monkeypatch):
    monkeypatch.delattr(signal, "SIGALRM")
    with processes.time_limit(1, RuntimeError("late")):
        pass


def without_linux(*words):
    """main.py, or with -m a tool, where the modules, signals and calls are missing that Windows does not have."""
    command = [sys.executable, str(ROOT / "tests" / "without_linux.py"), *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=240)


def test_help_without_linux():
    done = without_linux("--help")
    assert done.returncode == 0 and "--model-ema-warmup" in done.stdout and not done.stderr


@pytest.mark.slow
def test_training_and_evaluation_without_linux(toy, tmp_path):
    words = [*SMALL_RUN, "--data-path", toy, "--epochs", 1]
    done = without_linux(*words, "--output_dir", tmp_path, "--num_workers", 1)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    line = json.loads((tmp_path / "log.txt").read_text())
    assert line["max_memory_mb"] == 0 and json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
    done = without_linux("--eval", "--resume", tmp_path, "--data-path", toy, "--device", "cpu", "--num_workers", 0)
    assert done.returncode == 0 and f"* Acc@1 {line['test_acc1']:.3f}" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "plot_run", "benchmark", "data_loading", "digits", "count"])
def test_tools_without_linux(name):
    done = without_linux("-m", f"tools.{name}", "--help")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["main.py", "--eval"], ["-m", "tools.count"], ["segmentation/train.py", "x"]], ids=str
)
def test_threads_that_wait_leave_their_core_to_others(words):
    """As OpenMP itself reads it when torch is loaded. What the user's environment says holds."""
    for given, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        settings = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        settings |= {"OMP_DISPLAY_ENV": "true"}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=settings, cwd=ROOT)
        # Each copy of OpenMP says it: OpenCV brings one too.
        assert set(re.findall(r"OMP_WAIT_POLICY = '(\w+)'", done.stderr)) == {policy}
