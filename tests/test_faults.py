"""The short form of each program of accidents; `make faults` runs them whole."""

import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAMS = ("kill", "syscalls", "disk", "corrupt", "hostile", "malformed", "stuck")


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
    assert "LOST" not in done.stdout and "survived" in done.stdout


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
