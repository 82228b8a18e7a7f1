"""Balance, schedule and the dry run: what each option does to a run."""

import json
from collections import Counter

import gvt  # noqa: F401  registers the models

# isort: split
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_RUN, launch, log_lines, make_images, run_main
from PIL import Image
from runs import here, parse, same, small, weights

import engine
import main
from losses import build_criterion, class_weights
from samplers import BalancedSampler
from tools import plot_logs
from training import checkpoint, dry_run


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """20 images of one class, 6 and 4 of the others."""
    root = tmp_path_factory.mktemp("uneven")
    for name, number in (("ant", 20), ("bee", 6), ("cat", 4)):
        make_images(root / "train", classes=(name,), each=number)
        make_images(root / "val", classes=(name,), each=5, seed=1)
    return root


# ---------------------------------------------------------------- classes of uneven size


def test_weights_are_of_the_classes_that_a_soft_target_has():
    weights, logits = torch.tensor([1.0, 2.0, 0.5]), torch.randn(4, 3)
    targets = torch.softmax(torch.randn(4, 3), 1)
    by_hand = -sum(weights[c] * targets[:, c] * logits.log_softmax(1)[:, c] for c in range(3)).mean()
    for smoothing in (0.0, 0.1):  # the targets are smoothed already
        mixed = build_criterion(mixing=True, smoothing=smoothing, weights=weights)(logits, targets)
        assert torch.allclose(mixed, by_hand)
    labels = torch.tensor([0, 2, 2, 1])
    found = build_criterion(mixing=False, smoothing=0.0, weights=weights)(logits, labels)
    assert torch.allclose(found, (weights[labels] * F.cross_entropy(logits, labels, reduction="none")).mean())
    ones = build_criterion(mixing=False, smoothing=0.1, weights=torch.ones(3))(logits, labels)
    assert torch.allclose(ones, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_balanced_weights_are_inverse_to_the_images_of_a_class():
    labels = [0] * 20 + [1] * 6 + [2] * 4
    found = class_weights("balanced", ["a", "b", "c"], labels)
    assert torch.allclose(found * torch.tensor([20, 6, 4]), torch.full((3,), 10.0))
    assert found[labels].mean().item() == pytest.approx(1)
    assert class_weights("", ["a"], [0]) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("class,weight\nant,1\nbee,2\n", "no weight of cat (--class-weights FILE): give one for each class"),
        ("class,weight\nant,1\nbee,2\ncat,1\ndog,1\n", "a weight of no class (FILE, dog): remove it"),
        ("class,weight\nant,1\nant,2\n", "not a class and its weight (FILE, line 3)"),
        ("class,weight\nant,-1\n", "not a class and its weight (FILE, line 2)"),
        ("class,weight\nant,nan\n", "not a class and its weight (FILE, line 2)"),
        ("class,weight\nant\n", "not a class and its weight (FILE, line 2)"),
        ("ant,1\n", "no weights (--class-weights FILE): expected the header class,weight"),
    ],
)
def test_a_wrong_file_of_weights_is_one_line(text, says, uneven, tmp_path, capsys):
    file = tmp_path / "weights.csv"
    file.write_text(text)
    assert here(*small(uneven, tmp_path / "run", "--class-weights", file)) == 2
    assert says.replace("FILE", str(file)) in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_with_weights_continues_with_the_same_ones_alone(uneven, tmp_path, capsys):
    file, run = tmp_path / "weights.csv", tmp_path / "run"
    file.write_text("class,weight\nant,1\nbee,3\ncat,0\n")
    words = small(uneven, run, "--class-weights", file, "--epochs", 1)
    assert here(*words) == 0
    assert here(*words, "--resume", "auto") == 0
    file.write_text("class,weight\nant,1\nbee,2\ncat,0\n")
    assert here(*words, "--resume", "auto") == 2
    assert "class_weights file " in capsys.readouterr().err


