"""Launchers' variables, meters, random states and whole files."""

import platform
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import utils
from training import devices, launcher
from training.errors import UserError, short_reason


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
        ),
        (
            {
                "SLURM_PROCID": "3",
                "SLURM_NTASKS": "4",
                "SLURM_LOCALID": "1",
                "SLURM_JOB_NODELIST": "gpu-[07-09,12],x1",
                "SLURM_JOB_ID": "41003",
            },
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu-07", "MASTER_PORT": "21003"},
        ),
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "8",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_JOB_NODELIST": "rack[1-2]-node[03-07]-ib,x",
            },
            {
                "RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "rack1-node03-ib",
                "MASTER_PORT": "20000",
            },
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "ENVIRONMENT": "BATCH"}, None),  # a batch script itself
        (
            {
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_JOB_NODELIST": "a,b",
                "MASTER_PORT": "5",
                "MASTER_ADDR": "c",
            },
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "c", "MASTER_PORT": "5"},
        ),
    ],
)
def test_launcher_variables(environ, expected):
    assert launcher.launcher_variables(environ) == expected


def test_a_device_that_is_not_there_is_an_error_only_if_given(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="no CUDA device"):
        utils.init_device("cuda", given=True)
    assert utils.init_device("cuda", given=False) == torch.device("cpu")
    assert capsys.readouterr().out.splitlines() == ["Not using distributed mode", "device: cpu (no CUDA device found)"]


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "hpu", "lazy", "foo", "cuda:-1", ""])
def test_a_device_that_this_torch_lacks_is_one_line(name):
    with pytest.raises(UserError, match=r"^no such device.*\(--device " + name + r".*\): use cuda or cpu"):
        devices.choose_device(name, given=True, local_rank=None)


def test_a_device_beside_cuda_works_alone_and_is_called_untested(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert utils.init_device("mps", given=True) == torch.device("mps")
    assert capsys.readouterr().err.startswith("main.py: warning: untested (--device mps): ")
    for wrong in ("xpu", "mps:1"):
        with pytest.raises(UserError, match="no such device here"):
            devices.choose_device(wrong, given=True, local_rank=None)
    with pytest.raises(UserError, match="several processes"):
        devices.choose_device("mps", given=True, local_rank=0)


def test_memory_is_0_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(utils, "resource", None)
    assert utils.peak_memory_mb() == 0


def test_random_states_survive_a_file(tmp_path):
    from training import checkpoint

    random.gauss(0, 1), np.random.randn()  # both keep a second normal number for the next call
    checkpoint.save(tmp_path / "s.pth", {"states": utils.all_gather(utils.get_random_state())})
    draw = lambda: (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist())  # noqa: E731
    expected = draw()
    utils.seed_everything(5)
    utils.set_random_state(checkpoint.load(str(tmp_path / "s.pth"))["states"][0])
    assert draw() == expected


def test_meter():
    meter = utils.Meter(window=3)
    for value in (5.0, 1.0, 2.0, 4.0):
        meter.update(value)
    assert str(meter) == "2.0000 (3.0000)" and meter.mean == 3.0
    meter.update(10.0, n=4)
    assert meter.mean == 52 / 8


def test_lines_of_a_loop(capsys):
    log = utils.MetricLogger(lr="{value:.6f}", loss="{median:.4f} ({mean:.4f})")
    for i, _ in enumerate(log.log_every([(torch.zeros(4),)] * 30, 25, "Epoch: [3]")):
        log.update(lr=1e-3, loss=float(i))
    lines = capsys.readouterr().out.splitlines()
    form = (
        r"Epoch: \[3\]  \[ ?\d+/25\]  eta: \d:\d\d:\d\d  lr: 0\.001000  loss: [\d.]{6,7} \([\d.]{6,7}\)"
        r"  time: \d\.\d{4}  data: \d\.\d{4}  max mem: \d+"
    )
    assert [int(line.split("[")[2].split("/")[0]) for line in lines[:-1]] == [0, 10, 20, 24]
    assert all(re.fullmatch(form, line) for line in lines[:-1])
    assert re.fullmatch(r"Epoch: \[3\] Total time: \d:\d\d:\d\d \(\d\.\d{4} s / it\)", lines[-1])
    assert log.images == 100 and log.rates()["images_per_s"] > 0


def test_a_workers_error_is_one_line():
    message = 'Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n  File "x.py"\ntraining.errors.UserError: cannot read (a: b.png): no\n'
    assert short_reason(UserError(message)) == "cannot read (a: b.png): no"
    assert short_reason(UserError("plain")) == "plain"


def test_environment_names_the_commit_and_versions():
    record = utils.environment(torch.device("cpu"), 7)
    assert (
        record["torch"].startswith(torch.__version__.split("+")[0]) and record["seed"] == 7 and record["processes"] == 1
    )
    assert record["command"].startswith("python ")


ALLOCATIONS = """
import resource, sys, torch, utils
if sys.argv[1] == "kept":
    utils.keep_freed_memory()
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.ones(2**27)  # room for what follows
print(faults(10))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone can be told to keep freed memory")
def test_freed_memory_is_kept():
    found = {}
    for how in ("given back", "kept"):
        done = subprocess.run(
            [sys.executable, "-c", ALLOCATIONS, how], cwd=utils.ROOT, capture_output=True, text=True, check=True
        )
        found[how] = int(done.stdout)
    assert found["kept"] < found["given back"] / 4


@pytest.mark.parametrize(
    ("device", "how"),
    [
        ("cpu", dict(backend="gloo")),
        ("cuda:1", dict(backend="cpu:gloo,cuda:nccl", device_id=torch.device("cuda:1"))),
    ],
)
def test_what_is_on_no_gpu_goes_through_gloo(device, how, monkeypatch):
    """Gradients through NCCL, small messages not: gloo tells of a lost process in an error, NCCL ends this one."""
    asked = []
    monkeypatch.setattr(utils.dist, "init_process_group", lambda **words: asked.append(words))
    utils.join_processes({"RANK": "1", "WORLD_SIZE": "2"}, torch.device(device), dist_url="env://", timeout=60)
    assert how.items() <= asked[0].items() and asked[0]["rank"] == 1
