"""A run that was stopped and continued ends with the same bits as one that was not."""

import argparse
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_RUN, errors_of, launch, log_lines
from timm.utils import ModelEmaV3

import main
from tools.checkpoint_hash import digest
from training import checkpoint, files, options, resume

STOPPING = str(ROOT / "tests" / "faults" / "stopping.py")
TIMES = ("time", "data_time", "images_per_s", "max_memory_mb")
# Everything that has a state of its own: Mixup and erasing, repeated augmentation, accumulation, the average, float16's
# loss scale.
ALL_ON = [
    "--repeated-aug",
    "--grad-accum-steps",
    "2",
    "--model-ema",
    "--amp-dtype",
    "float16",
    "--dist-eval",
    "--checkpoint-interval",
    "2",
]


def here(*words, **hooks):
    return main.run(options.parse_args([str(word) for word in words]), **hooks)


def stop_when(test):
    """A hook that has this process get a SIGTERM where `test` of the run's state says so."""
    return dict(on_poll=lambda phase, state, *batch: signal.raise_signal(signal.SIGTERM) if test(state) else None)


def final(folder):
    """What must be equal: the state's digest, and the log without times."""
    lines = [{key: value for key, value in line.items() if key not in TIMES} for line in log_lines(folder)]
    return digest(checkpoint.load(folder / "checkpoint.pth")), lines


def status(folder):
    return json.loads((folder / "status.json").read_text())


