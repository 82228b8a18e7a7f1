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
from types import SimpleNamespace

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import torch
from toys import DETECTOR, ROOT, SEGMENTOR, ade_toy, coco_toy, forget_visualizers, free_port, write

from dense import checks, cli, libraries, resume
from dense.work_folder import WorkFolder, newest
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
@pytest.mark.parametrize(
    ("processes", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGINT)], ids=["1", "2", "Ctrl-C"]
)
def test_a_signal_to_a_command(segmentor, processes, number, tmp_path):
    """With loader workers: one line, exit code 143 or 130, and a checkpoint of all that was done."""
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
        process.send_signal(number)
        code = process.wait(60)
    lines = Path("out").read_text().splitlines()
    (stop,) = [line for line in lines if "stopped by" in line][:1]
    assert "all saved: continue with --resume-from" in stop, lines[-20:]
    if processes == 1:
        assert code == 128 + number and lines[-1] == stop and "Traceback" not in "".join(lines), lines[-20:]
    assert status()["state"] == "preempted"
    done = int(re.search(r"after (\d+) iterations", stop)[1])
    assert checkpoint.load(f"run/iter_{done}.pth")["meta"]["iter"] == done == status()["updates"]
    assert Path("run/last_checkpoint").read_text() == str(tmp_path / "run" / f"iter_{done}.pth")


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.5, 3.0])
@pytest.mark.parametrize("program", ["train", "test"])
def test_an_interrupt_before_the_run(segmentor, program, wait):
    """While the libraries are imported, and while the run is built: one line, and nothing is left."""
    command = [
        sys.executable,
        ROOT / "segmentation" / f"{program}.py",
        segmentor,
        *(["x.pth"] if program == "test" else []),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=env) as process:
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (130, f"{program}.py: stopped: stopped by SIGINT")
    assert "Traceback" not in err


# ---------------------------------------------------------------- other settings


def settings_of(path, *options):
    """The settings of a config as the commands read it, with a data set that is not opened."""
    library = "mmseg" if "segmentor" in path.name else "mmdet"
    words = [str(path), *(["--cfg-options", *options] if options else [])]
    cfg = cli.configure(cli.train_parser().parse_args(words), library)
    facts = dict(metainfo=cfg.train_dataloader.dataset.get("metainfo", {}), ann_file=str(path))
    dataset = type("Data", (), {"__len__": lambda _: 7, **facts})()
    return resume.settings(cfg, seed=3, dataset=dataset)


CHANGES = {
    "train_cfg.max_iters=60": "train_cfg.max_iters 4 -> 60",
    "param_scheduler.0.end=61": "param_scheduler.0.end 5 -> 61",
    "optim_wrapper.optimizer.lr=0.5": "optim_wrapper.optimizer.lr 0.0001 -> 0.5",
    "optim_wrapper.clip_grad.max_norm=1": "optim_wrapper.clip_grad.max_norm None -> 1",
    "train_dataloader.batch_size=4": "train_dataloader.batch_size 2 -> 4",
    "train_dataloader.dataset.reduce_zero_label=False": "train_dataloader.dataset.reduce_zero_label True -> False",
    "train_dataloader.dataset.metainfo.classes=(a,b,c)": "classes ['ant', 'bee', 'cat'] -> ['a', 'b', 'c']",
    "train_dataloader.dataset.pipeline.4.prob=0.0": "train_dataloader.dataset.pipeline.4.prob 0.5 -> 0.0",
    "model.backbone.drop_path_rate=0.5": "model.backbone.drop_path_rate 0.2 -> 0.5",
}
# Where things are, how fast they go, and how they are scored
NO_CHANGES = (
    "train_dataloader.dataset.data_root=/other",
    "train_dataloader.num_workers=2",
    "train_cfg.val_interval=7",
    "model.backbone.pretrained=/w.pth",
    "model.test_cfg.mode=slide",
    "default_hooks.checkpoint.interval=1",
    "work_dir=/out",
)


def test_settings_that_decide_a_result(segmentor):
    before = settings_of(segmentor)
    payload = dict(meta=dict(settings=json.loads(json.dumps(before))))
    for option, line in CHANGES.items():
        found = resume.changed_settings(payload, settings_of(segmentor, option))
        assert line in found and all(each == line or "metainfo.classes" in each for each in found), option
    assert resume.changed_settings(payload, settings_of(segmentor, *NO_CHANGES)) == []
    assert resume.changed_settings(payload, before | {"processes": 8}) == ["processes 1 -> 8"]
    for meta in ({}, {"settings": 3}, "x"):
        assert resume.changed_settings(dict(meta=meta), before) is None


def test_the_content_of_data_counts(tmp_path):
    def data(*names, root="/a"):
        return type(
            "Data",
            (),
            dict(
                data_root=root,
                __len__=lambda _: len(names),
                get_data_info=lambda _, i: dict(img_path=f"{root}/{names[i]}"),
            ),
        )()

    assert resume.fingerprint(data("x.png", "y.png")) == resume.fingerprint(data("x.png", "y.png", root="/b"))
    assert resume.fingerprint(data("x.png", "y.png")) != resume.fingerprint(data("x.png", "z.png"))
    assert resume.fingerprint(data("x.png")).startswith("1 images (")


