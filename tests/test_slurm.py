"""tools/slurm/train.sbatch, as it is, under stand-ins for sbatch, srun and scontrol (tests/slurm)."""

import os
import re
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL_RUN, launch, run_main

from tools.checkpoint_hash import digest
from training import checkpoint

TEMPLATE = "tools/slurm/train.sbatch"
FIRST_PORT = 20000  # of the ports that jobs get by their numbers: training/launcher.py


def free_job() -> int:
    """Return the number of a job whose port is free."""
    for job in range(os.getpid() % 12000, 12000):  # below the ports that the system hands out
        with socket.socket() as port:
            try:
                port.bind(("127.0.0.1", FIRST_PORT + job))
                return job
            except OSError:
                continue
    raise RuntimeError("no free port")


def sbatch(folder, *words, signals=(), tasks=2, python=sys.executable, timeout=240):
    """Submit the template and wait for its end: exit code, and what the job printed."""
    job = free_job()
    stand_in = {"STAND_IN_FOLDER": folder, "STAND_IN_JOB": job, "STAND_IN_TASKS": tasks}
    stand_in |= {"STAND_IN_SIGNALS": "\n".join(signals), "PYTHON": python}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environ |= {name: str(value) for name, value in stand_in.items()}
    environ |= {"PATH": f"{ROOT / 'tests' / 'slurm'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["sbatch", TEMPLATE, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environ, timeout=timeout, capture_output=True, text=True)
    return done.returncode, (folder / f"slurm-{job}.out").read_text() + done.stderr


def hash_of(folder) -> str:
    return digest(checkpoint.load(folder / "checkpoint.pth"))


@pytest.fixture
def program(tmp_path):
    """Return a function that makes a stand-in for Python: it runs a script of the shell, and counts its starts."""

    def make(script: str) -> str:
        path = tmp_path / "program"
        path.write_text(f"#!/usr/bin/env bash\necho start >>{tmp_path}/starts\necho ready\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return make


def starts(folder) -> int:
    return len((folder / "starts").read_text().splitlines())


@pytest.mark.slow
def test_a_job_interrupted_twice_ends_with_the_bits_of_a_run_under_torchrun(toy, tmp_path):
    words = [*SMALL_RUN, "--batch-size", 4, "--epochs", 6, "--warmup-epochs", 0, "--model-ema", "--data-path", toy]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    done = run_main(*words, "--output_dir", whole, launcher=launch(2))
    assert done.returncode == 0, done.stderr
    code, out = sbatch(tmp_path, *words, "--output_dir", folder, signals=("Epoch: [1]", "Epoch: [3]"))
    assert code == 0, out
    assert out.count("goes back into the queue (exit code 143)") == 2
    stops = re.findall(r"main.py: stopped: stopped by .* after (\d) epochs and (\d) updates", out)
    assert len(stops) == 4 and len(set(stops)) == 2, out  # both tasks, twice
    assert out.count("| distributed init (rank 1)") == 3 and out.count("Training time") == 1
    assert hash_of(folder) == hash_of(whole)


@pytest.mark.slow
def test_one_process_has_the_same_bits_under_python_torchrun_and_srun(toy, tmp_path):
    words = [*SMALL_RUN, "--epochs", 1, "--warmup-epochs", 0, "--data-path", toy]
    assert run_main(*words, "--output_dir", tmp_path / "python").returncode == 0
    assert run_main(*words, "--output_dir", tmp_path / "torchrun", launcher=launch(1)).returncode == 0
    assert sbatch(tmp_path, *words, "--output_dir", tmp_path / "srun", tasks=1)[0] == 0
    assert len({hash_of(tmp_path / name) for name in ("python", "torchrun", "srun")}) == 1


def test_a_run_killed_by_the_signal_before_it_is_ready_is_started_again(tmp_path, program):
    """main.py listens only once its libraries are imported."""
    wait = f'[ "$SLURM_RESTART_COUNT" = 0 ] && exec sleep 60; echo "$@" >>{tmp_path}/words'
    code, out = sbatch(tmp_path, "--model", "x", signals=("ready",), tasks=1, python=program(wait))
    assert code == 0 and starts(tmp_path) == 2 and "exit code 138" in out, out
    assert (tmp_path / "words").read_text().split() == ["main.py", "--model", "x", "--resume", "auto"]


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_a_run_that_ends_by_itself_is_not_started_again(code, tmp_path, program):
    """143 without a signal from Slurm: the job is being canceled."""
    assert sbatch(tmp_path, tasks=1, python=program(f"exit {code}"))[0] == code and starts(tmp_path) == 1


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_failure_after_the_signal_is_not_started_again(code, tmp_path, program):
    """A full disk, say: the job would come back forever."""
    end = f"trap 'exit {code}' USR1; for i in $(seq 600); do sleep 0.1; done"
    assert sbatch(tmp_path, signals=("ready",), tasks=1, python=program(end))[0] == code and starts(tmp_path) == 1


def test_the_template_has_its_options():
    lines = (ROOT / TEMPLATE).read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@120", "#SBATCH --open-mode=append"} <= set(lines)
    assert [line for line in lines if line.startswith("srun ")] and "torchrun" not in " ".join(lines)
    assert os.access(ROOT / TEMPLATE, os.X_OK)
