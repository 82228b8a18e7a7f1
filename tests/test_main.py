"""main.py as its users run it: the published command lines, launchers, resume, and bad input."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT, SMALL_RUN, errors_of, launch, log_lines, make_images, run_main

import engine
import main
from gvt_ops import onednn
from samplers import ShuffleSampler
from training import checkpoint, options

RESULT = re.compile(r"^\* Acc@1 (\d+\.\d{3}) Acc@5 (\d+\.\d{3}) loss (\d+\.\d{3})$", re.M)
ACCURACY = re.compile(r"^Accuracy of the network on the 101 test images: \d+\.\d%$", re.M)


def here(*words, **hooks):
    """main.py inside this process: (exit code, nothing) or the error."""
    return main.run(options.parse_args([str(word) for word in words]), **hooks)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """A run of two epochs, in this process."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert here(*SMALL_RUN, "--data-path", toy, "--output_dir", folder) == 0
    return folder


# ---------------------------------------------------------------- what a run leaves


def test_log_and_records(trained, toy):
    lines = log_lines(trained)
    assert [line["epoch"] for line in lines] == [0, 1]
    keys = [
        "train_lr",
        "train_loss",
        "test_loss",
        "test_acc1",
        "test_acc5",
        "epoch",
        "n_parameters",
        "time",
        "data_time",
        "images_per_s",
        "max_memory_mb",
    ]
    assert all(list(line) == keys for line in lines)
    assert lines[0]["n_parameters"] == 2_480_068
    assert json.loads((trained / "class_names.json").read_text()) == ["ant", "bee", "cat", "dog"]
    assert json.loads((trained / "args.json").read_text())["data_path"] == str(toy)
    assert {"command", "commit", "torch", "timm", "device", "seed"} <= json.loads(
        (trained / "environment.json").read_text()
    ).keys()


def test_checkpoints_have_the_published_format_and_load_without_an_allow_list(trained):
    for name in ("checkpoint.pth", "checkpoint_best.pth"):
        payload = torch.load(trained / name, weights_only=True)
        assert list(payload)[:6] == ["model", "optimizer", "lr_scheduler", "epoch", "scaler", "args"]
        assert (
            type(payload["args"]) is dict
            and payload["class_names"] == ["ant", "bee", "cat", "dog"]
            and payload["evaluated"]
        )
    assert payload["max_accuracy"] == max(line["test_acc1"] for line in log_lines(trained))


def test_the_seed_decides_the_bits(trained, toy, tmp_path):
    """Again, with two workers: the same weights and figures. With another seed: others."""
    for seed, workers, equal in ((0, 2, True), (1, 0, False)):
        folder = tmp_path / str(seed)
        words = [*SMALL_RUN, "--data-path", toy, "--output_dir", folder, "--seed", seed, "--num_workers", workers]
        assert here(*words) == 0
        a, b = (checkpoint.load(str(path / "checkpoint.pth"))["model"] for path in (trained, folder))
        assert same(a, b) == equal
        assert (log_lines(trained)[1]["train_loss"] == log_lines(folder)[1]["train_loss"]) == equal


