"""Time data loading: python -m tools.data_loading --data-path FOLDER [--gpu-rate N] [--output FOLDER], or --loop.

Images per second that one core reads and augments, step by step, in the ways that lead to the same batches: the
official pipeline, in float32 in the loading process, and ours, in uint8 until the device, with RandAugment in the
loading process or on the device (--fast-augment, where torch resizes too). Beside them, with random numbers of their
own: timm's prefetching loader, also in uint8, and torchvision's v2 transforms with its own RandAugment. All are
measured in turns in one run. Before anything is timed, ours and the official one must give the same bits, or with
--fast-augment few different values.

All times are of the CPU, as other programs may use the same core. A ratio is the median of the rounds' ratios, above 1
where ours is faster. --loop measures instead what main.py's training loop adds to forward, backward and optimizer.
"""

import argparse
import contextlib
import copy
import io
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import gvt  # noqa: F401

# isort: split
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.loader import fast_collate
from torch import nn
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import v2

import engine
from datasets import build_transform
from gvt_ops import accelerate
from tools.count import side
from tools.measurement import columns, environment, quartiles, run_rounds, text_table, write_record
from training import options
from training.batches import Uint8Transform, collate, seed_by
from training.errors import UserError, exit_code
from training.images import ImageReader
from training.options import Parser, above_zero, count, positive
from utils import keep_freed_memory

OFFICIAL, UINT8, FAST = "float32, official", "uint8 until the device", "--fast-augment"
TIMM, V2 = "timm's prefetching loader", "torchvision v2"
MOST_DIFFERENT = 0.04  # share of the values that may differ with --fast-augment
SEED = EPOCH = 0
SUFFIXES = {".jpeg", ".jpg", ".png", ".webp"}
CLIP = 5.0  # the official largest norm of gradients
CPU = torch.device("cpu")
LOADING, ON_DEVICE = "loading, total", "on the device (here this core)"


# ---------------------------------------------------------------- loading, step by step


def find_images(root: Path, number: int) -> list[Path]:
    """Return up to `number` images of the folder and its folders, a random choice that is always the same."""
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"no images (--data-path {root}): expected {', '.join(sorted(SUFFIXES))} in it or its folders")
    return sorted(random.Random(0).sample(found, min(number, len(found))))


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def build_ways(size: int) -> dict[str, Callable]:
    """Return ours and the official one, which give the same images."""
    pipeline = build_transform(True, options.parse_args(["--input-size", str(size)]))
    return {OFFICIAL: pipeline, UINT8: Uint8Transform(pipeline), FAST: Uint8Transform(pipeline, fast_augment=True)}