@pytest.mark.parametrize("world", [1, 3])
def test_balanced_sampling_draws_each_class_equally_often(world):
    labels, seen = [0] * 20 + [1] * 6 + [3] * 4, set()
    for epoch in range(20):
        samplers = [BalancedSampler(labels, seed=5, rank=rank, world=world) for rank in range(world)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        drawn = [index for sampler in samplers for _, _, index in sampler]
        assert Counter(labels[index] for index in drawn) == {0: 10, 1: 10, 3: 10} and len(drawn) == 30
        assert max(Counter(index for index in drawn if labels[index] == 0).values()) == 1
        assert set(Counter(index for index in drawn if labels[index] == 1).values()) == {1, 2}
        seen |= set(drawn)
        samplers[0].set_epoch(epoch, 4)
        rest = list(samplers[0])
        samplers[0].set_epoch(epoch)
        assert rest == list(samplers[0])[4:]
    assert seen == set(range(30))


def test_balanced_sampling_of_more_classes_than_images_per_epoch_share():
    sampler = BalancedSampler([0, 0, 0, 0, 1, 1, 2], seed=0)
    counts = Counter()
    for epoch in range(300):
        sampler.set_epoch(epoch)
        drawn = [[0, 0, 0, 0, 1, 1, 2][index] for _, _, index in sampler]
        assert sorted(Counter(drawn).values()) == [2, 2, 3]
        counts.update(drawn)
    assert all(number == pytest.approx(700, rel=0.1) for number in counts.values())


def test_two_ways_to_draw_images_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--balanced-sampling", "--repeated-aug")
    assert "(--balanced-sampling, --repeated-aug): omit one" in capsys.readouterr().err


# ---------------------------------------------------------------- the schedule of a run


@pytest.fixture
def scores(monkeypatch):
    """Let the evaluations of a run give these top-1 in turn, by the number of the epoch."""
    given, original = [], main.score_epoch

    def score(state, *rest):
        test, ema = original(state, *rest)
        return test | {"acc1": given[state.epoch]}, ema

    monkeypatch.setattr(main, "score_epoch", score)
    return given


def test_early_stop_ends_a_run_that_does_not_get_better(toy, tmp_path, scores, capsys):
    scores += [10.0, 30.0, 20.0, 30.0, 29.0, 90.0]
    words = small(toy, tmp_path, "--epochs", 6, "--early-stop", 3)
    assert here(*words) == 0
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0, 1, 2, 3, 4]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "finished" and status["reason"] == "no better top-1 since epoch 1 (--early-stop 3)"
    assert "stopped after epoch 4: no better top-1 since epoch 1" in capsys.readouterr().out
    assert here(*words, "--resume", "auto") == 0 and len(log_lines(tmp_path)) == 5  # still over


@pytest.mark.slow
def test_early_stop_waits_for_an_evaluation(toy, tmp_path, scores):
    scores += [0.0, 30.0, 0.0, 20.0, 0.0, 90.0]
    assert here(*small(toy, tmp_path, "--epochs", 6, "--early-stop", 1, "--eval-interval", 2)) == 0
    assert [line["test_acc1"] for line in log_lines(tmp_path)] == [None, 30.0, None, 20.0]


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_early_stop_counts_on_after_a_resume(after, toy, tmp_path, scores, monkeypatch):
    """Killed while the log of an epoch is written: the best one's is evaluated and saved again."""
    scores += [10.0, 30.0, 20.0, 25.0, 90.0]
    words = small(toy, tmp_path, "--epochs", 5, "--early-stop", 2)
    original = main.RunFolder.write_log

    def stop(folder, line):
        if line["epoch"] == after:
            raise KeyboardInterrupt
        original(folder, line)

    monkeypatch.setattr(main.RunFolder, "write_log", stop)
    with pytest.raises(KeyboardInterrupt):
        here(*words)
    monkeypatch.setattr(main.RunFolder, "write_log", original)
    assert here(*words, "--resume", "auto") == 0
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0, 1, 2, 3]