def test_resume_ends_with_the_same_bits(trained, toy, tmp_path, monkeypatch):
    """Stopped after the first epoch: weights, optimizer, random states, log and best as of the run that was not."""
    words = [*SMALL_RUN, "--data-path", toy, "--output_dir", tmp_path]
    original = engine.train_one_epoch

    def stop(*args, **kwargs):
        if args[5] == 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(engine, "train_one_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        here(*words)
    monkeypatch.setattr(engine, "train_one_epoch", original)
    assert here(*words, "--resume", tmp_path / "checkpoint.pth") == 0
    a, b = (checkpoint.load(str(folder / "checkpoint.pth")) for folder in (trained, tmp_path))
    assert (
        same(a["model"], b["model"])
        and a["max_accuracy"] == b["max_accuracy"]
        and a["lr_scheduler"] == b["lr_scheduler"]
    )
    for key, state in a["optimizer"]["state"].items():
        assert same(state, b["optimizer"]["state"][key])
    assert torch.equal(a["random_states"][0]["torch"], b["random_states"][0]["torch"])
    timeless = [
        {k: v for k, v in line.items() if k not in ("time", "data_time", "images_per_s", "max_memory_mb")}
        for line in log_lines(trained)
    ]
    assert timeless == [{k: line[k] for k in timeless[0]} for line in log_lines(tmp_path)]


def test_an_epoch_that_was_not_evaluated_is_evaluated_on_resume(trained, toy, tmp_path, monkeypatch, capsys):
    words = [*SMALL_RUN, "--data-path", toy, "--output_dir", tmp_path]
    original = engine.evaluate

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        here(*words)
    assert not checkpoint.load(str(tmp_path / "checkpoint.pth"))["evaluated"] and not (tmp_path / "log.txt").exists()
    monkeypatch.setattr(engine, "evaluate", original)
    assert here(*words, "--resume", tmp_path / "checkpoint.pth") == 0
    assert "epoch 0 was trained but not evaluated: evaluating it" in capsys.readouterr().out
    assert [(line["epoch"], line["test_acc1"]) for line in log_lines(tmp_path)] == [
        (line["epoch"], line["test_acc1"]) for line in log_lines(trained)
    ]


def test_the_best_is_never_replaced_by_a_worse_one_after_a_resume(trained, toy, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    payload = checkpoint.load(str(folder / "checkpoint.pth"))
    checkpoint.save(folder / "checkpoint.pth", payload | {"max_accuracy": 100.0})
    before = (folder / "checkpoint_best.pth").read_bytes()
    words = [
        *SMALL_RUN,
        "--data-path",
        toy,
        "--output_dir",
        folder,
        "--epochs",
        3,
        "--resume",
        folder / "checkpoint.pth",
    ]
    assert here(*words) == 2  # other epochs are another schedule
    assert here(*words, "--resume-changed") == 0
    assert (folder / "checkpoint_best.pth").read_bytes() == before and log_lines(folder)[-1]["epoch"] == 2


@pytest.mark.slow
def test_a_published_training_checkpoint_continues(toy, tmp_path):
    """A Namespace, groups without today's settings, steps as plain numbers, the scheduler's old names."""
    import argparse

    folder, words = tmp_path / "run", [*SMALL_RUN, "--data-path", toy]
    assert here(*words, "--epochs", 1, "--output_dir", folder) == 0
    ours = torch.load(folder / "checkpoint.pth", weights_only=True)
    keys = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params", "initial_lr")
    groups = [{key: group[key] for key in keys if key in group} for group in ours["optimizer"]["param_groups"]]
    state = {i: {**s, "step": int(s["step"])} for i, s in ours["optimizer"]["state"].items()}
    schedule = {"t_mul" if key == "cycle_mul" else key: value for key, value in ours["lr_scheduler"].items()}
    published = {
        "model": ours["model"],
        "optimizer": {"state": state, "param_groups": groups},
        "lr_scheduler": schedule,
        "epoch": 0,
    }
    torch.save(
        published | {"scaler": {}, "args": argparse.Namespace(opt="adamw", sched="cosine")}, tmp_path / "published.pth"
    )
    assert here(*words, "--output_dir", tmp_path / "new", "--resume", tmp_path / "published.pth") == 0
    assert (
        here(*words, "--output_dir", folder, "--resume", folder / "checkpoint.pth", "--resume-changed") == 0
    )  # of one epoch before
    assert log_lines(tmp_path / "new")[0]["epoch"] == 1
    assert log_lines(tmp_path / "new")[0]["train_lr"] == log_lines(folder)[1]["train_lr"]


@pytest.mark.parametrize("words", [["--opt", "sgd"], ["--sched", "step"], ["--weight-decay", "0"]])
def test_a_resume_with_another_optimizer_is_one_line(words, trained, toy, tmp_path, capsys):
    assert (
        here(
            *SMALL_RUN,
            "--data-path",
            toy,
            "--output_dir",
            tmp_path / "run",
            "--resume",
            trained / "checkpoint.pth",
            *words,
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: ") and error.count("\n") == 1 and "checkpoint.pth" in error
    assert not (tmp_path / "run").exists()


def test_bare_weights_do_not_write_over_a_run(trained, toy, tmp_path, capsys):
    folder, bare = tmp_path / "run", tmp_path / "bare.pth"
    shutil.copytree(trained, folder)
    torch.save(checkpoint.load(str(trained / "checkpoint.pth"))["model"], bare)
    assert here(*SMALL_RUN, "--data-path", toy, "--output_dir", folder, "--resume", bare) == 2
    assert "the folder holds a run" in capsys.readouterr().err and len(log_lines(folder)) == 2
    assert (
        here(
            *SMALL_RUN,
            "--epochs",
            1,
            "--data-path",
            toy,
            "--output_dir",
            tmp_path / "new",
            "--resume",
            bare,
            "--model-ema",
        )
        == 0
    )


# ---------------------------------------------------------------- ways to train


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--torchcompile"], "compiled by inductor: freezing on, layout_optimization off\noperators: PyTorch's own"),
        (["--torchcompile", "eager"], "compiled by eager: its default settings\n37 linear layers: "),
        pytest.param(
            ["--amp-dtype", "bfloat16"],
            "37 linear layers: PyTorch's (autocast chooses the dtype of F.linear)\n",
            marks=pytest.mark.skipif(not onednn.AVAILABLE, reason="no oneDNN here whatever the dtype"),
        ),
    ],
)
def test_what_computes_is_logged(words, says, capsys):
    args = options.parse_args(["--model", "alt_gvt_demo", *words])
    model = main.prepare_model(main.build_model(args, 3), args, torch.device("cpu"))
    with torch._inductor.config.patch(freezing=False):  # which freezing is on for the whole process
        main.compile_model(model, args, inference=True)
    assert says in capsys.readouterr().out


def test_residuals_stay_in_float32_with_a_warning(capsys):
    args = options.parse_args(["--model", "alt_gvt_demo", "--residual-dtype", "autocast"])
    main.prepare_model(main.build_model(args, 3), args, torch.device("cpu"))
    assert "without effect (--residual-dtype autocast): --amp-dtype is float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--model-ema", "--grad-accum-steps", "2", "--channels-last"], id="ema"),
        pytest.param(
            ["--amp-dtype", "float16", "--mixup", "0", "--cutmix", "0", "--smoothing", "0"],
            id="float16",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--torchcompile", "eager"], id="compiled", marks=pytest.mark.slow),
        pytest.param(
            ["--repeated-aug", "--amp-dtype", "bfloat16", "--grad-checkpointing", "--opt", "lamb", "--sched", "step"],
            id="bfloat16",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [
                "--mixup",
                "0",
                "--cutmix-minmax",
                "0.2",
                "0.8",
                "--opt",
                "sgd",
                "--input-size",
                "40",
                "--grad-checkpointing",
                "mlp",
            ],
            id="minmax",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--mixup", "0", "--cutmix", "1", "--mixup-mode", "elem", "--drop", "0.1", "--clip-grad", "0"],
            id="cutmix",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_options_together(words, toy, tmp_path, capsys):
    words = [*SMALL_RUN, "--data-path", toy, "--output_dir", tmp_path, *words]
    assert here(*words) == 0
    last = log_lines(tmp_path)[-1]
    assert last["epoch"] == 1 and last["train_loss"] > 0
    out = capsys.readouterr().out
    if "--model-ema" in words:
        assert (
            "Accuracy of the EMA network on the 101 test images" in out
            and "global batch 16 (8 x 1 processes x 2 steps)" in out
        )
        assert here("--eval", "--model-ema", *words[:-4], "--resume", tmp_path / "checkpoint.pth") == 0
        scored = float(RESULT.findall(capsys.readouterr().out)[-1][0])
        assert scored == pytest.approx(last["ema_test_acc1"], abs=5e-4)


def test_the_ema_is_the_formula(toy, tmp_path):
    args = options.parse_args(
        [*SMALL_RUN, "--data-path", str(toy), "--output_dir", str(tmp_path), "--model-ema", "--model-ema-decay", "0.9"]
    )
    model, *_, ema = main.build_networks(args, ["a", "b"], torch.device("cpu"))
    average = model.norm.weight.detach().clone()
    for value in (1.0, 3.0):
        with torch.no_grad():
            model.norm.weight.fill_(value)
        ema.update(model)
        average = 0.9 * average + 0.1 * value
    assert torch.allclose(ema.module.norm.weight, average)


def test_the_ema_warms_up(toy, tmp_path, monkeypatch):
    """Decay 1 - n^(-2/3) at update n, up to --model-ema-decay; without warm-up the same from the start."""
    for more, decays in (([], [0.0, 1 - 2 ** (-2 / 3), 0.5]), (["--no-model-ema-warmup"], [0.5] * 3)):
        words = ["--model", "alt_gvt_demo", "--model-ema", "--model-ema-decay", "0.5", *more]
        model, *_, ema = main.build_networks(options.parse_args(words), ["a", "b"], torch.device("cpu"))
        average = model.norm.weight.detach().clone()
        for step, decay in enumerate(decays, 1):
            with torch.no_grad():
                model.norm.weight.fill_(float(step))
            ema.update(model, step if ema.use_warmup else None)
            average = decay * average + (1 - decay) * step
            assert torch.allclose(ema.module.norm.weight, average)


def test_the_average_of_a_short_run_is_near_its_model(toy, tmp_path):
    """6 updates. With a decay of 0.9998 from the start it was the initial weights."""
    found = {}
    for more in ([], ["--no-model-ema-warmup"]):
        start, folder = {}, tmp_path / str(len(more))

        def note(phase, state, *batch, start=start):
            start.update({} if start else {name: value.clone() for name, value in state.model.state_dict().items()})

        words = [*SMALL_RUN, "--data-path", toy, "--output_dir", folder, "--lr", 0.05, "--warmup-epochs", 0]
        words += ["--epochs", 1]
        assert here(*words, "--model-ema", *more, on_poll=note) == 0
        payload = checkpoint.load(str(folder / "checkpoint.pth"))
        weights = [name for name in start if name.endswith("weight")]
        away = sum((payload["model"][name] - start[name]).square().sum() for name in weights).sqrt()
        left = sum((payload["model"][name] - payload["model_ema"][name]).square().sum() for name in weights).sqrt()
        found[len(more)] = (left / away).item()
    assert found[0] < 0.5 and found[1] > 0.95


def test_finetune_loads_everything_but_a_head_of_another_size(trained, tmp_path, capsys):
    data = tmp_path / "data"
    for part in ("train", "val"):
        make_images(data / part, classes=("x", "y"), each=8)
    words = [
        "--model",
        "alt_gvt_demo",
        "--device",
        "cpu",
        "--num_workers",
        0,
        "--batch-size",
        8,
        "--data-path",
        data,
        "--input-size",
        64,
    ]
    words += [
        "--finetune",
        trained / "checkpoint.pth",
        "--output_dir",
        tmp_path / "run",
        "--epochs",
        1,
        "--lr",
        0,
        "--min-lr",
        0,
        "--warmup-epochs",
        0,
    ]
    assert here(*words) == 0
    out = capsys.readouterr().out
    assert "has 4 classes, this data set 2: reinitialized" in out
    assert re.search(r"finetune: \d+ of \d+ tensors loaded from .*; not loaded: head.bias, head.weight", out)
    before, after = (
        checkpoint.load(str(trained / "checkpoint.pth"))["model"],
        checkpoint.load(str(tmp_path / "run/checkpoint.pth"))["model"],
    )
    assert after["head.weight"].shape == (2, 256)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("head."))


@pytest.mark.parametrize(
    ("theirs", "kept"), [(["a", "b"], True), (None, True), (["b", "a"], False), (["a", "c"], False)]
)
def test_finetune_keeps_a_head_of_the_same_class_names_only(tmp_path, capsys, theirs, kept):
    source, model = (timm.create_model("alt_gvt_demo", num_classes=2) for _ in range(2))
    before = model.head.weight.clone()
    names = {"class_names": theirs} if theirs else {}
    checkpoint.save(tmp_path / "other.pth", {"model": source.state_dict()} | names)
    line = checkpoint.finetune(model, checkpoint.Checkpoint.open(str(tmp_path / "other.pth")), classes=["a", "b"])
    assert torch.equal(model.head.weight, source.head.weight if kept else before)
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert ("not loaded: none" in line) == kept
    assert ("has other class names (" in capsys.readouterr().out) == (not kept)


def test_banner_warns_of_another_batch_than_the_recipes(toy, tmp_path, capsys):
    words = [
        "--model",
        "alt_gvt_small",
        "--input-size",
        32,
        "--batch-size",
        16,
        "--num_workers",
        0,
        "--data-path",
        toy,
        "--device",
        "cpu",
    ]

    def stop(*where):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here(*words, "--output_dir", tmp_path, on_poll=stop)
    out = "".join(capsys.readouterr())
    assert "global batch 16 (16 x 1 processes x 1 steps), lr 1.5625e-05 (0.0005 x 16 / 512)" in out
    assert "was trained with a global batch of 2048, not 16" in out and "3 updates an epoch, 23549" in out


# ---------------------------------------------------------------- evaluation and throughput


def evaluation(trained, toy, *words):
    return [
        "--eval",
        "--resume",
        trained / "checkpoint.pth",
        "--model",
        "alt_gvt_demo",
        "--data-path",
        toy,
        "--input-size",
        32,
        "--batch-size",
        8,
        *words,
    ]


def test_evaluation_needs_only_val_and_makes_nothing(trained, toy, tmp_path, capsys, monkeypatch):
    (tmp_path / "data").mkdir()
    os.symlink(toy / "val", tmp_path / "data" / "val")
    monkeypatch.chdir(tmp_path)
    assert here(*evaluation(trained, tmp_path / "data", "--num_workers", 0)) == 0
    out = capsys.readouterr().out
    assert float(RESULT.search(out)[1]) == pytest.approx(log_lines(trained)[-1]["test_acc1"], abs=5e-4)
    assert RESULT.search(out)[2] == "100.000" and ACCURACY.search(out)  # four classes: top-5 is everything
    assert os.listdir(tmp_path) == ["data"]


def test_a_val_without_some_classes_is_scored_with_trainings_indices(trained, toy, tmp_path, capsys):
    shutil.copytree(toy / "val" / "cat", tmp_path / "val" / "cat")
    assert here(*evaluation(trained, tmp_path, "--num_workers", 0)) == 0
    out = capsys.readouterr().out
    assert "val has no images of 3 of 4 classes (ant, bee, dog): scored with the class indices of training" in out
    cats = RESULT.search(out)[1]
    counted = hand_count(trained, tmp_path / "val" / "cat", label=2)
    assert cats == f"{100 * counted / 25:.3f}"


def hand_count(trained, folder, label):
    import timm
    from PIL import Image
    from torchvision import transforms

    model = timm.create_model("alt_gvt_demo", num_classes=4).eval()
    model.load_state_dict(torch.load(trained / "checkpoint.pth", weights_only=True)["model"])
    prepare = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    with torch.inference_mode():
        images = [
            prepare(Image.open(path).convert("RGB").resize((32, 32), Image.BICUBIC))
            for path in sorted(folder.iterdir())
        ]
        return (model(torch.stack(images)).argmax(1) == label).sum().item()


def test_weights_without_names(trained, toy, tmp_path, capsys):
    """As the published ones: as many folders as outputs are taken in sorted order, fewer are refused."""
    bare = tmp_path / "bare.pth"
    torch.save(checkpoint.load(str(trained / "checkpoint.pth"))["model"], bare)
    words = evaluation(trained, toy, "--num_workers", 0)
    words[2] = bare
    assert here(*words) == 0
    assert float(RESULT.search(capsys.readouterr().out)[1]) == pytest.approx(
        log_lines(trained)[-1]["test_acc1"], abs=5e-4
    )
    shutil.copytree(toy / "val" / "cat", tmp_path / "val" / "cat")
    words[words.index(toy)] = tmp_path
    assert here(*words) == 2
    assert "val has 1 classes, the weights 4 (and the weights do not say which)" in capsys.readouterr().err


def test_evaluation_takes_from_the_checkpoint_what_decides_the_score(trained, toy, capsys):
    """The model and the size that it was trained at: 224 pixels gave another number."""
    words = ["--eval", "--data-path", toy, "--num_workers", 0, "--device", "cpu"]
    assert here(*words, "--resume", trained / "checkpoint.pth") == 0
    out = capsys.readouterr().out
    assert float(RESULT.search(out)[1]) == pytest.approx(log_lines(trained)[-1]["test_acc1"], abs=5e-4)
    taken = "--model alt_gvt_demo, --input-size 32, --eval-crop-ratio 0.875"
    assert f"from the checkpoint: {taken}" in out and out.count("from the checkpoint:") == 1
    assert here(*words, "--resume", trained, "--input-size", 64) == 0  # the user's word counts
    out = capsys.readouterr().out
    assert "--input-size 64 as given, where the checkpoint has 32" in out
    assert f"evaluating {trained / 'checkpoint_best.pth'}" in out
    assert here(*words, "--resume", trained, "--model", "alt_gvt_small") == 2
    captured = capsys.readouterr()
    assert "--model alt_gvt_small as given, where the checkpoint has alt_gvt_demo" in captured.out
    assert "the weights do not fit the model" in captured.err and captured.err.count("\n") == 1


def test_evaluation_of_an_official_checkpoint_takes_its_arguments(trained, toy, tmp_path, capsys):
    """A Namespace, whose model may be one that only its own code knows; bare weights have nothing to take."""
    import argparse

    state = checkpoint.load(str(trained / "checkpoint.pth"))["model"]
    torch.save({"model": state, "args": argparse.Namespace(model="mine", input_size=32)}, tmp_path / "a.pth")
    words = ["--eval", "--data-path", toy, "--num_workers", 0, "--device", "cpu", "--model", "alt_gvt_demo"]
    assert here(*words, "--resume", tmp_path / "a.pth") == 0
    out = capsys.readouterr().out
    assert "from the checkpoint: --input-size 32\n" in out
    assert float(RESULT.search(out)[1]) == pytest.approx(log_lines(trained)[-1]["test_acc1"], abs=5e-4)


def test_a_folder_is_its_best_checkpoint_for_evaluation_and_finetuning(trained, toy, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    best = checkpoint.load(str(folder / "checkpoint_best.pth"))
    best["model"]["head.weight"].zero_()
    best["model"]["head.bias"].copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))  # everything is a dog
    checkpoint.save(folder / "checkpoint_best.pth", best)
    words = ["--eval", "--data-path", toy, "--num_workers", 0, "--device", "cpu"]
    for where in (["--resume", folder], ["--resume", "auto", "--output_dir", folder]):
        assert here(*words, *where) == 0
        assert RESULT.search(capsys.readouterr().out)[1] == f"{100 * 25 / 101:.3f}"
    args = options.parse_args(["--finetune", str(folder), "--model", "alt_gvt_demo"])
    model, *_ = main.build_networks(args, ["ant", "bee", "cat", "dog"], torch.device("cpu"))
    assert torch.equal(model.head.bias, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert f"tensors loaded from {folder / 'checkpoint_best.pth'}" in capsys.readouterr().out
    (folder / "checkpoint_best.pth").unlink()  # as before the first score
    assert here(*words, "--resume", folder) == 0
    assert f"evaluating {folder / 'checkpoint.pth'}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["alt_gvt_demo", pytest.param("pcpvt_small_v0", marks=pytest.mark.slow)])
def test_throughput_without_a_data_set(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert here("--throughout", "--model", name, "--input-size", 32, "--batch-size", 2, "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "throughput averaged with 30 times" in out and re.search(r"^batch_size 3 throughput \d+\.\d+$", out, re.M)
    assert not list(tmp_path.iterdir())


def test_throughput_with_a_data_set(toy, capsys):
    assert here("--throughput", *SMALL_RUN, "--data-path", toy) == 0
    assert re.search(r"^batch_size 12 throughput \d+\.\d+$", capsys.readouterr().out, re.M)


# ---------------------------------------------------------------- launchers


def test_a_plain_run_as_a_program(toy, tmp_path):
    done = run_main(*SMALL_RUN[:-2], "--epochs", 1, "--data-path", toy, "--output_dir", tmp_path, "--color-jitter", 0.3)
    assert done.returncode == 0, done.stderr
    for line in (
        "Not using distributed mode",
        "device: cpu (no CUDA device found)",
        "Creating model: alt_gvt_demo",
        "number of params: 2480068",
        "Start training for 1 epochs",
    ):
        assert line in done.stdout.splitlines()
    for form in (
        r"^Namespace\(",
        r"^Epoch: \[0\]  \[0/6\]  eta: ",
        r"^Averaged stats: lr: ",
        r"^Max accuracy: \d+\.\d\d%$",
        r"^Training time \d:",
    ):
        assert re.search(form, done.stdout, re.M), form
    assert errors_of(done.stderr) == ["main.py: warning: --color-jitter has no effect (--aa is set)"]
    assert "\r" not in done.stdout


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_published_training_command(processes, toy, tmp_path):
    words = [
        *SMALL_RUN[:-4],
        "--batch-size",
        4,
        "--epochs",
        1,
        "--data-path",
        toy,
        "--dist-eval",
        "--drop-path",
        0.3,
        "--output_dir",
        tmp_path,
    ]
    done = run_main(*words, launcher=launch(processes))
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"distributed init \(rank (\d)\): env://", done.stdout)) == [
        str(rank) for rank in range(processes)
    ]
    assert done.stdout.count("Start training") == 1 and ACCURACY.search(done.stdout)
    assert "strides" not in done.stderr, "DistributedDataParallel warns of gradients in another memory format"
    assert f"global batch {4 * processes} (4 x {processes} processes x 1 steps)" in done.stdout
    assert len(checkpoint.load(str(tmp_path / "checkpoint.pth"))["random_states"]) == processes
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0]


