"""Test the paper's claims on position encodings and attention with small networks on CIFAR-10: docs/evidence.md.

python -m tools.ablation --prepare FOLDER --data-path DATA         images of CIFAR-10's Python archive as class folders
python -m tools.ablation --data-path DATA --choose-lr [--jobs 2]   two learning rates for each variant
python -m tools.ablation --data-path DATA [--seeds 0 1 2] [--jobs 2]         the counted runs
python -m tools.ablation --table [--check]                         the tables of docs/evidence.md

Each run is main.py on one thread, in output/ablation, and leaves a file in logs/ablation. Runs whose file is there are
skipped, interrupted ones resumed. But for --trial, all files must be committed, and stay so until a run ends.
"""

import argparse
import concurrent.futures
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import utils
from tools import ablation_results, readme_tables
from tools.ablation_models import DESIGNS, PREFIX, ROOT
from tools.ablation_results import RESULTS
from tools.measurement import processor, progress
from training import checkpoint, files
from training.errors import UserError, exit_code
from training.options import Parser, count, positive

PAGE = ROOT / "docs" / "evidence.md"
EPOCHS, RATES, SEEDS = 4, (1e-3, 3e-3), (0, 1, 2, 3, 4)
RATE_SEED, HELD_OUT = 100, 0.1  # the seed of runs that choose a rate, and the share of each class that they hold out
# The rate is set after each epoch: the four epochs train at 1, 1, 0.3 and 0.09 times it.
RECIPE = shlex.split(
    "--input-size 64 --batch-size 128 --unscale-lr --warmup-epochs 0 --sched step --decay-epochs 1 --decay-rate 0.3 "
    "--drop-path 0 --mixup 0 --cutmix 0 --aa '' --color-jitter 0 --reprob 0 --scale 0.5 1 --eval-crop-ratio 1 "
    "--device cpu --num_workers 0"
)
NOT_THERE = "none"  # a split that no data set has: --val-fraction wants no val


@dataclass(frozen=True)
class Run:
    variant: str
    seed: int
    lr: float
    kind: str  # "seed": counted, scored on val; "lr": scored on images held out of train

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.kind}{getattr(self, self.kind):g}"

    def words(self, epochs: int) -> list[str]:
        """Return main.py's arguments without paths; val is scored once, after the last epoch."""
        words = ["--model", PREFIX + self.variant, "--seed", self.seed, "--lr", self.lr, *RECIPE]
        words += ["--epochs", epochs, "--eval-interval", epochs]
        words += ["--val-fraction", HELD_OUT, "--val-split", NOT_THERE] if self.kind == "lr" else []
        return [str(word) for word in words]


# ---------------------------------------------------------------- which runs


def rate_runs(variants: list[str]) -> list[Run]:
    return [Run(variant, RATE_SEED, rate, "lr") for rate in RATES for variant in variants]


def counted_runs(variants: list[str], seeds: list[int], results: Path, *, trial: bool = False) -> list[Run]:
    """Return the runs seed by seed, so that all variants have as many when time is short."""
    scores, rates = ablation_results.rates(results), {}
    for variant in variants:
        if not trial and set(scores.get(variant, ())) != set(RATES):
            raise UserError(f"no learning rate was chosen ({variant}, {results}): run --choose-lr first, and commit")
        rates[variant] = ablation_results.chosen(scores[variant]) if variant in scores else RATES[0]
    return [Run(variant, seed, rates[variant], "seed") for seed in seeds for variant in variants]


def clean_commit(kind: str) -> str:
    """Return the commit; raise UserError if anything but results of this kind differs from it."""
    excluded = f":(exclude){RESULTS.relative_to(ROOT)}/*-{kind}*.json"
    try:
        command = ["git", "status", "--porcelain", "--untracked-files=all", "--", ".", excluded]
        changes = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"no checkout of git ({ROOT}): a result names its commit, or pass --trial FOLDER") from error
    if changes:
        first = changes.splitlines()[0][3:]
        raise UserError(f"the tree differs from its commit ({first}): commit or remove it, or pass --trial FOLDER")
    return utils.git_commit().removesuffix("+changes")  # results of this kind may be among the changed files


# ---------------------------------------------------------------- running


