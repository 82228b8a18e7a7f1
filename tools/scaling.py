"""What more processes cost: projected for clusters, measured on this machine.

python -m tools.scaling --step-ms MS --batch-size N [--model NAME] [--gpus 8 64 512] ...
python -m tools.scaling --measure 1 2 4 [--model NAME] [--batch-size N] [--input-size S] [--output FOLDER]

The projection's formula is in `exchange` and `Projection`; docs/scaling.md explains it. --measure trains on random
pictures on one machine (a GPU a process, or one thread a process): weak scaling keeps the pictures of a process, strong
scaling those of all, and the exchange of gradients is what a step with it takes above a step without.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gvt

# isort: split
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing

from tools import records
from tools.records import csv_text, environment
from training.errors import UserError, exit_code
from training.options import Parser

BUCKET = 25 * 2**20  # bytes that DistributedDataParallel exchanges at once
BACKWARD = 2 / 3  # of a step: what the exchange can hide behind
IMAGENET = 1_281_167  # pictures of an epoch
LARGEST_RECIPE = 2048  # pictures of a step in the published trainings
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


# ---------------------------------------------------------------- projection


@dataclass(frozen=True)
class Machine:
    gpus: int = 8  # of a node
    inside: float = 450e9  # bytes/s that a GPU sends to others of its node
    outside: float = 50e9  # bytes/s that a GPU sends to other nodes (400 Gb/s a GPU)
    latency: float = 10e-6  # s, of one message
    cores: int = 96  # of a node, that read and augment pictures


def exchange(size: float, gpus: int, machine: Machine) -> float:
    """Seconds to add up `size` bytes over GPUs: in rings inside nodes, then between them, each GPU with its share of
    the bytes.

    2 (n - 1) / n size / inside + 2 (m - 1) / m size / n / outside + 2 (n - 1 + m - 1) latency, for n GPUs a node and m
    nodes.
    """
    n = min(gpus, machine.gpus)
    m = math.ceil(gpus / machine.gpus)
    inside = 2 * (n - 1) / n * size / machine.inside
    outside = 2 * (m - 1) / m * size / n / machine.outside
    return inside + outside + 2 * (n - 1 + m - 1) * machine.latency


@dataclass(frozen=True)
class Projection:
    """A training step of `batch` pictures a GPU, which takes `step` seconds alone, with `size` bytes of gradients, on
    `gpus` GPUs.
    """

    step: float
    batch: int
    size: float
    gpus: int
    machine: Machine

    @property
    def buckets(self) -> int:
        return math.ceil(self.size / BUCKET)

    @property
    def exposed(self) -> float:
        """Seconds a step waits for gradients: the last bucket, which nothing hides, and what of the others the backward
        pass does not.
        """
        each = exchange(self.size / self.buckets, self.gpus, self.machine)
        return 0.0 if self.gpus == 1 else each + max(0.0, (self.buckets - 1) * each - BACKWARD * self.step)

    @property
    def efficiency(self) -> float:
        return self.step / (self.step + self.exposed)

    @property
    def images_per_s(self) -> float:
        return self.gpus * self.batch / (self.step + self.exposed)

    def cores(self, rate: float) -> float:
        """Cores of a node that feed its GPUs, at `rate` pictures per second and core."""
        return self.images_per_s / self.gpus * min(self.gpus, self.machine.gpus) / rate

    def breaks(self, rate: float) -> list[str]:
        """What is beyond its limit, the nearest first named."""
        over = {
            "input": self.cores(rate) / self.machine.cores,
            "batch size": self.gpus * self.batch / LARGEST_RECIPE,
            "all-reduce": 0.9 / self.efficiency,
        }
        return [name for name, share in sorted(over.items(), key=lambda item: -item[1]) if share > 1]


def project(args: argparse.Namespace) -> list[dict]:
    parameters = sum(p.numel() for p in build(args.model, "meta").parameters())
    machine = Machine(args.node_gpus, args.inside * 1e9, args.outside * 1e9, args.latency * 1e-6, args.cores)
    rows = []
    for gpus in args.gpus:
        found = Projection(args.step_ms / 1e3, args.batch_size, parameters * DTYPE_BYTES[args.gradients], gpus, machine)
        epoch = IMAGENET / found.images_per_s
        rows.append(
            {
                "gpus": gpus,
                "global batch": gpus * args.batch_size,
                "exchange (ms)": f"{exchange(found.size, gpus, machine) * 1e3:.2f}" if gpus > 1 else "0",
                "waited for (ms)": f"{found.exposed * 1e3:.2f}",
                "efficiency": f"{found.efficiency:.3f}",
                "img/s": f"{found.images_per_s:.0f}",
                "300 epochs (h)": f"{300 * epoch / 3600:.1f}",
                "cores a node": f"{found.cores(args.rate):.0f}",
                "beyond its limit": ", ".join(found.breaks(args.rate)) or "nothing",
            }
        )
    return rows


# ---------------------------------------------------------------- measurement


def build(model: str, device: str) -> torch.nn.Module:
    if model not in gvt.MODEL_NAMES:
        raise UserError(f"no such model (--model {model}): one of {', '.join(gvt.MODEL_NAMES)}")
    with torch.device(device):
        return timm.create_model(model)


def seconds_of_steps(rank: int, processes: int, args: argparse.Namespace, batches: dict[str, int], folder: str) -> None:
    """One process: median seconds of a step for each of `batches`, with the gradients' exchange and without, in
    turns.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes
    )
    torch.manual_seed(0)
    plain = build(args.model, str(device)).train()
    model = torch.nn.parallel.DistributedDataParallel(plain, device_ids=[rank] if cuda else None)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    found = {}
    for kind, batch in batches.items():
        pictures = torch.randn(batch, 3, args.input_size, args.input_size, device=device)
        taken = {"with": [], "without": []}
        for repeat in range(args.repeats + 2):
            for exchanged in taken:
                dist.barrier()
                begin = time.perf_counter()
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
                    # Without: the module inside, which exchanges nothing.
                    loss = (model if exchanged == "with" else plain)(pictures).float().logsumexp(1).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if cuda:
                    torch.cuda.synchronize(device)
                if repeat >= 2:
                    taken[exchanged].append(time.perf_counter() - begin)
        found[kind] = {name: statistics.median(values) for name, values in taken.items()}
    if rank == 0:
        Path(folder, "found.csv").write_text(
            "\n".join(f"{kind},{times['with']},{times['without']}" for kind, times in found.items())
        )
    dist.destroy_process_group()