@pytest.mark.slow
def test_resume_with_two_processes_ends_with_the_same_bits(toy, tmp_path):
    words = [*SMALL_RUN, "--data-path", toy, "--batch-size", 4, "--repeated-aug", "--model-ema"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_main(*words, "--output_dir", whole, launcher=launch(2)).returncode == 0
    stop = "import sys; sys.argv[0] = 'main.py'; import main; from training import options; a = options.parse_args(sys.argv[1:]); t = main.evaluate_epoch\n"
    stop += "def f(*parts):\n t(*parts); sys.exit(0)\nmain.evaluate_epoch = f; main.main(a)"
    (tmp_path / "stop.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{stop}")
    launcher = [sys.executable, *launch(2), str(tmp_path / "stop.py"), *map(str, words), "--output_dir", str(parts)]
    subprocess.run(launcher, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert len(log_lines(parts)) == 1
    done = run_main(*words, "--output_dir", parts, "--resume", parts / "checkpoint.pth", launcher=launch(2))
    assert done.returncode == 0, done.stderr
    a, b = (checkpoint.load(str(folder / "checkpoint.pth")) for folder in (whole, parts))
    assert same(a["model"], b["model"]) and same(a["model_ema"], b["model_ema"])
    assert [line["train_loss"] for line in log_lines(whole)] == [line["train_loss"] for line in log_lines(parts)]


@pytest.fixture(scope="module")
def alone(trained, toy):
    done = run_main(*evaluation(trained, toy))
    assert done.returncode == 0, done.stderr
    return RESULT.search(done.stdout).groups()


def test_the_published_evaluation_command(alone, trained):
    assert float(alone[0]) == pytest.approx(log_lines(trained)[-1]["test_acc1"], abs=5e-4)


@pytest.mark.parametrize("processes", [pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 4)])
def test_evaluation_is_exact_for_any_number_of_processes(processes, alone, trained, toy):
    """101 images are no multiple of 2, 3 or 4: none is left out or counted twice."""
    done = run_main(*evaluation(trained, toy, "--dist-eval"), launcher=launch(processes))
    assert done.returncode == 0, done.stderr
    assert RESULT.search(done.stdout).groups() == alone and ACCURACY.search(done.stdout)


@pytest.mark.slow
def test_torchrun_and_two_agents_that_meet(trained, toy, alone):
    """Two nodes, each with its own launcher: here on one machine."""
    port = launch(1)[3].split("=")[1]
    agents = []
    for node in range(2):
        rendezvous = [
            "--nnodes=2",
            f"--node_rank={node}",
            "--nproc_per_node=1",
            "--master_addr=127.0.0.1",
            f"--master_port={port}",
        ]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *rendezvous,
            str(ROOT / "main.py"),
            *map(str, evaluation(trained, toy, "--dist-eval")),
        ]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        agents.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)
        )
    outputs = [agent.communicate(timeout=240) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert RESULT.search(outputs[0][0]).groups() == alone and not RESULT.search(outputs[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_slurms_variables(mode, trained, toy, alone, tmp_path):
    """Tasks of one training run do not take each other for another run in the folder."""
    port = launch(1)[3].split("=")[1]
    words = evaluation(trained, toy, "--dist-eval")
    if mode == "training":
        words = [*SMALL_RUN, "--epochs", 1, "--data-path", toy, "--output_dir", tmp_path, "--resume", "auto"]
        (tmp_path / ".lock").write_text("process 1 on nowhere\n")  # of a run that has ended
    tasks = []
    for task in range(2):
        slurm = {
            "SLURM_PROCID": str(task),
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": str(task),
            "SLURM_JOB_NODELIST": "localhost",
            "MASTER_PORT": port,
        }
        command = [sys.executable, str(ROOT / "main.py"), *map(str, words)]
        env = os.environ | {"OMP_NUM_THREADS": "1"} | slurm
        tasks.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)
        )
    outputs = [task.communicate(timeout=240) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert RESULT.search(outputs[0][0]).groups() == alone or mode == "training"


# ---------------------------------------------------------------- bad input


CORRUPT = """
import sys; sys.path.insert(0, {root!r}); sys.argv[0] = "main.py"
import main, utils
from training import options
build = main.build_criterion

def corrupt(**settings):
    criterion, calls = build(**settings), []
    def loss(logits, targets):
        calls.append(1)
        return criterion(logits, targets) * (float("nan") if utils.get_rank() == 1 and len(calls) == 3 else 1.0)
    return loss

main.build_criterion = corrupt
sys.exit(main.run(options.parse_args(sys.argv[1:])))
"""


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_every_process(trained, toy, tmp_path):
    """In one process of two: exit code 1, step and loss in a line of each; the last good checkpoint stays as it was."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pth", ".txt")}
    (tmp_path / "start.py").write_text(CORRUPT.format(root=str(ROOT)))
    words = [*SMALL_RUN, "--batch-size", 4, "--epochs", 3, "--data-path", toy, "--output_dir", folder]
    words += ["--resume", folder / "checkpoint.pth", "--resume-changed"]  # for one epoch more
    command = [sys.executable, *launch(2), str(tmp_path / "start.py"), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240, cwd=ROOT
    )
    assert done.returncode == 1
    assert (
        re.findall(r"main.py: error: the loss is (\w+) \((epoch \d, step \d)\)", done.stderr)
        == [("nan", "epoch 2, step 2")] * 2
    )
    found = json.loads((folder / "non_finite.json").read_text())
    order = ShuffleSampler(48, seed=0)
    order.set_epoch(2)
    dealt = [index for _, _, index in order][16:24]  # of the third step: four images for each of two processes, in turn
    files = sorted(str(path) for path in (toy / "train").rglob("*.png"))
    files.sort(key=lambda path: path.rsplit("/", 2)[1:])
    assert (found["epoch"], found["step"]) == (2, 2) and found["images"] == [
        [files[i] for i in dealt[rank::2]] for rank in range(2)
    ]
    assert {name: (folder / name).read_bytes() for name in before} == before


BAD = {
    "missing folder": (["--data-path", "/nowhere/at/all"], "no such data folder (/nowhere/at/all/train)"),
    "unknown model": (["--model", "alt_gvt_smal"], "unknown model (--model alt_gvt_smal): did you mean alt_gvt_small"),
    "the published default": (["--model", "pvt_small"], "alt_gvt_small"),
    "odd batch": (["--batch-size", 7], "an odd batch with Mixup (--batch-size 7)"),
    "large batch": (["--batch-size", 64], "global batch larger than the data set"),
    "too many steps": (["--grad-accum-steps", 50], "global batch larger than the data set"),
    "small input": (["--input-size", 28], "too small (--input-size 28)"),
    "no weights": (["--eval"], "nothing to evaluate (--eval)"),
    "missing weights": (["--eval", "--resume", "/nowhere.pth"], "no such file (/nowhere.pth)"),
    "missing checkpoint": (["--resume", "/nowhere.pth"], "no such file (/nowhere.pth)"),
    "folder without weights": (["--eval", "--resume", "TOY"], "a folder without a checkpoint ("),
    "run without weights": (["--eval", "--resume", "auto"], "a folder without a checkpoint ("),
    "folder to resume": (["--resume", "TOY"], "a folder without a checkpoint ("),
    "folder to finetune": (["--finetune", "TOY"], "a folder without a checkpoint ("),
    "missing finetune": (["--finetune", "/nowhere.pth"], "no such file (/nowhere.pth)"),
    "no such optimizer": (["--opt", "adamv"], "cannot make the optimizer (--opt adamv)"),
    "no such schedule": (["--sched", "cosinus"], "no such schedule (--sched cosinus)"),
    "schedule by score": (["--sched", "plateau"], "--sched plateau"),
    "one beta": (["--opt-betas", "0.9"], "cannot make the optimizer (--opt adamw)"),
    "no epochs": (["--start_epoch", "2", "--epochs", "2"], "no epoch is left (--start_epoch 2, --epochs 2)"),
    "no such compiler": (["--torchcompile", "nope"], "no such compiler (--torchcompile nope)"),
    "no folder possible": (["--output_dir", "/proc/nope/x"], "cannot make the folder (--output_dir /proc/nope/x)"),
    "no connection": (
        ["--resume", "https://localhost:1/x-01234567.pth"],
        "cannot download (https://localhost:1/x-01234567.pth)",
    ),
    "no such policy": (["--aa", "rand-z1"], "no such augmentation (--aa rand-z1)"),
    "no MLPs to recompute": (
        ["--model", "resnet18", "--grad-checkpointing", "mlp"],
        "(--grad-checkpointing mlp, --model resnet18)",
    ),
    "no such device": (["--device", "cuda:99"], "--device"),
    "device in words": (["--device", "gpu"], "--device gpu"),
    "device without values": (["--device", "meta"], "no such device here (--device meta"),
    "device of another machine": (["--device", "mps"], "no such device here (--device mps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, toy, tmp_path, capsys):
    words, says = BAD[case]
    words = [toy if word == "TOY" else word for word in words]
    assert here(*SMALL_RUN, "--data-path", toy, "--output_dir", tmp_path / "run", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: ") and error.count("\n") == 1 and says in error and len(error) < 300
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_written_over(trained, toy, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = [*SMALL_RUN, "--data-path", toy, "--output_dir", folder]
    assert here(*words) == 2
    assert "the folder holds a run" in capsys.readouterr().err
    assert here(*words, "--overwrite", "--batch-size", 7) == 2  # another mistake: nothing is deleted
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert here(*words, "--overwrite", "--epochs", 1) == 0
    assert [line["epoch"] for line in log_lines(folder)] == [0]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_unreadable_image_ends_a_run_with_its_name(workers, trained, toy, tmp_path, capsys):
    shutil.copytree(toy / "val", tmp_path / "val")
    (tmp_path / "val" / "bee" / "zz.png").write_bytes(b"no image")
    assert here(*evaluation(trained, tmp_path, "--num_workers", workers)) == 2
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: cannot read an image (") and "zz.png" in error and error.count("\n") == 1


def test_other_classes_than_the_checkpoints_are_refused(trained, tmp_path, capsys):
    for part in ("train", "val"):
        make_images(tmp_path / part, classes=("ant", "bee", "cat", "eel"), each=4)
    assert here(*evaluation(trained, tmp_path, "--num_workers", 0)) == 2
    assert "a class that training does not know" in capsys.readouterr().err
    assert (
        here(
            *SMALL_RUN,
            "--data-path",
            tmp_path,
            "--output_dir",
            tmp_path / "run",
            "--resume",
            trained / "checkpoint.pth",
        )
        == 2
    )
    assert "other classes than the checkpoint's" in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("TWINS_DEBUG", "1")
    with pytest.raises(main.UserError):
        here("--model", "pvt_small")
