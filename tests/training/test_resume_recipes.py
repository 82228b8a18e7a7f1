"""Bit-exact resume with the options of the recipe together, drawn at random, by tools.checkpoint_hash's hash."""

import random

import gvt  # noqa: F401  registers the models

# isort: split
import pytest
from conftest import SMALL_RUN, log_lines, make_images
from runs import here, stop_at

from tools import checkpoint_hash
from training import checkpoint

TIMES = ("time", "data_time", "images_per_s", "max_memory_mb")
# For each option the words that it may have; the first is none.
CHOICES = [
    [[], ["--layer-decay", "0.7"], ["--layer-decay", "1.0"]],
    [[], ["--head-lr-scale", "5"]],
    [[], ["--freeze", "backbone"], ["--freeze", "stages:1"], ["--freeze", "stages:3"]],
    [[], ["--class-weights", "balanced"], ["--class-weights", "FILE"]],
    [[], ["--balanced-sampling"], ["--repeated-aug"]],
    [[], ["--early-stop", "1"], ["--early-stop", "2"]],
    [[], ["--eval-interval", "2"]],
    [[], ["--mixup-off-epoch", "1"], ["--mixup", "0", "--cutmix", "0"], ["--mixup-mode", "elem"]],
    [[], ["--unscale-lr"]],
    [[], ["--global-batch", "16"]],
    [[], ["--in-chans", "1"], ["--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.3"]],
    [[], ["--input-size", "32", "64"]],
    [[], ["--model-kwargs", "pad=zero"]],
    [[], ["--model-ema"]],
    [["--warmup-epochs", "0"], ["--warmup-epochs", "1"]],
    [[], ["--opt", "sgd"], ["--opt", "lamb"], ["--weight-decay", "0"]],
    [[], ["--lr-noise", "0.2", "0.9"]],
    [[], ["--drop", "0.1", "--drop-path", "0.4"]],
]


def draw(number: int) -> tuple[list[str], tuple[int, int]]:
    """Return the words of a combination, and the epoch and batch at which its run is stopped."""
    generator = random.Random(number)
    words = [word for each in CHOICES for word in generator.choice(each)]
    return words, (generator.randrange(3), generator.randrange(1, 3))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    root = tmp_path_factory.mktemp("uneven")
    for name, number in (("ant", 18), ("bee", 9), ("cat", 5)):
        make_images(root / "train", classes=(name,), each=number)
        make_images(root / "val", classes=(name,), each=4, seed=1)
    (root / "weights.csv").write_text("class,weight\nant,0.5\nbee,1\ncat,2.5\n")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_a_stopped_and_resumed_run_ends_with_the_same_hash(number, uneven, tmp_path):
    words, at = draw(number)
    run = [*SMALL_RUN, "--epochs", 3, "--lr", "1e-2", "--data-path", uneven]
    run += [str(uneven / "weights.csv") if word == "FILE" else word for word in words]
    assert here(*run, "--output_dir", tmp_path / "a") == 0
    code = here(*run, "--output_dir", tmp_path / "b", on_poll=stop_at(*at))
    assert code == 143 or "--early-stop" in words
    assert here(*run, "--output_dir", tmp_path / "b", "--resume", "auto") == 0
    lines = [[{k: v for k, v in line.items() if k not in TIMES} for line in log_lines(tmp_path / x)] for x in "ab"]
    assert lines[0] == lines[1]
    for name in ("checkpoint.pth", "checkpoint_best.pth"):
        if (tmp_path / "a" / name).exists():  # not if no image is ever right
            hashes = [checkpoint_hash.digest(checkpoint.load(tmp_path / folder / name)) for folder in "ab"]
            assert hashes[0] == hashes[1], name
