"""tools/gpu_check.sh: every command of every stage is one that today's tools and tests take, in less than ten minutes."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import benchmark, gpu_operators
from training import options
from training.errors import exit_code

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
STAGES = "123456"
OTHERS = {"nvidia-smi", "compute-sanitizer", "ncu"}


def script(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True)


def commands(stage: str) -> list[list[str]]:
    done = script("--dry-run", stage)
    assert done.returncode == 0 and not done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def python_words(command: list[str]) -> list[str]:
    """Return what Python is given in a command, the interpreter itself left out."""
    return command[command.index("python3") + 1 :] if "python3" in command else []


def test_its_syntax_is_right():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert SCRIPT.stat().st_mode & 0o111


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_less_than_ten_minutes(stage):
    limits = [int(command[1]) for command in commands(stage) if command[0] == "timeout"]
    assert len(limits) == len(commands(stage)) and 0 < sum(limits) < 600


@pytest.mark.parametrize("stage", STAGES)
def test_every_command_is_taken(stage, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **named: True)
    for command in commands(stage):
        words = python_words(command)
        if words[:2] == ["-m", "torch.distributed.run"]:
            words = words[3:]
        match words:
            case ["-m", "tools.benchmark", *rest]:
                assert benchmark.parse_args(rest).json
            case ["-m", "tools.gpu_operators", *rest]:
                gpu_operators.get_parser().parse_args(rest)
            case ["-m", "tools.digits", folder]:
                assert importlib.util.find_spec("tools.digits") and not folder.startswith("-")
            case ["main.py", *rest]:
                options.parse_args(rest)
            case ["-m", "pytest", *_] | ["-m", "torch.utils.collect_env"]:
                pass  # pytest's in the test below
            case _:
                assert not words and command[2] in OTHERS


@pytest.mark.slow
def test_every_selection_of_tests_finds_some():
    selections = {tuple(python_words(command)) for stage in STAGES for command in commands(stage)}
    selections = [words for words in selections if words[:2] == ("-m", "pytest")]
    assert len(selections) == 4
    for words in selections:
        command = [sys.executable, *words, "--collect-only"]
        # Without a GPU, the file of the kernels is skipped as a whole unless Triton interprets them.
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-500:]


@pytest.mark.parametrize("words", [[], ["7"], ["--dry-run", "all"]])
def test_an_unknown_stage_is_one_line(words):
    done = script(*words)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("gpu_check.sh: error: no such stage (") and done.stderr.count("\n") == 1


def test_a_failed_command_is_a_failed_stage(tmp_path):
    """With an interpreter that always fails, as it would without a GPU."""
    done = subprocess.run(
        ["bash", str(SCRIPT), "6", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "false"},
    )
    assert done.returncode == 1 and "stage 6 failed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_operators_without_a_gpu_are_one_line(capsys):
    assert exit_code("gpu_operators.py", gpu_operators.main, []) == 2
    assert capsys.readouterr().err.startswith("gpu_operators.py: error: no CUDA device")


def test_operators_compute_on_small_batches(monkeypatch):
    """The kernel has tests of its own."""
    monkeypatch.setattr(gpu_operators, "attend_in_windows", lambda qkv, heads, window: 2 * qkv.chunk(3, dim=-1)[0])
    for dim in gpu_operators.SIDES:
        found = {}
        for name, step, _ in gpu_operators.operators(dim, 1, torch.device("cpu"), torch.float32):
            found[name] = step()
        assert len(found) == 6
