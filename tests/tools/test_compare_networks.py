"""tools/compare_networks.py: the same recipe and the same global batch for every network and number of GPUs."""

import pytest
from conftest import make_images

import gvt  # noqa: F401  registers the models

# isort: split
import timm

from tools import compare_networks
from tools.compare_networks import NETWORKS, words
from training import options, recipe_options


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run(network, tmp_path):
    assert timm.is_model(network)
    for gpus in (1, 2, 4, 8):
        args = options.parse_args(words(network, 1, tmp_path, tmp_path, dry_run=False))
        assert not options.without_effect(args) and (args.model, args.seed, args.resume) == (network, 1, "auto")
        recipe_options.derive_accumulation(args, gpus)
        assert gpus * args.batch_size * args.grad_accum_steps == 1024


def test_the_launcher_and_the_order(tmp_path, monkeypatch, capsys):
    started = []

    class Done:
        returncode = 0

    def start(command, **_):
        folder = (
            tmp_path / "out" / f"{command[command.index('--model') + 1]}-seed{command[command.index('--seed') + 1]}"
        )
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text("the last line\n")
        started.append(command)
        return Done

    monkeypatch.setattr(compare_networks.subprocess, "run", start)
    common = ["--data-path", str(tmp_path), "--output", str(tmp_path / "out"), "--networks", *NETWORKS[:2]]
    compare_networks.main([*common, "--gpus", "8", "--seeds", "0", "1"])
    assert len(started) == 4 and all("--nproc_per_node=8" in command for command in started)
    assert "alt_gvt_small-seed0: the last line" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_runs(tmp_path, capfd):
    for part, each in (("train", 512), ("val", 4)):
        make_images(tmp_path / "data" / part, classes=("ant", "bee"), each=each, size=8)
    compare_networks.main(
        ["--data-path", str(tmp_path / "data"), "--gpus", "8", "--output", str(tmp_path), "--dry-run"]
    )
    text = capfd.readouterr().out
    assert text.count("global batch 1024 (128 x 1 processes x 8 steps)") == len(NETWORKS)
    assert all((tmp_path / "dry_run" / f"{network}-seed0" / "augmented.png").exists() for network in NETWORKS)
