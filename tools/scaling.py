"""Project what more GPUs gain, or measure processes on this machine.

python -m tools.scaling --step-ms MS --batch-size N [--model NAME] [--gpus 8 64 512] ...
python -m tools.scaling --measure 1 2 4 [--model NAME] [--batch-size N] [--output FOLDER]

docs/scaling.md explains the formula. --measure trains on random images (a GPU or a thread per process): weak scaling
keeps the batch of a process, strong scaling the global batch, and all-reduce is what a step with it takes above one
without.
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import gvt

# isort: split
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing

from gvt_ops import accelerate
from tools.count import count
from tools.measurement import environment, progress, run_rounds, seconds, write_record
from tools.readme_tables import markdown
from training.errors import UserError, exit_code
from training.options import Parser, above_zero, positive

BUCKET = 25 * 2**20  # bytes that DistributedDataParallel sends at once
BACKWARD = 2 / 3  # of a step: what all-reduce can hide behind
IMAGENET = 1_281_167  # images of an epoch
LARGEST_RECIPE = 2048  # global batch of the official recipes
LEAST_EFFICIENCY = 0.9
BYTES = {"float32": 4, "bfloat16": 2}


# ---------------------------------------------------------------- projection


@dataclass(frozen=True)
class Machine:
    gpus: int = 8  # of a node
    inside: float = 450e9  # bytes/s that a GPU sends to others of its node
    outside: float = 50e9  # bytes/s that a GPU sends to other nodes (400 Gb/s each)
    latency: float = 10e-6  # s, of one message
    cores: int = 96  # of a node, that read and augment images


def all_reduce_seconds(size: float, gpus: int, machine: Machine) -> float:
    """Return the time to add up `size` bytes in rings inside nodes, then between them, a GPU sending its share."""
    n = min(gpus, machine.gpus)
    m = math.ceil(gpus / machine.gpus)
    inside = 2 * (n - 1) / n * size / machine.inside
    outside = 2 * (m - 1) / m * size / n / machine.outside
    return inside + outside + 2 * (n - 1 + m - 1) * machine.latency


def project_step(step: float, batch: int, size: float, gpus: int, machine: Machine, rate: float) -> dict:
    """Project a step that takes `step` seconds on one GPU with `batch` images each and `size` bytes of gradients.

    rate: images per second that a core reads and augments. Exposed are the seconds that a step waits for gradients: for
    the last bucket, and for what of the others the backward pass does not hide.
    """
    buckets = math.ceil(size / BUCKET)
    each = all_reduce_seconds(size / buckets, gpus, machine)
    exposed = 0.0 if gpus == 1 else each + max(0.0, (buckets - 1) * each - BACKWARD * step)
    efficiency, images_per_s = step / (step + exposed), gpus * batch / (step + exposed)
    cores = images_per_s / gpus * min(gpus, machine.gpus) / rate
    limits = {
        "input": cores / machine.cores,
        "batch size": gpus * batch / LARGEST_RECIPE,
        "all-reduce": LEAST_EFFICIENCY / efficiency,
    }
    beyond = [name for name in sorted(limits, key=limits.get, reverse=True) if limits[name] > 1]
    found = dict(buckets=buckets, exposed=exposed, efficiency=efficiency, images_per_s=images_per_s)
    return found | dict(cores=cores, bottlenecks=beyond)


def project(args: argparse.Namespace) -> list[dict]:
    size = BYTES[args.gradients] * count(args.model)["params"]
    machine = Machine(inside=args.inside * 1e9, outside=args.outside * 1e9, cores=args.cores)
    rows = []
    for gpus in args.gpus:
        found = project_step(args.step_ms / 1e3, args.batch_size, size, gpus, machine, args.rate)
        row = {
            "gpus": gpus,
            "global batch": gpus * args.batch_size,
            "all-reduce (ms)": f"{all_reduce_seconds(size, gpus, machine) * 1e3:.2f}",
            "exposed (ms)": f"{found['exposed'] * 1e3:.2f}",
            "efficiency": f"{found['efficiency']:.3f}",
            "img/s": f"{found['images_per_s']:.0f}",
            "300 epochs (h)": f"{300 * IMAGENET / found['images_per_s'] / 3600:.1f}",
            "cores a node": str(math.ceil(found["cores"])),
            "bottleneck": ", ".join(found["bottlenecks"]) or "none",
        }
        rows.append(row)
    return rows


# ---------------------------------------------------------------- measurement


def time_steps(rank: int, processes: int, args: argparse.Namespace, batches: dict[str, int], folder: str) -> None:
    """Be one process: write the median seconds of a step for each of `batches`, with all-reduce and without."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(device)
    meeting = f"file://{folder}/meet"
    how = dict(backend="nccl", device_id=device) if cuda else dict(backend="gloo")
    dist.init_process_group(init_method=meeting, rank=rank, world_size=processes, **how)
    torch.manual_seed(0)
    plain = accelerate(timm.create_model(args.model)).to(device).train()
    ids = [rank] if cuda else None
    wrapped = torch.nn.parallel.DistributedDataParallel(plain, device_ids=ids, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), fused=True)

    def step(model: torch.nn.Module, images: torch.Tensor) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            loss = model(images).float().logsumexp(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def timed(model: torch.nn.Module, images: torch.Tensor) -> float:
        dist.barrier()
        return seconds(lambda: step(model, images), device)

    found = {}
    for kind, batch in batches.items():
        images = torch.randn(batch, 3, args.input_size, args.input_size, device=device)
        steps = {"with": lambda _, x=images: timed(wrapped, x), "without": lambda _, x=images: timed(plain, x)}
        times = run_rounds(steps, repeats=args.repeats, warmup=2, label="")
        found[kind] = {name: median(values) for name, values in times.items()}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(args: argparse.Namespace) -> list[dict]:
    rows, alone = [], {}
    for processes in args.measure:
        if torch.cuda.is_available() and processes > torch.cuda.device_count():
            most = torch.cuda.device_count()
            raise UserError(f"more processes than GPUs (--measure {processes}): pass at most {most}")
        if args.batch_size % processes:
            where = f"--batch-size {args.batch_size} --measure {processes}"
            raise UserError(f"strong scaling shares the batch ({where}): pass a multiple of {processes} processes")
        batches = {"weak": args.batch_size, "strong": args.batch_size // processes}
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(time_steps, (processes, args, batches, folder), nprocs=processes)
            found = json.loads(Path(folder, "found.json").read_text())
        for kind, times in found.items():
            rate = processes * batches[kind] / times["with"]
            row = {
                "scaling": kind,
                "processes": processes,
                "images per process": batches[kind],
                "step (ms)": f"{times['with'] * 1e3:.1f}",
                "all-reduce (ms)": f"{(times['with'] - times['without']) * 1e3:.1f}",
                "img/s": f"{rate:.2f}",
                "efficiency": f"{rate / processes / alone.setdefault(kind, rate / processes):.2f}",
            }
            rows.append(row)
        progress(f"{processes} processes measured")
    return rows


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="scaling.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="alt_gvt_base", choices=list(gvt.MODEL_NAMES), metavar="NAME", help="(%(default)s)")
    add("--batch-size", type=positive, default=128, metavar="N", help="images per GPU or process (%(default)s)")
    add("--output", type=Path, metavar="FOLDER", help="write scaling.json and scaling.csv there")
    add = parser.add_argument_group("projection").add_argument
    add("--step-ms", type=above_zero, metavar="MS", help="of a step on one GPU, as tools.benchmark measures it")
    add("--gpus", type=positive, nargs="+", default=[1, 8, 64, 512], metavar="N", help="(1 8 64 512)")
    add("--gradients", choices=BYTES, default="float32", help="dtype in which gradients are sent (%(default)s)")
    rate = "images per second that one core reads and augments (%(default)g)"
    add("--rate", type=above_zero, default=400.0, metavar="N", help=rate)
    link = dict(type=above_zero, metavar="GB/S")
    add("--inside", default=Machine.inside / 1e9, help="of a GPU to its node (%(default)g)", **link)
    add("--outside", default=Machine.outside / 1e9, help="of a GPU to other nodes (%(default)g)", **link)
    add("--cores", type=positive, default=Machine.cores, metavar="N", help="of a node (%(default)s)")
    add = parser.add_argument_group("measurement").add_argument
    processes = "numbers of processes on this machine; the first is what efficiency compares with"
    add("--measure", type=positive, nargs="+", metavar="N", help=processes)
    add("--input-size", type=positive, default=224, metavar="PIXELS", help="side of an image (%(default)s)")
    add("--repeats", type=positive, default=30, metavar="N", help="timed steps, after two more (%(default)s)")
    args = parser.parse_args(argv)
    if (args.step_ms is None) == (args.measure is None):
        raise UserError("nothing to do, or two things (--step-ms, --measure): pass one of them")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    rows = measure(args) if args.measure else project(args)
    print("\n".join(markdown(rows[0], (map(str, row.values()) for row in rows))))
    if args.output:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        record = {"environment": environment(device), "settings": settings, "rows": rows}
        write_record(args.output, "scaling", record, rows)


if __name__ == "__main__":
    sys.exit(exit_code("scaling.py", main, sys.argv[1:]))