def build_peers(size: int) -> dict[str, Callable]:
    """Return other programs' pipelines of the same recipe. timm erases and normalizes on the device."""
    args = options.parse_args([])
    kwargs = dict(color_jitter=args.color_jitter, auto_augment=args.aa, interpolation=args.train_interpolation)
    crop = v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC)
    steps = [crop, v2.RandomHorizontalFlip(args.hflip), v2.RandAugment(2, 9), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    return {
        TIMM: create_transform(size, is_training=True, hflip=args.hflip, use_prefetcher=True, **kwargs),
        V2: v2.Compose([*steps, v2.RandomErasing(args.reprob)]),
    }


def steps_of(transform: Callable, decode: Callable) -> dict[str, Callable]:
    """Return the steps from a file's name to what the loading process collates, by name."""
    uint8 = isinstance(transform, Uint8Transform)
    steps = {"decode": decode}
    for step in transform.steps if uint8 else transform.transforms:
        steps[type(step).__name__] = step
    if uint8:
        rest = copy.copy(transform)
        rest.steps = []
        steps["to uint8, and draw the rest"] = rest
    return steps


def check_equal(paths: Sequence[Path], ways: dict[str, Callable]) -> float:
    """Return the share of values that differ with --fast-augment; raise UserError if it is large or others differ."""
    batches, reader = {}, ImageReader()
    for way, transform in ways.items():
        items = []
        for position, path in enumerate(paths):
            seed_by((SEED, EPOCH, position))
            items.append((transform(reader(str(path))), 0))
        images, _ = collate(items)
        batches[way] = images.to(CPU, memory_format=torch.contiguous_format)
    different = {way: (images != batches[OFFICIAL]).double().mean().item() for way, images in batches.items()}
    if different[UINT8] or different[FAST] > MOST_DIFFERENT:
        expected = f"expected 0, with {FAST} at most {MOST_DIFFERENT}"
        raise UserError(f"images differ (share of values, {different}): {expected}; nothing was timed")
    return different[FAST]


def timed(work: Callable, *args: object) -> tuple[object, float]:
    """Return what `work` returns, and its milliseconds of CPU."""
    start = time.thread_time()
    value = work(*args)
    return value, 1000 * (time.thread_time() - start)


def walk(
    paths: Sequence[Path], steps: dict[str, Callable], join: Callable, batch_size: int, number: int
) -> dict[str, float]:
    """Take the images of a round through all steps, and join them to a batch. Return ms per image and step."""
    spent, items, first = Counter(), [], number * batch_size

    def step(name: str, work: Callable, *args: object) -> object:
        value, ms = timed(work, *args)
        spent[name] += ms / batch_size
        return value

    for position in range(first, first + batch_size):
        step("random numbers", seed_by, (SEED, EPOCH, position))
        value = str(paths[position % len(paths)])
        for name, work in steps.items():
            value = step(name, work, value)
        items.append((value, 0))
    images, _ = step("batch", join, items)
    total = spent.total()
    step(ON_DEVICE, lambda: images.to(CPU, memory_format=torch.contiguous_format))
    return {**spent, LOADING: total}


def measure(paths: Sequence[Path], args: argparse.Namespace) -> dict:
    ways = build_ways(args.size)
    case = {"number": len(paths), "size": args.size}
    case["median_width"], case["median_height"] = map(median, zip(*map(size_of, paths)))
    case["different_with_fast_augment"] = check_equal(paths[: args.batch_size], ways)
    case |= {"rows": [], "ratios": [], "cores": []}
    joins, walks = {TIMM: fast_collate}, {}
    for way, transform in (ways | build_peers(args.size)).items():
        steps = steps_of(transform, ImageReader() if way in ways else pil_loader)
        walks[way] = partial(walk, paths, steps, joins.get(way, collate), args.batch_size)
    results = run_rounds(walks, repeats=args.repeats, warmup=args.warmup)
    for way, rounds in results.items():
        spent = {step: quartiles([each[step] for each in rounds]) for step in rounds[0]}
        case["rows"] += [{"way": way, "step": step, "cpu_ms": ms} for step, ms in spent.items()]
        rate = 1000 / spent[LOADING]["median"]
        need = {"gpu_rate": args.gpu_rate, "cores_per_gpu": args.gpu_rate / rate}
        case["cores"].append({"way": way, "images_per_s_and_core": rate} | need)
        if way != OFFICIAL:
            ratios = [official[LOADING] / ours[LOADING] for official, ours in zip(results[OFFICIAL], rounds)]
            case["ratios"].append({"way": way, "than": OFFICIAL} | quartiles(ratios))
        if way in (TIMM, V2):
            for ours in (UINT8, FAST):
                ratios = [theirs[LOADING] / each[LOADING] for theirs, each in zip(rounds, results[ours])]
                case["ratios"].append({"way": ours, "than": way} | quartiles(ratios))
    return case


# ---------------------------------------------------------------- the training loop


def measure_loop(args: argparse.Namespace) -> dict:
    """Time a training step of main.py's loop beside forward, backward and optimizer alone, clipped and not."""
    # For all, as main.py does: otherwise the bare step waits for the kernel's pages.
    keep_freed_memory()
    torch.manual_seed(0)
    model = accelerate(timm.create_model(args.model, num_classes=100))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    shape = args.batch_size, 3, args.size, args.size
    batches = [(torch.randn(shape), torch.randint(100, shape[:1])) for _ in range(args.steps)]

    def time_step(run: Callable, clip: float | None, _: int) -> float:
        return timed(run, model, batches, optimizer, clip)[1] / args.steps

    kinds = {"bare step": (run_bare, None), "bare step, clipped": (run_bare, CLIP), "loop": (run_loop, CLIP)}
    steps = {kind: partial(time_step, *each) for kind, each in kinds.items()}
    times = run_rounds(steps, repeats=args.repeats, warmup=args.warmup)
    pairs = {kind: zip(times["loop"], times[kind]) for kind in kinds if kind != "loop"}
    added = {kind: quartiles([100 * (loop / bare - 1) for loop, bare in pair]) for kind, pair in pairs.items()}
    rows = [{"kind": kind, "cpu_ms": quartiles(spent)} for kind, spent in times.items()]
    case = {"model": args.model, "batch": args.batch_size, "size": args.size, "steps": args.steps}
    return case | {"rows": rows, "loop_above_percent": added}


def run_bare(model: nn.Module, batches: Sequence, optimizer: torch.optim.Optimizer, clip: float | None) -> None:
    model.train()
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run_loop(model: nn.Module, batches: Sequence, optimizer: torch.optim.Optimizer, clip: float) -> None:
    scaler, settings = torch.amp.GradScaler("cpu", enabled=False), engine.StepSettings(clip_grad=clip)
    with contextlib.redirect_stdout(io.StringIO()):
        engine.train_one_epoch(model, F.cross_entropy, batches, optimizer, CPU, 0, scaler, settings)


# ---------------------------------------------------------------- what is written


def flat(results: dict) -> list[dict[str, str]]:
    """Return a row for each step of each way, or for each kind of training step, as text."""
    if "loop" in results:
        return [{"kind": row["kind"]} | columns("cpu_ms", row["cpu_ms"]) for row in results["loop"]["rows"]]
    loading, rows = results["loading"], []
    official = [each for each in loading["ratios"] if each["than"] == OFFICIAL]
    faster = {(each["way"], LOADING): f"{each['median']:.3f}" for each in official}
    for row in loading["rows"]:
        way, step = row["way"], row["step"]
        times = columns("cpu_ms", row["cpu_ms"])
        rows.append({"way": way, "step": step} | times | {"ours_faster": faster.get((way, step), "")})
    return rows


def as_text(results: dict) -> str:
    lines = [text_table(flat(results))]
    if "loop" in results:
        loop = results["loop"]
        lines.append(f"{loop['model']}, {loop['batch']} x {loop['size']} x {loop['size']}; ms per step")
        for name, added in loop["loop_above_percent"].items():
            spread = f"{added['q1']:.2f} - {added['q3']:.2f}"
            lines.append(f"the loop takes {added['median']:.2f} % above the {name} ({spread})")
    else:
        loading = results["loading"]
        size = f"median {loading['median_width']:g} x {loading['median_height']:g}, cut to {loading['size']}"
        lines.append(f"{loading['number']} images, {size}; ms per image")
        for each in loading["ratios"]:
            spread = f"{each['median']:.2f} ({each['q1']:.2f} - {each['q3']:.2f})"
            lines.append(f"{each['way']}: {spread} times as fast as {each['than']}")
        for each in loading["cores"]:
            rate = f"{each['images_per_s_and_core']:.0f} images/s and core"
            gpu = f"a GPU that trains at {each['gpu_rate']:g} images/s (given, not measured here)"
            lines.append(f"{each['way']}: {rate}; {each['cores_per_gpu']:.1f} cores feed {gpu}")
    return "\n".join(lines)


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="data_loading.py", description=__doc__.splitlines()[0])
    add, number = parser.add_argument, dict(metavar="N", type=positive)
    add("--data-path", type=Path, metavar="FOLDER", help="with images, in whatever folders")
    add("--images", default=1000, help="at most so many of them (%(default)s)", **number)
    add("--gpu-rate", type=above_zero, default=1000.0, metavar="N", help="images/s of a GPU (%(default)g)")
    add("--size", type=side, default=224, metavar="PIXELS", help="side of a training image (%(default)s)")
    add("--batch-size", default=32, help="images of a batch, and of a round (%(default)s)", **number)
    add("--repeats", default=30, help="timed rounds (%(default)s)", **number)
    add("--warmup", type=count, default=2, metavar="N", help="rounds before them (%(default)s)")
    add("--loop", action="store_true", help="time the training loop instead, on this CPU")
    add("--model", default="alt_gvt_small", metavar="NAME", help="of --loop (%(default)s)")
    add("--steps", default=4, help="of --loop, in a round (%(default)s)", **number)
    add("--output", type=Path, metavar="FOLDER", help="write data_loading.json, data_loading.csv, table.txt there")
    args = parser.parse_args(argv)
    if not args.loop and args.data_path is None:
        raise UserError("no images (--data-path): give a folder of JPEGs such as ImageNet's val, or --loop")
    if args.loop and not timm.is_model(args.model):
        raise UserError(f"unknown model (--model {args.model}): expected a name of timm.list_models()")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    # A loading process has one.
    torch.set_num_threads(1)
    names = ("repeats", "warmup", "batch_size", "size", "gpu_rate")
    results = {"environment": environment(CPU), "settings": {name: getattr(args, name) for name in names}}
    if args.loop:
        results["loop"] = measure_loop(args)
    else:
        results["loading"] = measure(find_images(args.data_path, args.images), args)
    shown = as_text(results)
    if args.output:
        write_record(args.output, "data_loading", results, flat(results), shown=shown)
    print(shown)


if __name__ == "__main__":
    sys.exit(exit_code("data_loading.py", main, sys.argv[1:]))
