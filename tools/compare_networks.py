"""Train Twins-SVT-S and other networks of its size by one recipe, one run after the other: docs/evidence.md.

python -m tools.compare_networks --data-path DATA [--gpus 8] [--seeds 0 1 2] [--dry-run]

DATA is ImageNet-100, Tiny-ImageNet or another set of class folders; images are resized to 224 x 224. A run is main.py,
with gradients accumulated to one global batch for 1, 2, 4 or 8 GPUs; the same command resumes what was interrupted.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from tools.measurement import progress
from training import files
from training.errors import UserError, exit_code
from training.options import Parser, count

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("alt_gvt_small", "deit_small_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b2")
RECIPE = shlex.split("--epochs 300 --batch-size 128 --global-batch 1024 --drop-path 0.2 --dist-eval")


def words(network: str, seed: int, data: Path, folder: Path, *, dry_run: bool) -> list[str]:
    """Return main.py's arguments for one run."""
    found = ["--model", network, "--seed", str(seed), *RECIPE, "--data-path", str(data), "--output_dir", str(folder)]
    return [*found, "--dry-run", "--overwrite"] if dry_run else [*found, "--resume", "auto"]


def train(network: str, seed: int, args: argparse.Namespace) -> None:
    name = f"{network}-seed{seed}"
    # A dry run's image has a folder of its own, so that the run's folder holds the run alone.
    folder = args.output.resolve() / ("dry_run" if args.dry_run else "") / name
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}"] * (args.gpus > 1)
    command = [sys.executable, *launcher, str(ROOT / "main.py")]
    command += words(network, seed, args.data_path.resolve(), folder, dry_run=args.dry_run)
    progress(shlex.join(command))
    if code := subprocess.run(command, cwd=ROOT).returncode:
        raise UserError(f"a run ended with exit code {code} ({name}, {folder}): see its lines above")
    if not args.dry_run:
        progress(f"{name}: {(folder / files.LOG).read_text().splitlines()[-1]}")


def main(argv: list[str]) -> None:
    parser = Parser(prog="compare_networks.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=Path, required=True, metavar="DATA", help="images as train/CLASS/* and val/CLASS/*")
    add("--gpus", type=int, choices=(1, 2, 4, 8), default=1, help="of this machine (%(default)s)")
    add("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NAME", help=", ".join(NETWORKS))
    add("--seeds", type=count, nargs="+", default=(0, 1, 2), metavar="N", help="(0 1 2)")
    add("--output", type=Path, default=ROOT / "output" / "networks", metavar="FOLDER", help="(output/networks)")
    add("--dry-run", action="store_true", help="main.py's: what each run would do, on one process")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.gpus, args.seeds = 1, args.seeds[:1]
    for seed in args.seeds:
        for network in args.networks:
            train(network, seed, args)


if __name__ == "__main__":
    sys.exit(exit_code("compare_networks.py", main, sys.argv[1:]))