def test_a_kill_between_the_best_and_the_checkpoint_keeps_the_count(toy, tmp_path, scores, monkeypatch):
    """The best is saved first: on resume its score is the folder's already, and its epoch with it."""
    scores += [10.0, 30.0, 20.0, 25.0, 90.0]
    words = small(toy, tmp_path, "--epochs", 5, "--early-stop", 2)
    original = checkpoint.save

    def stop(path, payload, **kwargs):
        if path.name == "checkpoint.pth" and payload["epoch"] == 1 and payload["evaluated"]:
            raise KeyboardInterrupt
        original(path, payload, **kwargs)

    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        here(*words)
    monkeypatch.setattr(checkpoint, "save", original)
    assert here(*words, "--resume", "auto") == 0
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0, 1, 2, 3]


def test_epochs_between_evaluations_have_no_score(toy, tmp_path, capsys):
    assert here(*small(toy, tmp_path / "a", "--epochs", 4, "--eval-interval", 3)) == 0
    assert here(*small(toy, tmp_path / "b", "--epochs", 4)) == 0
    lines, every = log_lines(tmp_path / "a"), log_lines(tmp_path / "b")
    assert [line["test_acc1"] is None for line in lines] == [True, True, False, False]
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert [line["train_loss"] for line in lines] == [line["train_loss"] for line in every]
    assert [line["test_loss"] for line in lines[2:]] == [line["test_loss"] for line in every[2:]]
    assert list(lines[0]) == list(every[0])
    assert [line["epoch"] for line in plot_logs.read_log(tmp_path / "a")] == [2, 3]
    best = checkpoint.load(str(tmp_path / "a" / "checkpoint_best.pth"))
    assert best["max_accuracy"] == max(line["test_acc1"] for line in lines[2:])


def test_mixup_ends_at_its_epoch(toy, tmp_path, monkeypatch):
    targets, original = {}, main.build_criterion

    def criterion(**settings):
        inner = original(**settings)

        def loss(logits, soft):
            targets.setdefault(len(targets), (soft > 0.05).sum(1).max().item())
            return inner(logits, soft)

        return loss

    monkeypatch.setattr(main, "build_criterion", criterion)
    assert here(*small(toy, tmp_path, "--mixup-off-epoch", 1)) == 0
    steps = len(targets) // 2
    assert max(targets[step] for step in range(steps)) == 2 and {targets[step] for step in range(steps, 2 * steps)} == {
        1
    }


@pytest.mark.parametrize(("words", "rate"), [([], 5e-4 * 8 / 512), (["--unscale-lr"], 5e-4)])
def test_the_rate_is_scaled_unless_told_otherwise(words, rate, toy, tmp_path, capsys):
    run = [*SMALL_RUN, "--data-path", toy, "--warmup-epochs", 0, "--epochs", 1, "--output_dir", tmp_path / "a", *words]
    assert here(*run) == 0
    assert log_lines(tmp_path / "a")[0]["train_lr"] == pytest.approx(rate)
    assert ("lr 0.0005 (--unscale-lr)" in capsys.readouterr().out) == bool(words)


def test_a_global_batch_derives_the_accumulation(toy, tmp_path, capsys):
    assert here(*small(toy, tmp_path / "a", "--epochs", 1, "--global-batch", 16)) == 0
    assert here(*small(toy, tmp_path / "b", "--epochs", 1, "--grad-accum-steps", 2)) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    capsys.readouterr()
    assert here(*small(toy, tmp_path / "c", "--global-batch", 12)) == 2
    where = "(--global-batch 12, --batch-size 8 x 1 processes): give a multiple of 8, or change --batch-size"
    assert where in capsys.readouterr().err and not (tmp_path / "c").exists()
    with pytest.raises(SystemExit):
        parse("--global-batch", 16, "--grad-accum-steps", 2)


@pytest.mark.slow
def test_two_processes_with_frozen_stages_balance_and_a_global_batch(toy, tmp_path):
    """The same global batch as one process: parameters without gradients do not stop the all-reduce."""
    words = small(toy, tmp_path / "a", "--freeze", "stages:2", "--balanced-sampling", "--global-batch", 32)
    words += ["--layer-decay", 0.8, "--head-lr-scale", 3, "--class-weights", "balanced"]
    done = run_main(*words, launcher=launch(2))
    assert done.returncode == 0, done.stderr
    assert "global batch 32 (8 x 2 processes x 2 steps)" in done.stdout
    again = [tmp_path / "b" if word == tmp_path / "a" else word for word in words]
    done = run_main(*again, "--checkpoint-interval", 1, launcher=launch(2))
    assert done.returncode == 0 and same(weights(tmp_path / "a"), weights(tmp_path / "b"))


