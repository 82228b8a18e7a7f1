"""Nothing leaves the machine unless it is asked for: an audit hook notes what every Python process connects to, and
strace what several processes do.
"""

import os
import re
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL_RUN, have_strace, launch, run_main

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


def is_local(address: str) -> bool:
    """Return True for an address of this machine: a socket can be bound to no other."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not have_strace(), reason="strace sees what torch's C++ connects to")
def test_two_processes_stay_on_the_machine(toy, tmp_path):
    trace, words = tmp_path / "trace.txt", [*SMALL_RUN, "--data-path", toy, "--epochs", 1, "--output_dir", tmp_path]
    strace = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", trace]
    line = map(str, [*strace, sys.executable, *launch(2), ROOT / "main.py", *words])
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    # torch asks for the name of 127.0.0.1, at port 53 of the name server.
    calls = [call for call in trace.read_text().splitlines() if "htons(53)" not in call]
    addresses = {found for call in calls for found in re.findall(r'inet_\w+\((?:AF_INET6, )?"([^"]+)"', call)}
    assert addresses and not [address for address in addresses if not is_local(address)]