def measure(args: argparse.Namespace) -> list[dict]:
    build(args.model, "meta")  # a wrong name ends here, not in the processes
    rows, alone = [], {}
    for processes in args.measure:
        if torch.cuda.is_available() and processes > torch.cuda.device_count():
            raise UserError(
                f"too many processes (--measure {processes}): this machine has {torch.cuda.device_count()} GPUs"
            )
        if args.batch_size % processes:
            raise UserError(
                f"strong scaling shares {args.batch_size} pictures (--batch-size): a multiple of {processes} "
                "processes, please"
            )
        batches = {"weak": args.batch_size, "strong": args.batch_size // processes}
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(seconds_of_steps, (processes, args, batches, folder), nprocs=processes)
            lines = [line.split(",") for line in Path(folder, "found.csv").read_text().splitlines()]
        for kind, joined, separate in lines:
            joined, separate = float(joined), float(separate)
            rate = processes * batches[kind] / joined
            alone.setdefault(kind, rate / processes)
            rows.append(
                {
                    "scaling": kind,
                    "processes": processes,
                    "pictures of each": batches[kind],
                    "step (ms)": f"{joined * 1e3:.1f}",
                    "exchange (ms)": f"{(joined - separate) * 1e3:.1f}",
                    "img/s": f"{rate:.2f}",
                    "of as many alone": f"{rate / processes / alone[kind]:.2f}",
                }
            )
        print(f"{processes} processes measured", file=sys.stderr, flush=True)
    return rows


# ---------------------------------------------------------------- the program


def table(rows: list[dict]) -> str:
    header = list(rows[0])
    return "\n".join(
        f"| {' | '.join(map(str, cells))} |"
        for cells in (header, ["---"] * len(header), *(row.values() for row in rows))
    )


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="alt_gvt_base", help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="pictures of a GPU or process (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write scaling.json and scaling.csv there")
    projected = parser.add_argument_group("projection")
    projected.add_argument(
        "--step-ms", type=float, help="what a step takes on one GPU, as tools/benchmark.py measures it"
    )
    projected.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    projected.add_argument(
        "--gradients",
        choices=DTYPE_BYTES,
        default="float32",
        help="dtype in which gradients are exchanged (%(default)s)",
    )
    projected.add_argument(
        "--rate", type=float, default=400.0, help="pictures per second that one core reads and augments (%(default)s)"
    )
    projected.add_argument("--node-gpus", type=int, default=Machine.gpus)
    projected.add_argument(
        "--inside", type=float, default=Machine.inside / 1e9, help="GB/s of a GPU to its node (%(default)s)"
    )
    projected.add_argument(
        "--outside", type=float, default=Machine.outside / 1e9, help="GB/s of a GPU to other nodes (%(default)s)"
    )
    projected.add_argument(
        "--latency", type=float, default=Machine.latency * 1e6, help="microseconds of a message (%(default)s)"
    )
    projected.add_argument("--cores", type=int, default=Machine.cores, help="of a node (%(default)s)")
    measured = parser.add_argument_group("measurement")
    measured.add_argument(
        "--measure",
        type=int,
        nargs="+",
        metavar="PROCESSES",
        help="numbers of processes on this machine, the first as what one does",
    )
    measured.add_argument("--input-size", type=int, default=224, help="side of the pictures (%(default)s)")
    measured.add_argument("--repeats", type=int, default=30, help="steps of each kind, after two more (%(default)s)")
    args = parser.parse_args(argv)
    for name in ("batch_size", "step_ms", "rate", "node_gpus", "inside", "outside", "cores", "input_size", "repeats"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"not a positive number (--{name.replace('_', '-')} {getattr(args, name)})")
    if min(*args.gpus, *(args.measure or [1])) < 1:
        raise UserError("at least one GPU or process (--gpus, --measure)")
    if (args.step_ms is None) == (args.measure is None):
        raise UserError("give --step-ms for a projection, or --measure PROCESSES for a measurement")
    rows = measure(args) if args.measure else project(args)
    print(table(rows))
    if args.output:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        records.write(
            args.output,
            "scaling",
            {"environment": environment(device, 0), "settings": settings, "rows": rows},
            csv_text(rows[0], rows),
        )


if __name__ == "__main__":
    sys.exit(exit_code("scaling.py", main, sys.argv[1:]))
