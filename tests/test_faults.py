"""The short form of each program of accidents; `make faults` runs them whole."""

import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAMS = ("kill", "syscalls", "disk", "corrupt", "hostile", "malformed", "stuck", "elastic")


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


def test_all_programs_are_tried():
    folder = ROOT / "tests" / "faults"
    helpers = {"all", "common", "one_save", "stopping"}
    assert {path.stem for path in folder.glob("*.py")} == {*PROGRAMS, *helpers}
    assert f"PROGRAMS = {PROGRAMS!r}".replace("'", '"') in (folder / "all.py").read_text()
