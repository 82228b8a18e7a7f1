"""Nothing leaves the machine unless it is asked for: an audit hook notes what every Python process connects to."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL_RUN, run_main

WATCH = """
import os, sys

def note(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        # Strings are paths of local sockets; None is the other end of a connection, which was noted when it was made.
        address = arguments[0] if event.startswith("socket.get") else arguments[-1]
        if event.startswith("socket.get") or not isinstance(address, (str, bytes, type(None))):
            with open(os.environ["WATCH"], "a") as file:
                file.write(f"{event} {address} {sys.argv}\\n")

sys.addaudithook(note)
"""


@pytest.fixture
def watch(tmp_path):
    """Return the variables that let Python's processes be watched, and what was seen of them."""
    hooks, seen = tmp_path / "hooks", tmp_path / "seen.txt"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(WATCH)
    return {"PYTHONPATH": str(hooks), "WATCH": str(seen), "HF_HUB_OFFLINE": "0"}, lambda: (
        seen.read_text().splitlines() if seen.exists() else []
    )


def test_a_url_is_seen(watch):
    variables, seen = watch
    done = run_main("--eval", "--resume", "https://127.0.0.1:9/x.pth", "--device", "cpu", env=variables)
    assert done.returncode == 2, done.stderr
    assert any("127.0.0.1" in line for line in seen())


@pytest.mark.slow
def test_training_evaluation_and_tools_stay_on_the_machine(watch, toy, tmp_path):
    variables, seen = watch
    run, weights = tmp_path / "run", tmp_path / "run" / "checkpoint.pth"
    small = [*SMALL_RUN, "--data-path", toy]
    commands = [
        ["main.py", *small, "--epochs", 1, "--num_workers", 1, "--output_dir", run],
        ["main.py", *small, "--eval", "--resume", weights],
        ["-m", "tools.check_data", "--data-path", toy],
        ["-m", "tools.predict", toy / "val" / "ant", "--weights", weights, "--results", tmp_path / "results.csv"],
        ["-m", "tools.count", "--model", "alt_gvt_small"],
        ["-m", "tools.benchmark", "--models", "alt_gvt_demo", "--modes", "eager", "--repeats", 1, "--no-memory"],
    ]
    for command in commands:
        environment = os.environ | variables | {"OMP_NUM_THREADS": "1"}
        line = [sys.executable, *map(str, command)]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, (command, done.stderr)
    assert seen() == []