# ---------------------------------------------------------------- the dry run


def test_a_dry_run_writes_one_image_and_nothing_else(uneven, tmp_path, capsys, monkeypatch):
    words = small(uneven, tmp_path / "run", "--dry-run", "--epochs", 3)
    assert here(*words) == 0
    out = capsys.readouterr().out
    for line in (
        "global batch 8 (8 x 1 processes x 1 steps), lr 0.00015625 (0.01 x 8 / 512)",
        "dry run: 30 training images, 15 validation images, 3 classes",
        "images per class: ant 20, bee 6, cat 4",
        "images: 3 channels, 32 x 32 pixels; mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)",
        "steps: 3 updates an epoch, 3 epochs: 9 updates and 72 images in all",
        "learning rate: 0.0001563 in the first epoch, at most 0.0001563, 0.0001197 in the last",
        "memory: parameters 9.5 MiB, gradients 9.5 MiB, optimizer 18.9 MiB, beside activations",
    ):
        assert line in out.splitlines(), line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["augmented.png"]
    assert here(*words) == 2
    assert "augmented.png): give another name, or pass --overwrite" in capsys.readouterr().err
    assert here(*words, "--overwrite") == 0
    monkeypatch.chdir(tmp_path)
    words = words[: words.index("--output_dir")] + words[words.index("--output_dir") + 2 :]
    assert here(*words) == 0 and {path.name for path in tmp_path.iterdir()} == {"run", "augmented.png"}
    assert here(*small(uneven, tmp_path / "run")) == 0  # the folder holds no run


@pytest.mark.parametrize("words", [[], ["--in-chans", 1, "--balanced-sampling"], ["--mixup", 0, "--cutmix", 0]])
def test_the_drawn_batch_is_the_first_that_the_network_sees(words, uneven, tmp_path, monkeypatch):
    drawn, seen = [], []
    original = dry_run.draw
    monkeypatch.setattr(dry_run, "draw", lambda *a: drawn.append(a) or original(*a))
    assert here(*small(uneven, tmp_path / "a", "--dry-run", *words)) == 0

    def epoch(model, criterion, loader, optimizer, device, number, scaler, settings, hooks):
        images, targets = next(iter(loader))
        images = images.to(device)
        seen.append(settings.mixup(images, targets) if settings.mixup else (images, targets))
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "train_one_epoch", epoch)
    with pytest.raises(KeyboardInterrupt):
        here(*small(uneven, tmp_path / "b", *words))
    images, labels, normal = drawn[0]
    assert torch.equal(images, seen[0][0]) and len(labels) == 8
    names, targets = ["ant", "bee", "cat"], seen[0][1]
    if targets.ndim == 1:
        assert labels == [names[label] for label in targets.tolist()]
    else:
        for text, row in zip(labels, targets):
            pairs = [part.rsplit(" ", 1) for part in text.split(", ")]
            assert sum(int(share.removesuffix("%")) for _, share in pairs) in (99, 100, 101)
            best = names[row.argmax()]
            expected = 100 * (row.max().item() - 0.1 / 3) / 0.9
            assert pairs[0][0] == best or len(pairs) > 1
            assert int(pairs[0][1].removesuffix("%")) == pytest.approx(expected, abs=1)
    with Image.open(tmp_path / "a" / "augmented.png") as sheet:
        first = np.asarray(sheet)[:128:4, :128:4]
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in normal)
    own = ((images[0] * std + mean).clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    assert np.array_equal(first, own)


def test_many_classes_are_summed_up():
    counts = [(f"c{number}", number + 1) for number in range(50)]
    assert dry_run.class_line(counts) == "images per class: 1 (c0) to 50 (c49), median 26"
