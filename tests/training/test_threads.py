"""OpenMP's threads sleep while they wait, after a moment of spinning only where the machine has cores for them."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from training import threads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Set what runs beside this process, on two cores with two threads; return what the environment then says."""
    for name in (threads.WAIT, threads.SPINS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)

    def decide(others: int | None, **variables: str) -> dict:
        if others is not None:
            threads.LOAD.write_text(f"0.14 0.31 0.27 {1 + others}/86 20894\n")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        threads.set_policy()
        return {name: os.environ[name] for name in (threads.WAIT, threads.SPINS) if name in os.environ}

    yield decide
    for name in (threads.WAIT, threads.SPINS):  # what the test itself set
        os.environ.pop(name, None)


SLEEP, SPIN = {"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}


def test_a_quiet_machine(machine):
    assert machine(0) == SPIN
    assert threads.describe() == "threads that wait: OMP_WAIT_POLICY=PASSIVE, GOMP_SPINCOUNT=20000"


def test_a_busy_machine(machine):
    assert machine(1) == SLEEP


def test_fewer_threads_than_cores(machine):
    assert machine(1, OMP_NUM_THREADS="1") == SPIN


def test_a_container_with_fewer_cores(machine):
    threads.QUOTA.write_text("150000 100000\n")
    assert machine(0) == SLEEP
    threads.QUOTA.write_text("max 100000\n")
    assert threads.cores_are_free()


@pytest.mark.parametrize("text", [None, "0.1 0.1 0.1 0/0 0", "something else"])
def test_a_machine_that_does_not_say(machine, text):
    if text is not None:
        threads.LOAD.write_text(text)
    assert machine(None) == SLEEP


def test_the_environment_holds(machine):
    assert machine(0, OMP_WAIT_POLICY="ACTIVE") == {"OMP_WAIT_POLICY": "ACTIVE"}


def test_a_count_of_the_environment_holds(machine):
    assert machine(0, GOMP_SPINCOUNT="7") == SLEEP | {"GOMP_SPINCOUNT": "7"}


def test_another_process_is_seen():
    """With as many busy processes as cores, by what the system itself says."""
    if not threads.LOAD.exists():
        pytest.skip(f"no {threads.LOAD} here")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        code = "from training import threads; import os; print(os.environ.get(threads.SPINS))"
        settings = {name: value for name, value in os.environ.items() if name not in (threads.WAIT, threads.SPINS)}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True)
        assert done.stdout == "None\n", done.stderr
    finally:
        for process in busy:
            process.kill()
            process.wait()