@dataclass(frozen=True)
class Place:
    """Where the images, the results and the runs' folders are, and what the runs have in common."""

    data: Path
    results: Path
    folders: Path
    epochs: int
    commit: str
    counted: bool

    def train(self, run: Run) -> dict:
        """Train a run to its end in a process of one thread, write its result, and return it."""
        folder = self.folders / run.name
        folder.mkdir(parents=True, exist_ok=True)
        words = ["--data-path", self.data, "--output_dir", folder, "--resume", "auto"]
        command = [sys.executable, "-m", "tools.ablation_models", *run.words(self.epochs), *map(str, words)]
        with open(folder / "output.txt", "a") as output:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.run(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT).returncode
        if code:
            raise UserError(f"a run ended with exit code {code} ({run.name}): see {folder / 'output.txt'}")
        if self.counted and clean_commit(run.kind) != self.commit:
            advice = "start again in a tree that stays as it is, such as one of git worktree"
            raise UserError(f"another commit than when the run began ({run.name}): {advice}")
        record = self.record(run, folder)
        self.results.mkdir(parents=True, exist_ok=True)
        files.write_text(self.results / f"{run.name}.json", json.dumps(record, indent=1) + "\n")
        return record

    def record(self, run: Run, folder: Path) -> dict:
        log = [json.loads(line) for line in (folder / files.LOG).read_text().splitlines()]
        if len(log) != self.epochs or log[-1]["test_acc1"] is None:
            raise UserError(f"a run without its last score ({folder}): remove the folder, and start again")
        environment = json.loads((folder / "environment.json").read_text())
        kept = ("python", "torch", "torchvision", "timm", "pillow", "device", "threads", "started")
        return {
            "variant": run.variant,
            "seed": run.seed,
            "lr": run.lr,
            "top1": log[-1]["test_acc1"],
            "parameters": log[-1]["n_parameters"],
            "minutes": round(sum(line["time"] for line in log) / 60, 2),  # of training, without evaluation
            "commit": self.commit,
            "recipe": shlex.join([*RECIPE, "--epochs", str(self.epochs)]),
            "data": checkpoint.load(folder / files.CHECKPOINT)["recipe"]["data"],  # a hash of file names and labels
            "environment": {"hardware": processor()["name"]} | {name: environment[name] for name in kept},
            "log": log,
        }


def train_all(runs: list[Run], place: Place, jobs: int) -> None:
    """Do the runs that have no result yet, `jobs` at a time."""
    missing = [run for run in runs if not (place.results / f"{run.name}.json").exists()]
    progress(f"{len(runs) - len(missing)} of {len(runs)} runs have a result in {place.results}")
    done, start = len(runs) - len(missing), time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(place.train, run): run for run in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                record, run, done = future.result(), futures[future], done + 1
                minutes = (time.perf_counter() - start) / 60
                what = f"{run.name}, rate {run.lr:g}: top-1 {record['top1']:.2f}"
                progress(f"{what} ({done} of {len(runs)} after {minutes:.0f} minutes)")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def prepare(archive: Path, data: Path) -> None:
    """Write DATA/{train,val}/CLASS/NUMBER.png from the folder that holds cifar-10-batches-py."""
    from torchvision.datasets import CIFAR10

    for split in ("train", "val"):
        try:
            images = CIFAR10(archive, train=split == "train")
        except RuntimeError:
            where = archive / CIFAR10.base_folder
            raise UserError(f"no CIFAR-10 (--prepare, {where}): unpack {CIFAR10.url} there") from None
        for number, (image, label) in enumerate(images):
            path = data / split / images.classes[label] / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        progress(f"{data / split}: {len(images)} images")


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="ablation.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=Path, metavar="DATA", help="CIFAR-10 as train/CLASS/* and val/CLASS/*")
    add("--prepare", type=Path, metavar="FOLDER", help="write DATA from FOLDER/cifar-10-batches-py, and exit")
    add("--choose-lr", action="store_true", help="the runs that choose each variant's learning rate")
    add("--variants", nargs="+", choices=DESIGNS, default=list(DESIGNS), metavar="NAME", help=f"{', '.join(DESIGNS)}")
    add("--seeds", type=count, nargs="+", default=SEEDS, metavar="N", help="of the counted runs (0 1 2 3 4)")
    add("--jobs", type=positive, default=1, metavar="N", help="runs at a time, of one thread each (%(default)s)")
    add("--trial", type=Path, metavar="FOLDER", help="not counted: results and runs there, from any state of the code")
    add("--epochs", type=positive, default=EPOCHS, metavar="N", help="with --trial (%(default)s)")
    add("--table", action="store_true", help="write the tables of docs/evidence.md, and exit")
    add("--check", action="store_true", help="with --table: only report by the exit code whether they are up to date")
    args = parser.parse_args(argv)
    if not args.table and args.data_path is None:
        parser.error("one of --data-path, --table is required")
    if args.epochs != EPOCHS and args.trial is None:
        parser.error("--epochs is for --trial")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if args.table:
        return readme_tables.main([*["--check"] * args.check, "--readme", str(PAGE)])
    if args.prepare:
        prepare(args.prepare, args.data_path)
        return 0
    kind, trial = "lr" if args.choose_lr else "seed", args.trial
    results = trial.resolve() if trial else RESULTS
    commit = utils.git_commit() if trial else clean_commit(kind)
    runs = counted_runs(args.variants, args.seeds, results, trial=bool(trial)) if kind == "seed" else []
    runs = runs or rate_runs(args.variants)
    # Another commit starts anew: no run is from two.
    folders = results / "runs" if trial else ROOT / "output" / "ablation" / commit[:12]
    place = Place(args.data_path.resolve(), results, folders, args.epochs, commit, counted=not trial)
    train_all(runs, place, args.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("ablation.py", main, sys.argv[1:]))