@pytest.mark.parametrize("by_epoch", [False, True])
def test_new_schedules_are_where_training_would_be(by_epoch):
    """Warm-up times a decay with a floor, or with milestones, at each of 40 iterations; epochs have 4."""
    from mmengine.optim import OptimWrapper
    from mmengine.registry import PARAM_SCHEDULERS

    from dense.models import poly_schedule, step_schedule

    schedule = step_schedule(epochs=10, milestones=[4, 7], warmup=6)
    schedule = schedule if by_epoch else poly_schedule(iterations=40, power=0.9, eta_min=1e-6, warmup=6)

    def build():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        wrapper = OptimWrapper(optimizer)
        return wrapper, [PARAM_SCHEDULERS.build(dict(each, optimizer=wrapper)) for each in schedule]

    trained, schedulers = build()
    for done in range(1, 41):
        trained.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or done % 4 == 0:
                scheduler.step()
        advanced, others = build()
        resume.advance(others, done, 4)
        assert advanced.param_groups[0]["lr"] == trained.param_groups[0]["lr"]


def test_rates_are_the_configs_and_averages_the_files():
    old, new = (torch.nn.Linear(2, 1) for _ in range(2))
    first = torch.optim.AdamW(old.parameters(), lr=0.1, weight_decay=0.3)
    old(torch.ones(1, 2)).sum().backward()
    first.step()
    groups = [dict(params=[parameter]) for parameter in new.parameters()]  # one each, as with paramwise_cfg
    second = torch.optim.AdamW(groups, lr=0.5, weight_decay=0.0)
    second.load_state_dict(resume.with_new_rates(first.state_dict(), second.state_dict()))
    assert {(group["lr"], group["weight_decay"]) for group in second.param_groups} == {(0.5, 0.0)}
    for a, b in zip(old.parameters(), new.parameters()):
        assert torch.equal(first.state[a]["exp_avg"], second.state[b]["exp_avg"])
    with pytest.raises(ValueError, match="for 2 parameters, the model has 1"):
        resume.with_new_rates(first.state_dict(), torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).state_dict())


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
        "param_scheduler.0.end 5 -> 9, optim_wrapper.optimizer.lr 0.0001 -> 0.5; run it as it "
        "was, or pass --resume-changed"
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


@pytest.mark.parametrize(("end", "warned"), [(31, True), (60, False), (61, False)])
def test_a_schedule_shorter_than_the_run(end, warned, monkeypatch):
    lines = []
    monkeypatch.setattr(checks, "print_log", lambda line, **_: lines.append(line))
    warm_up, decay = SimpleNamespace(end=7, by_epoch=False, end_factor=1.0), SimpleNamespace(end=end, by_epoch=False)
    for schedulers in ([warm_up, decay], [warm_up], []):
        checks.check_schedule(SimpleNamespace(max_iters=60, param_schedulers=schedulers, epoch_length=0))
    expected = (
        "the schedule ends at iteration 31 of 60: the rest keeps its last learning rate; "
        "set param_scheduler.1.end with --cfg-options"
    )
    assert lines == ([expected] if warned else [])


# ---------------------------------------------------------------- one run a folder


def test_a_folder_in_use(segmentor):
    Path("run").mkdir()
    code = "import sys, time; sys.path.insert(0, sys.argv[1]); from training.files import Lock; lock = Lock('run'); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, ROOT], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        try:
            for words in ([], ["--overwrite"], ["--resume-from", "auto"]):
                with pytest.raises(
                    UserError, match=rf"^the folder is in use .--work-dir run.: process {holder.pid} on"
                ):
                    train("mmseg", segmentor, "--work-dir", "run", *words)
        finally:
            holder.kill()
    assert [path.name for path in Path("run").iterdir()] == [".lock"]


def test_the_newest_checkpoint_of_a_folder():
    folder = Path("run")
    folder.mkdir()
    assert newest(folder) is None
    for age, name in enumerate(("epoch_2.pth", "iter_9.pth", "epoch_1.pth", "best_mIoU_iter_9.pth")):
        (folder / name).touch()
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    assert newest(folder).name == "epoch_2.pth"
    (folder / "last_checkpoint").write_text("/where/it/was/iter_9.pth\n")
    assert newest(folder) == folder / "iter_9.pth"
    (folder / "last_checkpoint").write_text("/where/it/was/gone.pth")
    assert newest(folder).name == "epoch_2.pth"
    with pytest.raises(UserError, match=r"^no checkpoint in the folder \(--resume-from other\)"):
        Path("other").mkdir()
        WorkFolder(folder).checkpoint_of("other")
    assert WorkFolder(Path("other")).checkpoint_of("auto") is None


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
