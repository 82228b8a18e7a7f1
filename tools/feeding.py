"""Measure what feeds a training: python -m tools.feeding --data-path FOLDER [--gpu-rate N] [--loop] [--output FOLDER].

How many pictures a second one core reads and augments, step by step, in the ways that lead to the same batches: the
published pipeline as it is written, in float32 in the loading process, and ours, in bytes until the device, with
RandAugment in the loading process or on the device (--fast-augment, where torch resizes too). In turns in one run, on
the pictures as they are and on copies of them enlarged to 375 pixels on the short side (JPEG of quality 90), which is
near ImageNet's own size. Then whole loading processes, of which the operating system says what CPU time they took,
batches, their way to the training process and all. Before a clock starts, the ways must give the same bits, or with
--fast-augment pictures that differ in few places.

A ratio is of CPU times, for other programs may use the same core; it is the median of the rounds', above 1 where ours
is faster. --loop measures instead what main.py's training loop takes above forward, backward and optimizer, on a CPU.
"""

import argparse
import contextlib
import copy
import gc
import io
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gvt  # noqa: F401

# isort: split
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import datasets
import engine
from tools import records
from tools.count import side
from tools.records import csv_text, environment, progress, quartiles
from training import batches, options
from training.errors import UserError, exit_code
from training.options import Parser, above_zero, count, positive
from utils import keep_freed_memory

PUBLISHED, BYTES, FAST = "float32 as published", "bytes until the device", "--fast-augment"
FEW = 0.04  # of the values of --fast-augment may be others than the published
ENLARGED = 375  # pixels on the short side
QUALITY = 90  # of their JPEG
SEED = (0, 0)  # of a run, and its epoch
ENDINGS = {".jpeg", ".jpg", ".png", ".webp"}
CLIP = 5.0  # the published largest norm of gradients
CLOCKS = {"cpu": time.thread_time, "wall": time.perf_counter}
CPU = torch.device("cpu")


# ---------------------------------------------------------------- pictures


def find_pictures(root: Path, number: int) -> list[Path]:
    """So many of the folder's, wherever in it, chosen by chance but always the same."""
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in ENDINGS)
    if not found:
        raise UserError(f"no pictures (--data-path {root}): expected {', '.join(sorted(ENDINGS))} in it or its folders")
    return sorted(random.Random(0).sample(found, min(number, len(found))))


def enlarge(paths: Sequence[Path], folder: Path) -> list[Path]:
    made = []
    for number, path in enumerate(paths):
        picture = datasets.read_image(str(path))
        scale = ENLARGED / min(picture.size)
        made.append(folder / f"{number}.jpg")
        picture.resize([round(length * scale) for length in picture.size], Image.Resampling.BICUBIC).save(
            made[-1], quality=QUALITY
        )
    return made


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


class Files(torch.utils.data.Dataset):
    def __init__(self, paths: Sequence[Path], transform: Callable):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.transform(datasets.read_image(str(self.paths[index]))), 0


# ---------------------------------------------------------------- ways and their steps

Step = Callable[[object], object]
NAMES = {
    "RandomResizedCropAndInterpolation": "crop and resize",
    "TorchCrop": "crop and resize",
    "RandomHorizontalFlip": "flip",
    "MaybeToTensor": "to tensor",
}
NAMES |= {"Normalize": "normalize", "RandomErasing": "erase"}


def transforms_of(size: int) -> dict[str, Callable]:
    pipeline = datasets.build_transform(True, options.parse_args(["--input-size", str(size)]))
    return {
        PUBLISHED: pipeline,
        BYTES: batches.Uint8Transform(pipeline),
        FAST: batches.Uint8Transform(pipeline, fast_augment=True),
    }


def steps_of(transform: Callable) -> dict[str, Step]:
    """From a file's name to what the loading process collates, by the names of the steps."""
    late = isinstance(transform, batches.Uint8Transform)
    drawing = transform.drawing if late else transform.transforms
    steps = {"decode": datasets.read_image} | {
        NAMES.get(type(step).__name__, type(step).__name__): step for step in drawing
    }
    if late:
        rest = copy.copy(transform)
        rest.drawing = []
        steps["to bytes, and what is left"] = rest
    return steps


def check_equal(paths: Sequence[Path], ways: dict[str, Callable]) -> float:
    """The share of values that are others with --fast-augment. UserError where they are not few, or the other ways'
    bits are not the same.
    """
    found = {}
    for way, transform in ways.items():
        keyed = batches.SeededDataset(Files(paths, transform), SEED[0])
        pictures, _ = batches.collate([keyed[SEED[1], index, index] for index in range(len(paths))])
        found[way] = pictures.to(CPU, memory_format=torch.contiguous_format)
    others = {way: (pictures != found[PUBLISHED]).double().mean().item() for way, pictures in found.items()}
    if others[BYTES] or others[FAST] > FEW:
        raise UserError(
            f"other pictures (share of values, {others}): expected 0, with {FAST} at most {FEW}; nothing was timed"
        )
    return others[FAST]