def program(where, *words, processes=1, accident="SIGTERM"):
    """main.py with an accident, as a program of so many processes."""
    start = [sys.executable] if processes == 1 else [sys.executable, *launch(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCIDENT": accident}
    command = [*start, STOPPING, where, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=240)


def words(toy, folder, *more, batch=4):
    return [
        *SMALL_RUN,
        "--data-path",
        toy,
        "--batch-size",
        batch,
        "--epochs",
        3,
        *ALL_ON,
        "--output_dir",
        folder,
        *more,
    ]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the programs have it: the number of threads decides how sums round."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A run of one process that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert here(*words(toy, folder)) == 0
    return folder


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    "place", ["epoch's end", "inside an epoch", pytest.param("in the evaluation", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_one_process(place, workers, whole, toy, tmp_path, monkeypatch, capsys):
    stops = []

    def here_or_not(run):
        at = {
            "epoch's end": run.epoch == 0,
            "inside an epoch": len(stops) == 8,
            "in the evaluation": not run.evaluated,
        }[place]
        stops.append(at)
        return at

    assert here(*words(toy, tmp_path, "--num_workers", workers), **stop_when(here_or_not)) == 143
    assert errors_of(capsys.readouterr().err)[0].startswith("main.py: stopped: stopped by ")
    assert status(tmp_path)["state"] == "preempted" and (tmp_path / "checkpoint.pth").exists()
    assert here(*words(toy, tmp_path, "--num_workers", workers, "--resume", "auto")) == 0
    assert final(tmp_path) == final(whole) and status(tmp_path)["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [["--opt", "lamb"], ["--opt", "lookahead_adamw"], ["--start_epoch", "2"], ["--fast-augment"]],
    ids=["lamb", "lookahead", "start_epoch", "fast_augment"],
)
def test_what_counts_by_the_group_or_starts_late(more, toy, tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    assert here(*words(toy, a, *more)) == 0
    steps = []
    assert here(*words(toy, b, *more), **stop_when(lambda run: steps.append(1) or len(steps) == 5)) == 143
    assert here(*words(toy, b, *more, "--resume", "auto")) == 0
    assert final(a) == final(b)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes(processes, toy, tmp_path):
    """From four on, the order in which DistributedDataParallel adds up gradients matters (see
    settle_gradient_buckets).
    """
    a, b = tmp_path / "a", tmp_path / "b"
    batch = 8 // processes
    assert program("none", *words(toy, a, batch=batch), processes=processes).returncode == 0
    # The signal reaches one process, and all agree. The stopped run has data-loading processes, the other one had none.
    for where, workers in (("update:0:3@1", 2), ("evaluation:1@1", 1)):
        done = program(
            where, *words(toy, b, "--resume", "auto", "--num_workers", workers, batch=batch), processes=processes
        )
        assert done.returncode == 1 and done.stderr.count("main.py: stopped: stopped by ") == processes, done.stderr
        assert status(b)["state"] == "preempted" and "exitcode  : 143" in done.stderr
    assert program("none", *words(toy, b, "--resume", "auto", batch=batch), processes=processes).returncode == 0
    assert final(a) == final(b)


@pytest.mark.slow
def test_another_number_of_processes_continues_with_the_same_images(toy, tmp_path):
    """At an equal global batch: the same samples, sums that round differently, and a line that says so."""
    assert program("update:0:3", *words(toy, tmp_path, batch=4), processes=2).returncode == 1
    done = program("none", *words(toy, tmp_path, "--resume", "auto", batch=8))
    assert done.returncode == 0, done.stderr
    assert "resume: 2 processes then, 1 now: each update has the same images" in done.stdout
    assert "the bits may differ" in done.stdout
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0, 1, 2]


def test_a_signal_to_the_process(toy, tmp_path, whole):
    done = program("update:1:1", *words(toy, tmp_path), accident="SIGUSR1")
    assert done.returncode == 143
    line = "main.py: stopped: stopped by SIGUSR1 after 1 epochs and 2 updates, all saved: continue with --resume auto"
    assert errors_of(done.stderr) == [line]
    assert here(*words(toy, tmp_path, "--resume", "auto")) == 0
    assert final(tmp_path) == final(whole)


def test_ctrl_c_is_sigterms_equal(toy, tmp_path, capsys):
    """Saved, one line, and 130."""
    stops = []
    interrupt = dict(on_poll=lambda *where: stops.append(1) or (len(stops) == 8 and signal.raise_signal(signal.SIGINT)))
    assert here(*words(toy, tmp_path), **interrupt) == 130
    line = "stopped by SIGINT after 0 epochs and 4 updates, all saved: continue with --resume auto"
    assert errors_of(capsys.readouterr().err) == [f"main.py: stopped: {line}"]
    assert (status(tmp_path)["state"], status(tmp_path)["reason"]) == ("preempted", line)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["updates"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(("times", "code"), [(1, 130), (2, -signal.SIGINT)])
def test_ctrl_c_once_and_twice(times, code, toy, tmp_path):
    """To the program: the first saves, the second ends it at once."""
    command = [sys.executable, str(ROOT / "main.py"), *map(str, words(toy, tmp_path)), "--epochs", "500"]
    command += ["--num_workers", "1"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    while "Epoch: [1]" not in run.stdout.readline():
        assert run.poll() is None
    for _ in range(times):
        run.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, error = run.communicate(timeout=60)
    assert run.returncode == code and len(errors_of(error)) == (1 if times == 1 else 0)
    assert times == 2 or "stopped by SIGINT after 1 epochs" in error


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--eval", "--resume", "RUN"], ["--throughput"], []])
def test_ctrl_c_with_nothing_to_save(words, whole, toy):
    """Also while the program is still loading its libraries: one line."""
    words = [str(whole) if word == "RUN" else word for word in words]
    command = [sys.executable, str(ROOT / "main.py"), *words, "--data-path", str(toy), "--num_workers", "0"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, **pipes)
    while words and "number of params" not in run.stdout.readline():
        assert run.poll() is None
    time.sleep(0 if words else 0.7)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130 and error == "main.py: stopped: stopped by SIGINT\n"


# ---------------------------------------------------------------- which checkpoint


def test_a_folder_is_resumed_from_its_newest(whole, toy, tmp_path, capsys):
    """Of the same folder, and of another one into a new one."""
    assert here(*words(toy, whole, "--resume", whole)) == 0
    assert f"resume: {whole / 'checkpoint.pth'}, after 3 epochs" in capsys.readouterr().out
    shutil.copytree(whole, tmp_path / "old")
    (tmp_path / "old" / "checkpoint.pth").unlink()
    assert here(*words(toy, tmp_path / "new", "--resume", tmp_path / "old")) == 0
    assert f"resume: {tmp_path / 'old' / 'checkpoint-0002-000004.pth'}" in capsys.readouterr().out
    assert final(tmp_path / "new")[0] == final(whole)[0]


def test_the_average_counts_its_updates_across_a_resume(toy, tmp_path, monkeypatch):
    """One more at each, from 1 on, wherever it was stopped."""
    steps, update = [], ModelEmaV3.update
    monkeypatch.setattr(ModelEmaV3, "update", lambda ema, *args: steps.append(args[1]) or update(ema, *args))
    run = words(toy, tmp_path, "--epochs", 1)
    assert here(*run, **stop_when(lambda run: len(steps) == 4)) == 143
    assert here(*run, "--resume", "auto") == 0
    assert steps == [1, 2, 3, 4, 5, 6]


def test_an_average_without_warm_up_is_resumed_with_a_line(whole, toy, tmp_path, capsys):
    payload = checkpoint.load(whole / "checkpoint-0002-000004.pth")
    del payload["recipe"]["model_ema_warmup"], payload["args"]["model_ema_warmup"]
    torch.save(payload, tmp_path / "old.pth")
    line = "resume: --model-ema-warmup from here on, the checkpoint's average is without"
    assert here(*words(toy, tmp_path / "a", "--resume", tmp_path / "old.pth")) == 0
    assert line in capsys.readouterr().out.splitlines()
    assert here(*words(toy, tmp_path / "b", "--resume", whole, "--no-model-ema-warmup")) == 2
    assert "model_ema_warmup True -> False" in capsys.readouterr().err


def test_resume_auto(whole, toy, tmp_path, capsys):
    """Starts in an empty folder; goes on from the newest that is whole; with none left ends and deletes nothing."""
    folder = tmp_path / "run"
    assert here(*words(toy, folder, "--resume", "auto", "--epochs", 1, "--checkpoint-hist", 3)) == 0
    assert "resume: no checkpoint in" in capsys.readouterr().out
    held = sorted(path.name for path in folder.glob("*.pth"))
    assert held == ["checkpoint-0000-000002.pth", "checkpoint-0000-000004.pth", "checkpoint.pth", "checkpoint_best.pth"]
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    (folder / "checkpoint.pth").write_bytes((folder / "checkpoint.pth").read_bytes()[:-100])
    assert here(*words(toy, folder, "--resume", "auto")) == 0
    captured = capsys.readouterr()
    assert re.search(
        r"warning: not a readable checkpoint \(.*checkpoint.pth\).*trying the checkpoint before it", captured.err
    )
    assert "resume: " in captured.out and "checkpoint-0002-000004.pth, after 2 epochs and 4 updates" in captured.out
    assert final(folder) == final(whole)
    broken = [path for path in folder.glob("*.pth") if path.write_bytes(b"PK\x03\x04")]
    torch.save({"model": {"w": torch.ones(1)}}, broken[0])  # whole, and no training state
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert here(*words(toy, folder, "--resume", "auto")) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == len(broken) + 1 and f"all {len(broken)} are broken, nothing was deleted" in error[-1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("what", ["weights that are not finite", "an optimizer entry of another shape"])
def test_resume_auto_passes_over_a_whole_file_with_a_corrupt_state(what, whole, toy, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    payload = checkpoint.load(folder / "checkpoint.pth")
    CORRUPT[what](payload)
    torch.save(payload, folder / "checkpoint.pth")
    assert here(*words(toy, folder, "--resume", "auto")) == 0
    captured = capsys.readouterr()
    assert "trying the checkpoint before it" in captured.err and "checkpoint-0002-000004.pth" in captured.out
    assert final(folder) == final(whole)


def test_a_branch_that_was_left_is_not_taken_up_again(whole, toy, tmp_path, monkeypatch):
    """The run goes back to an earlier checkpoint with another rate: what lies beyond it goes with its first save."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoint-0002-000004.pth").rename(folder / "checkpoint-0001-000002.pth")
    payload = checkpoint.load(folder / "checkpoint-0001-000002.pth")
    payload["epoch"], payload["progress"]["updates"] = 0, 2
    torch.save(payload, folder / "checkpoint-0001-000002.pth")
    shutil.copy(folder / "checkpoint.pth", folder / "checkpoint-0002-000002.pth")
    changed = ["--resume-changed", "--lr", "1e-3", "--checkpoint-hist", 3]
    resumed = words(toy, folder, "--resume", folder / "checkpoint-0001-000002.pth", *changed)
    assert here(*resumed, **stop_when(lambda run: True)) == 143
    assert [path.name for path in files.older_checkpoints(folder)] == ["checkpoint-0001-000002.pth"]
    assert checkpoint.load(folder / "checkpoint.pth")["epoch"] == 0


def test_overwriting_with_a_checkpoint_from_elsewhere_leaves_nothing_of_the_run_before(whole, toy, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    checkpoint.save(
        folder / "checkpoint_best.pth", checkpoint.load(folder / "checkpoint_best.pth") | {"max_accuracy": 99.0}
    )
    assert here(*words(toy, folder, "--resume", whole / "checkpoint.pth", "--overwrite")) == 0
    assert (
        not (folder / "checkpoint_best.pth").exists()
        and not files.older_checkpoints(folder)
        and not (folder / "log.txt").exists()
    )


def test_a_log_that_lost_its_end_is_mended(whole, toy, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    checkpoint.save(folder / "checkpoint.pth", checkpoint.load(folder / "checkpoint-0002-000004.pth"))
    text = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(text[: text.rindex("test_acc1")])
    assert here(*words(toy, folder, "--resume", "auto")) == 0
    assert "is no line of a log: skipped" in capsys.readouterr().err and final(folder) == final(whole)


@pytest.mark.parametrize(
    "keep",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.slow),
        3,
        pytest.param(5, marks=pytest.mark.slow),
    ],
)
def test_the_last_checkpoints_are_kept_also_across_a_resume(keep, toy, tmp_path, monkeypatch):
    more = ["--checkpoint-hist", keep, "--resume", "auto"]
    assert here(*words(toy, tmp_path, *more), **stop_when(lambda run: run.epoch == 0 and run.evaluated)) == 143
    assert here(*words(toy, tmp_path, *more)) == 0
    # Updates 2 and 4 of each epoch of 6, its end, and the one that the stop made.
    places = [
        "0000-000002",
        "0000-000004",
        "0001-000000",
        "0001-000001",
        "0001-000002",
        "0001-000004",
        "0002-000000",
        "0002-000002",
        "0002-000004",
    ]
    expected = {f"checkpoint-{place}.pth" for place in places[len(places) - keep + 1 :]}
    assert {path.name for path in tmp_path.glob("checkpoint-*.pth")} == expected
    for path in files.candidates(tmp_path):
        checkpoint.load(path)


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(toy, tmp_path, monkeypatch, capsys):
    unlink = Path.unlink

    def failing(path, missing_ok=False):
        if files.OLDER.fullmatch(path.name):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", failing)
    assert here(*words(toy, tmp_path)) == 0
    line = f"cannot delete an old checkpoint ({tmp_path / 'checkpoint-0000-000002.pth'}): Input/output error"
    assert line in capsys.readouterr().err
    checkpoint.load(tmp_path / "checkpoint.pth")


def test_keep_going_tries_again_at_the_next_save(toy, tmp_path, monkeypatch, capsys):
    """A disk that was full for a while costs saves, not the run."""
    write, saves, full = checkpoint.atomic_write, [], {1, 2}

    def full_for_a_while(path, content, **how):
        saves.append(path)
        if len(saves) in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content, **how)

    monkeypatch.setattr(checkpoint, "atomic_write", full_for_a_while)
    run = [*words(toy, tmp_path / "run"), "--epochs", 1]
    assert here(*run) == 2
    assert "No space left on device" in capsys.readouterr().err and status(tmp_path / "run")["state"] == "failed"
    saves.clear()
    assert here(*run, "--keep-going") == 0
    warned = errors_of(capsys.readouterr().err)
    assert (
        len(warned) == 2 and all("going on (--keep-going): cannot write" in line for line in warned) and len(saves) > 2
    )
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pth")["epoch"] == 0
    # A signal is no preemption where nothing could be saved.
    saves.clear()
    full.update(range(100))
    assert here(*words(toy, tmp_path / "other"), "--keep-going", **stop_when(lambda run: True)) == 2
    assert "the state could not be saved" in capsys.readouterr().err and status(tmp_path / "other")["state"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(1, (1, 4)), (2, (0, 2)), (4, (0, 1))])
def test_the_same_seed_gives_the_same_bits(processes, workers, toy, tmp_path):
    """For any number of workers. (Of one process and none: tests/test_main.py.)"""
    found = []
    for number in workers:
        folder = tmp_path / str(number)
        done = program(
            "none",
            *words(toy, folder, "--epochs", 1, "--num_workers", number, batch=8 // processes),
            processes=processes,
        )
        assert done.returncode == 0, done.stderr
        found.append(final(folder))
    assert found[0] == found[1]


def test_a_checkpoint_from_elsewhere_does_not_write_over_a_run(whole, toy, tmp_path, capsys):
    """It continues in a new folder."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert here(*words(toy, run, "--resume", whole / "checkpoint.pth")) == 2
    assert "the folder holds a run" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert here(*words(toy, tmp_path / "new", "--resume", whole / "checkpoint.pth")) == 0


# ---------------------------------------------------------------- the same run


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--lr", "1e-3"], "lr 7.8125e-06 -> 1.5625e-05"),
        (["--epochs", "4"], "epochs 3 -> 4"),
        (["--seed", "1"], "seed 0 -> 1"),
        (["--batch-size", "6"], "global_batch 8 -> 12"),
        (["--mixup", "0.5"], "mixup 0.8 -> 0.5"),
        (["--model", "pcpvt_small_v0"], "model alt_gvt_demo -> pcpvt_small_v0"),
    ],
)
def test_another_run_is_refused(change, says, whole, toy, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert here(*words(toy, folder, "--resume", "auto", *change)) == 2
    error = capsys.readouterr().err
    assert says in error and "--resume-changed" in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_data_are_refused_and_moved_data_are_not(whole, toy, tmp_path, capsys):
    shutil.copytree(toy, tmp_path / "moved")
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert here(*words(tmp_path / "moved", run, "--resume", "auto")) == 0
    (tmp_path / "moved" / "train" / "ant" / "0.png").unlink()
    assert here(*words(tmp_path / "moved", run, "--resume", "auto")) == 2
    assert re.search(r"data [0-9a-f]{16} -> [0-9a-f]{16}", capsys.readouterr().err)


def test_a_changed_run_continues_where_it_is_asked_to(whole, toy, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert here(*words(toy, run, "--resume", "auto", "--epochs", 4, "--lr", "1e-3", "--resume-changed")) == 0
    assert "changed by --resume-changed: " in capsys.readouterr().out
    last = log_lines(run)[-1]
    assert last["epoch"] == 3 and last["train_lr"] == pytest.approx(
        1e-6 + 2 * (1.5625e-5 - 1e-6) / 5
    )  # the new schedule's warm-up, epoch 2


# ---------------------------------------------------------------- the optimizer's state, by names


def test_moments_follow_the_names_not_the_places(toy):
    """The same weights in timm's order: each moment still goes to the parameter that it was made for."""
    model = main.build_model(options.parse_args(["--model", "alt_gvt_demo"]), 4)
    names = [name for name, _ in model.named_parameters()]
    exempt = model.no_weight_decay()

    def stored(order):
        undecayed = [n for n in order if model.get_parameter(n).ndim <= 1 or n.endswith(".bias") or n in exempt]
        groups = [undecayed, [n for n in order if n not in undecayed]]
        flat = groups[0] + groups[1]
        moment = {n: torch.full_like(model.get_parameter(n), float(names.index(n) + 1)) for n in names}
        state = {i: {"step": 3, "exp_avg": moment[n], "exp_avg_sq": moment[n]} for i, n in enumerate(flat)}
        sizes = [list(range(len(groups[0]))), list(range(len(groups[0]), len(flat)))]
        return {
            "model": {n: model.get_parameter(n) for n in order},
            "optimizer": {"state": state, "param_groups": [{"params": s} for s in sizes]},
        }

    other = sorted(names, key=lambda name: name[::-1])
    assert other != names
    for order in (names, other):
        found = resume.optimizer_state(stored(order), model)
        assert {name: entry["exp_avg"].flatten()[0].item() for name, entry in found.items()} == {
            n: names.index(n) + 1 for n in names
        }
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim < 2]},
                {"params": [p for p in model.parameters() if p.ndim > 1]},
            ]
        )
        resume.load_optimizer_state(optimizer, model, found, [{}, {}])
        assert all(
            optimizer.state[p]["exp_avg"].flatten()[0] == names.index(n) + 1 for n, p in model.named_parameters()
        )


FAR = {"updates": 10**9, "meters": {name: {"total": 1.0, "count": 1, "recent": []} for name in ("lr", "loss")}}
CORRUPT = {
    "an optimizer entry of another shape": lambda p: p["optimizer"]["state"][3].update(exp_avg=torch.zeros(2, 3)),
    "an optimizer entry that is not finite": lambda p: p["optimizer"]["state"][3]["exp_avg"]
    .view(-1)[:1]
    .fill_(float("nan")),
    "a negative square": lambda p: p["optimizer"]["state"][3]["exp_avg_sq"].view(-1)[:1].fill_(-1.0),
    "whole numbers as exp_avg": lambda p: p["optimizer"]["state"][3].update(
        exp_avg=p["optimizer"]["state"][3]["exp_avg"].long()
    ),
    "words as a step": lambda p: p["optimizer"]["state"][3].update(step="many"),
    "a parameter without a state": lambda p: p["optimizer"]["state"].pop(5),
    "groups of other sizes": lambda p: p["optimizer"]["param_groups"][0]["params"].pop(),
    "a parameter twice": lambda p: p["optimizer"]["param_groups"][0]["params"].__setitem__(1, 0),
    "no groups": lambda p: p.update(optimizer={"state": {}}),
    "an optimizer in words": lambda p: p.update(optimizer="adamw"),
    "an epoch in words": lambda p: p.update(epoch="seven"),
    "an epoch before the first": lambda p: p.update(epoch=-5),
    "a score above 100": lambda p: p.update(max_accuracy=float("inf")),
    "a schedule in words": lambda p: p.update(lr_scheduler="cosine"),
    "another schedule": lambda p: p["lr_scheduler"].update(warmup_t=1),
    "random states of nobody": lambda p: p.update(random_states=[{"torch": 5}]),
    "weights that are not finite": lambda p: p["model"]["head.weight"].fill_(float("inf")),
    "weights of another shape": lambda p: p["model"].update({"head.weight": torch.zeros(7, 256)}),
    "whole numbers as weights": lambda p: p["model"].update({"head.bias": torch.zeros(4, dtype=torch.int64)}),
    "an average of another model": lambda p: p.update(model_ema={"w": torch.zeros(3)}),
    "an average in words": lambda p: p.update(model_ema="none"),
    "class names in numbers": lambda p: p.update(class_names=4),
    "a place inside an epoch in words": lambda p: p.update(progress="half"),
    "a place inside an epoch without its figures": lambda p: p.update(progress={"updates": 2, "meters": {"lr": 3}}),
    "an epoch without figures": lambda p: p.update(evaluated=False, train_stats={"lr": "high"}),
    "an optimizer entry that is missing": lambda p: p["optimizer"]["state"][3].pop("exp_avg_sq"),
    "an empty moment": lambda p: p["optimizer"]["state"][3].clear(),
    "an optimizer entry of nothing": lambda p: p["optimizer"]["state"][3].update(exp_avg=None),
    "several steps": lambda p: p["optimizer"]["state"][3].update(step=torch.ones(3)),
    "a place beyond the epoch": lambda p: p.update(progress=FAR),
    "figures in words": lambda p: p.update(
        progress=FAR | {"meters": {k: {"total": 1, "count": 1, "recent": ["x"]} for k in ("lr", "loss")}}
    ),
    "a figure beyond numbers": lambda p: p.update(evaluated=False, train_stats=p["train_stats"] | {"loss": 10**400}),
    "a loss scale that is no number": lambda p: p.update(scaler=p["scaler"] | {"scale": float("nan")}),
    "a loss scale in words": lambda p: p.update(scaler={"scale": "big"}),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_a_corrupt_training_state_is_one_line_and_changes_nothing(what, whole, toy, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    payload = checkpoint.load(whole / "checkpoint.pth")
    CORRUPT[what](payload)
    torch.save(payload, folder / "checkpoint.pth")
    before = (folder / "checkpoint.pth").read_bytes()
    assert here(*words(toy, folder, "--resume", folder / "checkpoint.pth")) == 2
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: ") and error.count("\n") == 1 and len(error) <= 301
    assert (folder / "checkpoint.pth").read_bytes() == before and len(list(folder.iterdir())) == 1


def test_a_published_training_checkpoint_is_compared_by_its_arguments(whole, toy, tmp_path, capsys):
    """Its rate is the scaled one, its global batch the batch of a process times the processes; its schedule has the old
    names.
    """
    ours = checkpoint.load(whole / "checkpoint.pth")
    args = options.parse_args([str(word) for word in words(toy, "x")])
    namespace = argparse.Namespace(
        **{name: getattr(args, name) for name in ("model", "epochs", "opt", "sched", "seed", "mixup", "batch_size")}
    )
    namespace.world_size, namespace.lr = 2, 7.8125e-06
    keep = (
        "t_initial",
        "lr_min",
        "cycle_limit",
        "warmup_t",
        "warmup_lr_init",
        "warmup_prefix",
        "t_in_epochs",
        "base_values",
    )
    schedule = {key: ours["lr_scheduler"][key] for key in keep} | {"t_mul": 1.0, "decay_rate": 0.1, "updates": None}
    state = {i: {**s, "step": int(s["step"])} for i, s in ours["optimizer"]["state"].items()}
    groups = [{"params": group["params"], "lr": 1.0} for group in ours["optimizer"]["param_groups"]]
    published = {
        "model": ours["model"],
        "optimizer": {"state": state, "param_groups": groups},
        "lr_scheduler": schedule,
        "epoch": 1,
        "args": namespace,
    }
    path = tmp_path / "published.pth"
    torch.save(published, path)
    assert here(*words(toy, tmp_path / "run", "--resume", path)) == 0
    assert (
        log_lines(tmp_path / "run")[0]["epoch"] == 2
        and log_lines(tmp_path / "run")[0]["train_lr"] == log_lines(whole)[2]["train_lr"]
    )
    schedule["lr_min"] = 0.0
    schedule["warmup_t"] = 1
    torch.save(published, path)
    assert here(*words(toy, tmp_path / "other", "--resume", path)) == 2
    assert "lr after epoch 1 " in capsys.readouterr().err
    namespace.lr = 1e-3
    torch.save(published, path)
    assert here(*words(toy, tmp_path / "other", "--resume", path)) == 2
    assert "lr 0.001 -> 7.8125e-06" in capsys.readouterr().err


# ---------------------------------------------------------------- one owner, and what became of it


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused(toy, tmp_path):
    first = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *map(str, words(toy, tmp_path)), "--epochs", "500"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        while not (tmp_path / "checkpoint.pth").exists():
            time.sleep(0.1)
            assert first.poll() is None
        second = program("none", *words(toy, tmp_path, "--resume", "auto", "--epochs", 500))
        assert second.returncode == 2 and f"process {first.pid} on " in second.stderr and second.stderr.count("\n") == 1
        start = time.perf_counter()
        command = [sys.executable, str(ROOT / "main.py"), *map(str, words(toy, tmp_path)), "--resume", "auto"]
        early = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert early.returncode == 2 and f"process {first.pid} on " in early.stderr and time.perf_counter() - start < 2
        assert status(tmp_path)["state"] == "running"
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 143
    assert status(tmp_path)["state"] == "preempted" and files.owner(tmp_path) is None


def test_status_of_a_failure_has_its_reason(toy, tmp_path, capsys):
    broken = tmp_path / "data"
    shutil.copytree(toy, broken)
    (broken / "val" / "dog" / "7.png").write_bytes(b"no image")
    assert here(*words(broken, tmp_path / "run")) == 2
    found = status(tmp_path / "run")
    assert found["state"] == "failed" and "7.png" in found["reason"] and found["epoch"] == 0
