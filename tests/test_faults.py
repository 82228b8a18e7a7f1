"""The short form of each program of accidents; `make faults` runs them whole."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAMS = ("kill", "syscalls", "disk", "corrupt", "hostile", "malformed", "stuck", "clock", "elastic", "machines")


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_accidents_are_survived(program):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "faults" / f"{program}.py"), "--short"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if done.stdout.startswith("skip "):
        pytest.skip(done.stdout.strip())
    assert "LOST" not in done.stdout and "survived" in done.stdout


def test_what_two_machines_need_is_named_where_it_is_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "faults" / "machines.py"), "--short"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (0, "skip two machines: no ip and no unshare here\n"), done.stderr


@pytest.mark.slow
def test_a_run_keeps_its_memory_files_and_threads():
    """The short form of `make soak`."""
    program = ROOT / "tests" / "faults" / "soak.py"
    done = subprocess.run([sys.executable, str(program), "--short"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "1 of 1 survived" in done.stdout, done.stdout + done.stderr


def test_all_programs_are_tried():
    folder = ROOT / "tests" / "faults"
    helpers = {"all", "common", "one_save", "soak", "stopping"}
    assert {path.stem for path in folder.glob("*.py")} == {*PROGRAMS, *helpers}
    assert f"PROGRAMS = {PROGRAMS!r}".replace("'", '"') in (folder / "all.py").read_text()