class Watch:
    """Adds up what each step takes, in ms."""

    def __init__(self):
        self.spent = {}

    def __call__(self, name: str, work: Callable[[], object]) -> object:
        before = {clock: read() for clock, read in CLOCKS.items()}
        value = work()
        for clock, read in CLOCKS.items():
            self.spent.setdefault(name, dict.fromkeys(CLOCKS, 0.0))[clock] += 1000 * (read() - before[clock])
        return value


def walk(paths: Sequence[Path], first: int, steps: dict[str, Step]) -> dict[str, dict[str, float]]:
    """Each picture through all steps, and the batch of them. -> ms a picture of each step and clock."""
    watch, done = Watch(), []
    for position, path in enumerate(paths, start=first):
        watch("random numbers", lambda key=(*SEED, position): datasets.seed_by(key))
        value = str(path)
        for name, step in steps.items():
            value = watch(name, lambda step=step, value=value: step(value))
        done.append((value, 0))
    batch = watch("batch", lambda: batches.collate(done))
    loading = {clock: sum(spent[clock] for spent in watch.spent.values()) for clock in CLOCKS}
    watch(ON_DEVICE, lambda: batch[0].to(CPU, memory_format=torch.contiguous_format))
    spent = watch.spent | {LOADING: loading}
    return {name: {clock: value / len(paths) for clock, value in clocks.items()} for name, clocks in spent.items()}


LOADING, ON_DEVICE = "loading, in all", "on the device (here this core)"
PROCESS = "loading process, in all"


def walks(paths: Sequence[Path], ways: dict[str, Callable], args: argparse.Namespace) -> dict[str, list[dict]]:
    """What `walk` gives for each way, round by round, each with the next pictures; the order within a round is
    shuffled.
    """
    steps, order = {name: steps_of(transform) for name, transform in ways.items()}, random.Random(0)
    found = {name: [] for name in ways}
    for number in range(-args.warmup, args.repeats):
        first = (number + args.warmup) * args.batch_size
        chunk = [paths[index % len(paths)] for index in range(first, first + args.batch_size)]
        for name in order.sample(list(ways), len(ways)):
            spent = walk(chunk, first, steps[name])
            if number >= 0:
                found[name].append(spent)
        if number + 1 == args.repeats or number % 10 == 9:
            progress(f"  round {number + 1} of {args.repeats}")
    return found


def load(paths: Sequence[Path], transform: Callable, batch_size: int) -> dict[str, dict[str, float]]:
    """An epoch through one loading process. -> ms of CPU a picture there, its start included."""
    order = [(SEED[1], index, index) for index in range(len(paths))]
    keyed = batches.SeededDataset(Files(paths, transform), SEED[0])
    gc.collect()
    before = children_seconds()
    loader = batches.build_loader(keyed, order, batch_size=batch_size, workers=1, pin_memory=False, drop_last=False)
    for _ in loader:
        pass
    del loader
    gc.collect()  # its process ends, and its time counts
    return {PROCESS: {"cpu": 1000 * (children_seconds() - before) / len(paths)}}


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def loads(paths: Sequence[Path], ways: dict[str, Callable], args: argparse.Namespace) -> dict[str, list[dict]]:
    found, order = {name: [] for name in ways}, random.Random(1)
    for number in range(args.processes):
        for name in order.sample(list(ways), len(ways)):
            found[name].append(load(paths, ways[name], args.batch_size))
        progress(f"  loading process {number + 1} of {args.processes}")
    return found


def measure(label: str, paths: Sequence[Path], args: argparse.Namespace) -> dict:
    ways = transforms_of(args.size)
    others = check_equal(paths[: args.batch_size], ways)
    sizes = [size_of(path) for path in paths]
    width, height = (statistics.median(size[axis] for size in sizes) for axis in (0, 1))
    case = {"pictures": label, "number": len(paths), "median_width": width, "median_height": height, "size": args.size}
    case["other_values_with_fast_augment"] = others
    parts = [found for found in (walks(paths, ways, args), loads(paths, ways, args)) if all(found.values())]
    case["rows"], case["ratios"] = [], []
    for found in parts:
        for way, rounds in found.items():
            for step in rounds[0]:
                times = {f"{clock}_ms": quartiles([each[step][clock] for each in rounds]) for clock in rounds[0][step]}
                case["rows"].append({"way": way, "step": step} | times)
        total = PROCESS if PROCESS in rounds[0] else LOADING
        for way, rounds in found.items():
            if way != PUBLISHED:
                ratios = [a[total]["cpu"] / b[total]["cpu"] for a, b in zip(found[PUBLISHED], rounds)]
                case["ratios"].append({"way": way, "of": total} | quartiles(ratios))
    totals = [row for row in case["rows"] if row["step"] in (LOADING, PROCESS)]
    rates = {(row["way"], row["step"]): 1000 / row["cpu_ms"]["median"] for row in totals}
    case["feeding"] = [
        {
            "way": way,
            "of": step,
            "pictures_per_s_and_core": rate,
            "gpu_rate": args.gpu_rate,
            "cores_a_gpu": args.gpu_rate / rate,
        }
        for (way, step), rate in rates.items()
    ]
    return case


