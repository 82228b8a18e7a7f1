"""Dense runs that are stopped, resumed with the same or other settings, and started twice in one folder."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import torch
from toys import DETECTOR, ROOT, SEGMENTOR, ade_toy, coco_toy, forget_visualizers, free_port, write

from dense import cli, libraries
from training import checkpoint
from training.errors import Preempted, UserError
from training.processes import StopSignals

pytestmark = pytest.mark.filterwarnings("ignore:.*instance named of:UserWarning")  # several runs in one process


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    libraries.load("mmseg")
    libraries.load("mmdet")


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ade")
    text = SEGMENTOR + "\nparam_scheduler = [dict(type='PolyLR', by_epoch=False, begin=0, end=5, eta_min=1e-6)]\n"
    return write(folder / "segmentor.py", text, data=ade_toy(folder / "data"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """RetinaNet, four iterations an epoch, and a rate that falls after the first."""
    libraries.load("mmdet")
    folder = tmp_path_factory.mktemp("coco")
    text = DETECTOR + "\nparam_scheduler = [dict(type='MultiStepLR', by_epoch=True, begin=0, end=2, milestones=[1])]\n"
    data = coco_toy(folder / "data")
    return write(folder / "detector.py", text, data=data, setting="retinanet_1x_pvt", masks=False)


def train(library, config, *words):
    forget_visualizers()
    cli.run_training(cli.train_parser().parse_args([str(word) for word in (config, *words)]), library)


@contextlib.contextmanager
def stopped(phase, iteration, number=signal.SIGTERM):
    """Send this process a signal when the run looks for one after so many iterations, and expect it to stop there."""
    sent = []

    def on_poll(at, runner):
        if not sent and (at, runner.iter) == (phase, iteration):
            sent.append(signal.raise_signal(number))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted) as caught:
        patch.setattr(cli, "StopSignals", functools.partial(StopSignals, on_poll))
        yield caught
    assert str(caught.value) == (
        f"stopped by {number.name} after {iteration} iterations, all saved: "
        f"continue with --resume-from {os.path.abspath(f'run/iter_{iteration}.pth')}"
    )
    assert status()["state"] == "preempted"


def same(one, other):
    """Whether two checkpoints have the same weights, optimizer state, schedules and progress."""
    a, b = (dict(checkpoint.leaves(checkpoint.load(path))) for path in (one, other))
    keys = [key for key in a if re.match("/(state_dict|optimizer|param_schedulers)/|/meta/(iter|epoch)$", key)]
    assert len(keys) > 300 and keys == [key for key in b if key in set(keys)]
    return all(torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in keys)


def status(folder="run"):
    with open(f"{folder}/status.json") as file:
        return json.load(file)


def logged(folder):
    """The lines of all logs of a folder, in their order."""
    paths = sorted(Path(folder).glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def rates(folder):
    return {line["step"]: line["lr"] for line in logged(folder) if "lr" in line}


# ---------------------------------------------------------------- signals


@pytest.mark.slow
def test_a_stopped_segmentor_resumes_to_the_same_bits(segmentor):
    """In an iteration, and in a validation, which is then repeated."""
    train("mmseg", segmentor, "--work-dir", "whole", "--seed", 3)
    assert {"state": "finished", "epoch": -1, "updates": 4}.items() <= status("whole").items()
    with stopped("train", 1):
        train("mmseg", segmentor, "--work-dir", "run", "--seed", 3)
    assert status()["updates"] == 1
    with stopped("val", 4, signal.SIGUSR1):
        train("mmseg", segmentor, "--work-dir", "run", "--resume-from", "auto")
    assert same("whole/iter_4.pth", "run/iter_4.pth")
    train("mmseg", segmentor, "--work-dir", "run", "--resume-from", "run")
    whole, parts = ([line["mIoU"] for line in logged(folder) if "mIoU" in line] for folder in ("whole", "run"))
    assert whole == parts and len(whole) == 2
    assert rates("whole") == rates("run") and list(rates("whole")) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_detector_resumes_inside_an_epoch(detector):
    """After 1 of 4 iterations, after the last one of the epoch, and in the next epoch with a worker."""
    train("mmdet", detector, "--work-dir", "whole", "--seed", 3)
    length = checkpoint.load("whole/epoch_1.pth")["meta"]["epoch_length"]
    assert length == 4
    with stopped("train", 1):
        train("mmdet", detector, "--work-dir", "run", "--seed", 3)
    assert {"epoch": -1, "updates": 1}.items() <= status().items()
    with stopped("val", 4):
        train("mmdet", detector, "--work-dir", "run", "--resume-from", "auto")
    assert {"epoch": 0, "updates": 0}.items() <= status().items()
    with stopped("train", 6):
        train("mmdet", detector, "--work-dir", "run", "--resume-from", "auto")
    words = ["--cfg-options", "train_dataloader.num_workers=1", "train_dataloader.persistent_workers=True"]
    train("mmdet", detector, "--work-dir", "run", "--resume-from", "auto", *words)
    assert same("whole/epoch_2.pth", "run/epoch_2.pth")
    assert rates("whole") == rates("run") and list(rates("run")) == list(range(1, 9))
    assert rates("run")[5] == pytest.approx(rates("run")[4] / 10)
    assert [line["coco/bbox_mAP"] for line in logged("whole") if "coco/bbox_mAP" in line] == [
        line["coco/bbox_mAP"] for line in logged("run") if "coco/bbox_mAP" in line
    ]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_a_command(segmentor, processes, tmp_path):
    """With loader workers: one line, exit code 143, and a checkpoint that resumes to the same bits."""
    words = ["--seed", 3, "--no-validate", "--cfg-options", "train_dataloader.num_workers=1"]
    length = ["train_cfg.max_iters=4000", "default_hooks.checkpoint.interval=4000", "default_hooks.logger.interval=1"]
    script = [sys.executable, ROOT / "segmentation" / "train.py", segmentor]
    if processes > 1:
        script = ["bash", ROOT / "segmentation" / "dist_train.sh", segmentor, processes]
    command = [str(word) for word in (*script, "--work-dir", "run", *words, *length)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PORT": str(free_port())}
    with open("out", "w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env) as process:
        for _ in range(600):
            if "Iter(train) [   3/" in Path("out").read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    lines = Path("out").read_text().splitlines()
    (stop,) = [line for line in lines if "stopped by" in line][:1]
    assert "all saved: continue with --resume-from" in stop, lines[-20:]
    if processes == 1:
        assert code == 143 and lines[-1] == stop and "Traceback" not in "".join(lines), lines[-20:]
    assert status()["state"] == "preempted"
    done = int(re.search(r"after (\d+) iterations", stop)[1])
    assert checkpoint.load(f"run/iter_{done}.pth")["meta"]["iter"] == done == status()["updates"]
    assert Path("run/last_checkpoint").read_text() == str(tmp_path / "run" / f"iter_{done}.pth")


# ---------------------------------------------------------------- other settings


@pytest.mark.slow
def test_a_run_that_is_to_train_longer(segmentor):
    """Refused with the list, and trained with the new schedule: its rates are those of a run that had it always."""
    train("mmseg", segmentor, "--work-dir", "run", "--seed", 3, "--no-validate")
    longer = ["train_cfg.max_iters=8", "param_scheduler.0.end=9"]
    words = ["--no-validate", "--cfg-options", *longer, "optim_wrapper.optimizer.lr=0.5"]
    with pytest.raises(UserError) as caught:
        train("mmseg", segmentor, "--work-dir", "run", "--resume-from", "run", *words)
    assert str(caught.value) == (
        "other settings than the checkpoint's (run/iter_4.pth): train_cfg.max_iters 4 -> 8, "
        "param_scheduler.0.end 5 -> 9, optim_wrapper.optimizer.lr 0.0001 -> 0.5; run it as it was, or pass --resume-changed"
    )
    train("mmseg", segmentor, "--work-dir", "run", "--resume-from", "run", "--resume-changed", *words)
    expected = {step: (0.5 - 1e-6) * (1 - (step - 1) / 8) + 1e-6 for step in range(5, 9)}
    assert {step: rate for step, rate in rates("run").items() if step > 4} == pytest.approx(expected)
    first, last = (checkpoint.load(f"run/iter_{number}.pth") for number in (4, 8))
    assert first["optimizer"]["state"][0]["step"] == 4 and last["optimizer"]["state"][0]["step"] == 8
    train("mmseg", segmentor, "--work-dir", "other", "--resume-from", "run/iter_8.pth", *words)  # the same settings


@pytest.mark.slow
def test_an_epoch_of_other_batches_starts_again(detector, capfd):
    with stopped("train", 5):
        train("mmdet", detector, "--work-dir", "run", "--seed", 3, "--no-validate")
    words = ["--no-validate", "--cfg-options", "train_dataloader.batch_size=4"]
    with pytest.raises(UserError, match="train_dataloader.batch_size 2 -> 4; run it"):
        train("mmdet", detector, "--work-dir", "run", "--resume-from", "auto", *words)
    train("mmdet", detector, "--work-dir", "run", "--resume-from", "auto", "--resume-changed", *words)
    assert "epoch 2 starts again, after 1 of its iterations" in capfd.readouterr().out
    meta = checkpoint.load("run/epoch_2.pth")["meta"]
    assert (meta["epoch"], meta["iter"], meta["epoch_length"]) == (2, 4, 2)


# ---------------------------------------------------------------- one run a folder


@pytest.mark.slow
def test_a_folder_that_holds_a_run(segmentor):
    words = ["--work-dir", "run", "--no-validate", "--cfg-options", "train_cfg.max_iters=2"]
    train("mmseg", segmentor, *words)
    before = {path.name for path in Path("run").iterdir()}
    with pytest.raises(
        UserError, match="^the folder holds a run .run/last_checkpoint.: --resume-from it, or --overwrite"
    ):
        train("mmseg", segmentor, *words)
    assert {path.name for path in Path("run").iterdir()} == before
    Path("run/iter_70.pth").write_bytes(b"of a longer run")
    train("mmseg", segmentor, "--overwrite", *words)
    assert not Path("run/iter_70.pth").exists() and Path("run/iter_2.pth").exists()