# ---------------------------------------------------------------- the training loop


def measure_loop(args: argparse.Namespace) -> dict:
    """A training step of main.py's loop beside forward, backward and optimizer alone, without and with the recipe's
    clipping of gradients.
    """
    keep_freed_memory()  # for all, as main.py: otherwise the bare step waits for the kernel's pages
    torch.manual_seed(0)
    model, steps = timm.create_model(args.model, num_classes=100), range(args.steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    batches = [
        (torch.randn(args.batch_size, 3, args.size, args.size), torch.randint(100, (args.batch_size,))) for _ in steps
    ]
    kinds = {
        "bare step": lambda: bare(model, batches, optimizer),
        "bare step, clipped": lambda: bare(model, batches, optimizer, clip=True),
    }
    kinds["loop"] = lambda: looped(model, batches, optimizer)
    spent, order = {name: [] for name in kinds}, random.Random(0)
    for number in range(-args.warmup, args.repeats):
        for name in order.sample(list(kinds), len(kinds)):
            watch = Watch()
            watch("all", kinds[name])
            if number >= 0:
                spent[name].append({clock: value / args.steps for clock, value in watch.spent["all"].items()})
        progress(f"  round {max(number + 1, 0)} of {args.repeats}")
    rows = [
        {"kind": name} | {f"{clock}_ms": quartiles([each[clock] for each in rounds]) for clock in CLOCKS}
        for name, rounds in spent.items()
    ]
    above = {
        name: quartiles([100 * (a["cpu"] / b["cpu"] - 1) for a, b in zip(spent["loop"], spent[name])])
        for name in kinds
        if name != "loop"
    }
    case = {"model": args.model, "batch": args.batch_size, "size": args.size, "steps": args.steps}
    return case | {"rows": rows, "loop_above_percent": above}


def bare(model: nn.Module, batches: Sequence, optimizer: torch.optim.Optimizer, *, clip: bool = False) -> None:
    model.train()
    for pictures, labels in batches:
        F.cross_entropy(model(pictures), labels).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def looped(model: nn.Module, batches: Sequence, optimizer: torch.optim.Optimizer) -> None:
    off = torch.amp.GradScaler("cpu", enabled=False)
    with contextlib.redirect_stdout(io.StringIO()):
        engine.train_one_epoch(model, F.cross_entropy, batches, optimizer, CPU, 0, off, clip_grad=CLIP)


# ---------------------------------------------------------------- what is written

CLOCKED = [f"{clock}_ms{quartile}" for clock in CLOCKS for quartile in ("", "_q1", "_q3")]
COLUMNS = ("pictures", "way", "step", *CLOCKED, "ours_faster")


def flat(results: dict) -> Iterator[dict[str, str]]:
    """A row for each step of each way, as text."""
    for case in results["cases"]:
        ratios = {(each["way"], each["of"]): f"{each['median']:.3f}" for each in case["ratios"]}
        for row in case["rows"]:
            yield {
                "pictures": case["pictures"],
                "way": row["way"],
                "step": row["step"],
                "ours_faster": ratios.get((row["way"], row["step"]), ""),
            } | milliseconds(row)


def milliseconds(row: dict) -> dict[str, str]:
    found = {}
    for clock in CLOCKS:
        values = row.get(f"{clock}_ms")
        found |= {
            f"{clock}_ms{end}": f"{values[key]:.3f}" if values else ""
            for end, key in (("", "median"), ("_q1", "q1"), ("_q3", "q3"))
        }
    return found


def as_csv(results: dict) -> str:
    rows = list(flat(results)) or [{"kind": row["kind"]} | milliseconds(row) for row in results["loop"]["rows"]]
    return csv_text(COLUMNS if results["cases"] else ("kind", *CLOCKED), rows)


def table(rows: Sequence[dict], names: Sequence[str]) -> list[str]:
    """Medians and quartiles in ms."""
    lines = [f"{'':<60}{'CPU ms':>10}{'q1 - q3':>22}{'wall ms':>11}{'q1 - q3':>22}"]
    for row in rows:
        texts = milliseconds(row)
        spreads = [
            f"{texts[f'{clock}_ms_q1']} - {texts[f'{clock}_ms_q3']}" if texts[f"{clock}_ms"] else "" for clock in CLOCKS
        ]
        name = ": ".join(row[part] for part in names)
        lines.append(f"{name:<60}{texts['cpu_ms']:>10}{spreads[0]:>22}{texts['wall_ms']:>11}{spreads[1]:>22}".rstrip())
    return lines


def as_table(case: dict) -> str:
    median = f"{case['median_width']:g} x {case['median_height']:g}"
    head = f"{case['pictures']}: {case['number']} pictures, median {median}; ms a picture"
    lines = [head, *table(case["rows"], ("way", "step"))]
    lines += [
        f"{each['way']}: {each['of']} {each['median']:.3f} x as fast ({each['q1']:.3f} - {each['q3']:.3f})"
        for each in case["ratios"]
    ]
    for each in case["feeding"]:
        rate = f"{each['pictures_per_s_and_core']:.0f} pictures/s and core ({each['of']})"
        gpu = f"a GPU that trains at {each['gpu_rate']:g} pictures/s (given, not measured here)"
        need = f"{each['cores_a_gpu']:.1f} cores feed {gpu}"
        lines.append(f"{each['way']}: {rate}; {need}")
    return "\n".join(lines)


def loop_table(case: dict) -> str:
    lines = [
        f"{case['model']}, {case['batch']} x {case['size']} x {case['size']}; ms a step",
        *table(case["rows"], ("kind",)),
    ]
    for name, above in case["loop_above_percent"].items():
        lines.append(f"the loop takes {above['median']:.2f} % above the {name} ({above['q1']:.2f} - {above['q3']:.2f})")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command line


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-path", type=Path, default=None, metavar="FOLDER", help="with pictures, in whatever folders"
    )
    parser.add_argument(
        "--pictures", type=positive, default=1000, metavar="N", help="at most so many of them (%(default)s)"
    )
    parser.add_argument(
        "--gpu-rate",
        type=above_zero,
        default=1000.0,
        metavar="N",
        help="pictures/s that a GPU trains, to be fed (%(default)g)",
    )
    parser.add_argument(
        "--size", type=side, default=224, metavar="PIXELS", help="side of a picture that is trained on (%(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="pictures a round, and of a batch (%(default)s)"
    )
    parser.add_argument("--repeats", type=positive, default=30, metavar="N", help="rounds that count (%(default)s)")
    parser.add_argument("--warmup", type=count, default=2, metavar="N", help="rounds before them (%(default)s)")
    parser.add_argument(
        "--processes",
        type=count,
        default=3,
        metavar="N",
        help="loading processes to measure for each way (%(default)s)",
    )
    parser.add_argument("--loop", action="store_true", help="measure the training loop instead, on this CPU")
    parser.add_argument("--model", default="alt_gvt_small", metavar="NAME", help="of --loop (%(default)s)")
    parser.add_argument("--steps", type=positive, default=4, metavar="N", help="of --loop, in a round (%(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="write feeding.json, feeding.csv and table.txt there",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")
    args = parser.parse_args(argv)
    if not args.loop and args.data_path is None:
        raise UserError("no pictures (--data-path): give a folder of JPEGs such as ImageNet's val, or --loop")
    if args.loop and not timm.is_model(args.model):
        raise UserError(f"unknown model (--model {args.model}): expected a name of timm.list_models()")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)  # a loading process has one
    settings = {
        name: getattr(args, name) for name in ("repeats", "warmup", "processes", "batch_size", "size", "gpu_rate")
    }
    results = {"environment": environment(CPU, SEED[0]), "settings": settings, "cases": []}
    if args.loop:
        results["loop"] = measure_loop(args)
        shown = loop_table(results["loop"])
    else:
        paths = find_pictures(args.data_path, args.pictures)
        with tempfile.TemporaryDirectory() as folder:
            progress(f"enlarging {len(paths)} pictures")
            for label, files in {"as they are": paths, f"enlarged to {ENLARGED}": enlarge(paths, Path(folder))}.items():
                progress(f"pictures {label}")
                results["cases"].append(measure(label, files, args))
        shown = "\n\n".join(map(as_table, results["cases"]))
    if args.output:
        records.write(args.output, "feeding", results, as_csv(results), shown)
    print(json.dumps(results, indent=1) if args.json else shown)
    return 0


def run(argv: list[str]) -> int:
    return exit_code("feeding.py", main, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
