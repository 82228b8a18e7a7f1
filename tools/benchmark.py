"""Measure Twins beside its peers: python -m tools.benchmark [--models NAME ...] [--tasks inference training features]
[--modes eager compiled].

In one run and in turns, so that whatever else the machine does hits all alike: our model; timm's model of the same
weights, or mmsegmentation's backbone (--tasks features); other networks (--peers); and the machine's limits, a matrix
product and a copy. Before a clock starts, all that hold the same weights must give the same logits, maps or gradients.
A ratio is the median of the ratios of the rounds, above 1 where ours is faster.

What is compared with the limits is counted, not measured. Operations: of convolutions and matrix products, attention's
included, two a multiply-add; a training step has its backward pass too. Bytes: each product, attention and norm reads
its inputs and writes its outputs once, a residual is read once more, and all else (bias, GELU, copies) is free, as if
fused; parameters are read once. A training step reads inputs twice more, reads and writes gradients as it does outputs
and inputs, and each parameter takes ten passes of float32.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gvt

# isort: split
import timm
import torch
import torch.nn.functional as F
from timm.models.twins import Twins as TimmTwins
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gvt_ops import accelerate, onednn
from tools import records
from tools.count import FlopCounterMode, conv_flop_count, side
from tools.plot_logs import tidy
from tools.records import csv_text, environment, progress, quartiles
from training import checkpoint, formats
from training.errors import UserError, exit_code
from training.options import Parser, above_zero, count, positive

TASKS = ("inference", "training", "features")
MODES = ("eager", "compiled", "graphs")
DTYPES = ("float32", "bfloat16", "float16")
PEER = {"inference": "timm", "training": "timm", "features": "mmseg"}  # who has the same weights
PRODUCT, COPY = "matrix product", "memory copy"
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
COPIED = {"cpu": 2**27, "cuda": 2**30}  # bytes
CHUNK = 8  # pictures of the float64 reference at once
SMALLEST_SHARE = 0.01
PUBLISHED = Path(__file__).resolve().parent.parent / "logs" / "published"
SEVERAL = 2  # times its own rounding error is what a dtype's outputs may be off
LOSS_SCALE = {"float16": 1024.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured in turns: a model of gvt.MODEL_NAMES, a task, a dtype, pictures of size x size."""

    model: str
    task: str
    dtype: str
    batch: int
    size: int

    @property
    def variant(self) -> gvt.Variant:
        return gvt.VARIANTS[gvt.MODEL_NAMES[self.model]]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def autocast(self) -> bool:
        return self.task == "training" and self.dtype in ("bfloat16", "float16")

    @property
    def of_weights(self) -> torch.dtype:
        return torch.float32 if self.autocast else self.torch_dtype

    def __str__(self) -> str:
        return f"{self.model} {self.task} {self.dtype} {self.batch} x {self.size} x {self.size}"


# ---------------------------------------------------------------- the networks


def build_ours(case: Case) -> nn.Module:
    """With weights of a seed, and with what its peer does to windows beyond a map's edge."""
    torch.manual_seed(0)
    if case.task == "features":
        libraries_of_features()
        from dense.backbone import TwinsBackbone

        model = TwinsBackbone(gvt.MODEL_NAMES[case.model], drop_path_rate=0.0, pad="published")
    else:
        model = timm.create_model(case.model, pad="zero")
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.dim() == 1
            ):  # biases and norms that are not all 0 and 1: each must find its place in the other library
                parameter += 0.02 * torch.randn_like(parameter)
    return accelerate(model)


def build_timm(case: Case, state: dict[str, Tensor]) -> nn.Module:
    v = case.variant
    shape = dict(embed_dims=v.dims, num_heads=v.heads, mlp_ratios=v.mlp_ratios, depths=v.depths, sr_ratios=v.sr_ratios)
    model = TimmTwins(img_size=case.size, wss=None if v.window is None else (v.window,) * len(v.dims), **shape)
    converted, _, _ = formats.from_published(state, "timm", source=case.model)
    checkpoint.load_into(model, converted, source=case.model)
    return model


def libraries_of_features() -> None:
    from dense import libraries

    libraries.load("mmseg")


def build_mmseg(case: Case, state: dict[str, Tensor]) -> nn.Module:
    """mmsegmentation's backbone with the published eps of each norm, of which it has one for all."""
    libraries_of_features()
    from mmseg.models import backbones

    shape = {key: list(getattr(case.variant, key)) for key in ("mlp_ratios", "depths", "sr_ratios")}
    shape |= dict(embed_dims=list(case.variant.dims), num_heads=list(case.variant.heads), qkv_bias=True)
    if case.variant.window is None:
        model = backbones.PCPVT(norm_after_stage=False, **shape)
    else:
        model = backbones.SVT(norm_after_stage=True, windiow_sizes=[case.variant.window] * 4, **shape)  # so spelt there
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5 if "patch_embeds" in name or name.endswith("attn.norm") else 1e-6
    converted, _, _ = formats.from_published(state, "mmseg", source=case.model)
    checkpoint.load_into(model, converted, source=case.model)
    return model


def build_other(name: str, case: Case) -> nn.Module:
    torch.manual_seed(0)
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    return timm.create_model(name, **(dict(img_size=case.size) if fixed else {}))


BUILDERS = {"timm": build_timm, "mmseg": build_mmseg}
RECOMPUTED = "MLP recomputed"  # ours, with less memory


def same_weights(case: Case) -> tuple[str, ...]:
    return "ours", RECOMPUTED, PEER[case.task]


def build(case: Case, library: str, device: torch.device) -> nn.Module:
    """library: ours, RECOMPUTED, timm, mmseg, or the name of another network of timm."""
    if library in ("ours", RECOMPUTED):
        model = build_ours(case)
        if library == RECOMPUTED:
            model.set_grad_checkpointing(part="mlp")
    elif library in BUILDERS:
        model = BUILDERS[library](case, build_ours(case).state_dict())
    else:
        model = build_other(library, case)
    return model.to(device, case.of_weights).train(case.task == "training")


# ---------------------------------------------------------------- what is run, and what comes out


class Runner:
    """A network on a batch: step() is what is timed, outputs() what must be equal, as one vector."""

    def __init__(self, case: Case, module: nn.Module, mode: str, device: torch.device):
        self.case, self.module = case, module
        self.pictures, self.targets = batch_of(case, device)
        options = dict(fullgraph=True, dynamic=False, mode="reduce-overhead" if mode == "graphs" else None)
        self.model = module if mode == "eager" else torch.compile(module, **options)
        self.pictures = self.pictures.to(case.of_weights)
        if case.task == "training":
            self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
            self.scaler = torch.amp.GradScaler(device.type, enabled=case.dtype == "float16")

    def loss(self, pictures: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(pictures.device.type, dtype=self.case.torch_dtype, enabled=self.case.autocast):
            return F.cross_entropy(self.model(pictures), targets)

    def step(self) -> None:
        if self.case.task != "training":
            with torch.inference_mode():
                self.model(self.pictures)
            return
        self.scaler.scale(self.loss(self.pictures, self.targets)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def outputs(self, chunk: int | None = None) -> Tensor:
        """Logits, maps or gradients. chunk: pictures at once, else all."""
        parts = zip(self.pictures.split(chunk or self.case.batch), self.targets.split(chunk or self.case.batch))
        if self.case.task != "training":
            with torch.inference_mode():
                found = [self.model(pictures) for pictures, _ in parts]
            return torch.cat(
                [each.flatten() for out in found for each in (out if isinstance(out, (tuple, list)) else [out])]
            ).double()
        scale = LOSS_SCALE.get(self.case.dtype, 1.0)
        for pictures, targets in parts:
            (scale * self.loss(pictures, targets) * len(pictures) / self.case.batch).backward()
        found = (
            torch.cat([parameter.grad.flatten() for _, parameter in sorted(self.module.named_parameters())]).double()
            / scale
        )
        self.module.zero_grad(set_to_none=True)
        return found


def batch_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(case.batch, 3, case.size, case.size).to(device), torch.randint(1000, (case.batch,)).to(device)


def reference(case: Case, device: torch.device) -> tuple[Tensor, float]:
    """Ours in float64, unfused and chunk by chunk, and how far (root mean square) the same in the case's dtype is from
    it.
    """
    found = []
    for each in (dataclasses.replace(case, dtype="float64"), case):
        runner = Runner(each, build(each, "ours", device), "eager", device)
        accelerate(runner.module, enable=False).set_fused_attn(False)
        found.append(runner.outputs(CHUNK))
    truth, plain = found
    return truth, rms(plain - truth)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def check_outputs(case: Case, runners: dict[tuple[str, str], Runner], device: torch.device) -> dict:
    """Each that holds our weights is off the float64 outputs by at most SEVERAL times what plain PyTorch in this dtype
    is; else UserError.
    """
    truth, own = reference(case, device)
    errors = {name: rms(runner.outputs() - truth) for name, runner in runners.items() if name[0] in same_weights(case)}
    for (library, mode), error in errors.items():
        if not error <= SEVERAL * own:
            allowed = f"{SEVERAL} x {own:.3g}, the error of the dtype itself"
            raise UserError(
                f"other outputs ({library} {mode}, {case}): off by {error:.3g}, expected at most {allowed}; nothing "
                "was timed"
            )
    return {
        "rms_of_outputs": rms(truth),
        "rms_error_of_dtype": own,
        "rms_error": {" ".join(name): error for name, error in errors.items()},
    }


# ---------------------------------------------------------------- time and memory


def limits(dtype: torch.dtype, device: torch.device) -> dict[tuple[str, str], Callable[[], object]]:
    n, size = SIDE[device.type], COPIED[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out, source = torch.empty_like(a), torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {(PRODUCT, "mm"): lambda: torch.mm(a, b, out=out), (COPY, ""): lambda: target.copy_(source)}
    if onednn.unsupported_reason(a, b) is None:  # two libraries: the limit is the faster one's
        found[PRODUCT, "oneDNN"] = lambda: onednn.linear(a, b)
    return found


def seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def in_turns(
    steps: dict[tuple[str, str], Callable[[], object]], device: torch.device, *, repeats: int, warmup: int
) -> dict[tuple[str, str], list]:
    """Seconds of each, round by round; the order within a round is shuffled, so that nobody always follows the same."""
    times, order = {name: [] for name in steps}, random.Random(0)
    for number in range(-warmup, repeats):
        for name in order.sample(list(steps), len(steps)):
            spent = seconds(steps[name], device)
            if number >= 0:
                times[name].append(spent)
        if number + 1 in (0, repeats) or number % 10 == 9:
            progress(f"  round {max(number + 1, 0)} of {repeats}")
    return times


def resident_mb(line: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, on Linux."""
    return (
        int(next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(line)).split()[1])
        / 1024
    )


def peak_memory(case: Case, library: str, mode: str, device_name: str, threads: int) -> tuple[float, float] | None:
    """In a process of its own, after a warm-up: MB at the peak of two steps, and before them (network, batch,
    optimizer).

    CUDA: of torch's allocator. Linux: resident memory of the whole process, Python and libraries with it. Elsewhere
    None.
    """
    device = torch.device(device_name)
    torch.set_num_threads(threads)
    runner = Runner(case, build(case, library, device), mode, device)
    for _ in range(2):
        runner.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated() / 2**20
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        rest = resident_mb("VmRSS")
    else:
        return None
    for _ in range(2):
        runner.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20, rest
    return max(resident_mb("VmHWM"), rest), rest  # the kernel notes a peak late and in lots of pages


def memory_of_each(
    case: Case, names: Iterable[tuple[str, str]], device: torch.device
) -> dict[tuple[str, str], tuple[float, float] | None]:
    found = {}
    for library, mode in names:
        progress(f"  memory of {library} {mode}")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found[library, mode] = process.submit(
                peak_memory, case, library, mode, str(device), torch.get_num_threads()
            ).result()
    return found


def operators(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """What a step's time goes to: the share of each operator without those that it calls, of all but the smallest."""
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    ) as trace:
        for _ in range(3):
            step()
    spent = {
        event.key: event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        for event in trace.key_averages()
    }
    total = sum(spent.values())
    return {
        name: time / total
        for name, time in sorted(spent.items(), key=lambda item: -item[1])
        if time / total >= SMALLEST_SHARE
    }


# ---------------------------------------------------------------- floors


def floors(case: Case) -> dict[str, float]:
    """-> operations and bytes of a step: see the top of this file; and of the forward pass the shares of operations in
    LSA and GSA.
    """
    with torch.device("meta"):
        model = (
            build_ours(case) if case.task == "features" else timm.create_model(case.model)
        )  # the padding with the fewest operations
        pictures, targets = torch.empty(case.batch, 3, case.size, case.size), torch.empty(case.batch, dtype=torch.long)
    model.set_fused_attn(False)  # unfused, attention's products are there to be counted
    sizes, mapping = watch(model), {torch.ops.aten.convolution_backward: both_gradients}
    training = case.task == "training"
    with torch.set_grad_enabled(training), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        inside = watch_attention(model, counter)
        out = model(pictures)
        forward = counter.get_total_flops()
        if training:
            F.cross_entropy(out, targets).backward()
    read, written, residual = (sum(sizes[key]) for key in ("read", "written", "residual"))
    params, width = sum(parameter.numel() for parameter in model.parameters()), case.torch_dtype.itemsize
    moved = (
        (3 * read + 2 * written + 2 * residual) * width + 10 * 4 * params
        if training
        else (read + written + residual + params) * width
    )
    shares = {name: operations / forward for name, operations in inside.items()}
    return {"operations": counter.get_total_flops(), "bytes": moved, "shares_of_operations": shares}


def both_gradients(
    grad, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, wanted, *, out_shape
) -> int:
    """Operations of a convolution's backward pass, where torch's counter takes one with groups for one without."""
    return sum(wanted[:2]) * conv_flop_count(x, weight, grad, transposed=False)


def watch_attention(model: nn.Module, counter: FlopCounterMode) -> dict[str, int]:
    """Operations that the next forward pass has in each kind of attention, its projections and sub-sampling among
    them.
    """
    found = {"LSA": 0, "GSA": 0}

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[kind(module)] -= counter.get_total_flops()

    def leave(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[kind(module)] += counter.get_total_flops()

    def kind(module: nn.Module) -> str:
        return "LSA" if isinstance(module, gvt.LocalAttention) else "GSA"

    for module in model.modules():
        if isinstance(module, (gvt.LocalAttention, gvt.GlobalAttention)):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    return found


def watch(model: nn.Module) -> dict[str, list[int]]:
    """Elements of activations that the next forward passes read and write, by the rules at the top of this file."""
    sizes = {"read": [], "written": [], "residual": []}

    def product_or_norm(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes["read"].append(inputs[0].numel())
        sizes["written"].append(output.numel())

    def queries_keys_values(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes["read"].append(output.numel())

    def attended(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes["written"].append(inputs[0].numel())

    def residuals(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes["residual"].append(2 * output.numel())

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            module.register_forward_hook(product_or_norm)
        elif isinstance(module, (gvt.LocalAttention, gvt.GlobalAttention)):
            for name in ("qkv", "q", "kv"):
                if hasattr(module, name):
                    getattr(module, name).register_forward_hook(queries_keys_values)
            module.proj.register_forward_pre_hook(attended)
        elif isinstance(module, gvt.Block):
            module.register_forward_hook(residuals)
    return sizes


# ---------------------------------------------------------------- a case


def measure(case: Case, args: argparse.Namespace) -> dict:
    """-> the record of a case: limits, floors, a row for each network and mode, ratios."""
    device = torch.device(args.device)
    torch.compiler.reset()
    libraries = ["ours", PEER[case.task], *(args.peers if case.task != "features" else ())]
    if args.recompute and case.task == "training":
        libraries.append(RECOMPUTED)
    progress("  building")
    modules = {library: build(case, library, device) for library in libraries}
    runners = {
        (library, mode): Runner(case, modules[library], mode, device) for mode in args.modes for library in libraries
    }
    progress("  compiling, comparing outputs" if set(args.modes) - {"eager"} else "  comparing outputs")
    agreement = check_outputs(case, runners, device)
    steps = {name: runner.step for name, runner in runners.items()} | limits(case.torch_dtype, device)
    times = in_turns(steps, device, repeats=args.repeats, warmup=args.warmup)
    traces = {name: operators(runner.step, device) for name, runner in runners.items()} if args.profile else {}
    floor = floors(case)
    rates = {
        library: 2 * SIDE[device.type] ** 3 / median(spent)
        for (what, library), spent in times.items()
        if what == PRODUCT
    }
    best = {
        "operations_per_s": max(rates.values()),
        "operations_per_s_by": rates,
        "bytes_per_s": 2 * COPIED[device.type] / median(times[COPY, ""]),
    }
    memory = memory_of_each(case, runners, device) if args.memory else {}
    rows = [row(name, case, times[name], memory.get(name), floor, best) for name in runners]
    for found, name in zip(rows, runners):
        if name in traces:
            found["operators"] = traces[name]
    return dataclasses.asdict(case) | {
        "limits": best,
        "floor": floor
        | {
            "operations_s": floor["operations"] / best["operations_per_s"],
            "bytes_s": floor["bytes"] / best["bytes_per_s"],
        },
        "outputs": agreement,
        "rows": rows,
        "ratios": ratios({name: times[name] for name in runners}),
    }


median = statistics.median


def row(
    name: tuple[str, str], case: Case, times: list[float], memory: tuple[float, float] | None, floor: dict, best: dict
) -> dict:
    library, mode = name
    found = {
        "library": library,
        "mode": mode,
        "seconds": quartiles(times),
        "pictures_per_s": case.batch / median(times),
    }
    if library in same_weights(case):  # the same network, so the same floors
        found["share_of_product_rate"] = floor["operations"] / best["operations_per_s"] / median(times)
        found["share_of_copy_rate"] = floor["bytes"] / best["bytes_per_s"] / median(times)
    if memory:
        found["peak_mb"], found["rest_mb"] = memory
    return found | {"rounds_s": [round(each, 7) for each in times]}


def ratios(times: dict[tuple[str, str], list[float]]) -> list[dict]:
    """Ours against each other network: mode for mode, and ours in its best mode against the other's eager. Each of the
    rounds' ratios.
    """
    ours = {mode: spent for (library, mode), spent in times.items() if library == "ours"}
    fastest = min(ours, key=lambda mode: median(ours[mode]))
    pairs = [(mode, library, mode) for library, mode in times if library != "ours"]
    pairs += [(fastest, library, mode) for library, mode in times if library != "ours" and mode == "eager" != fastest]
    return [
        {"ours": mine, "library": library, "mode": mode}
        | quartiles([b / a for a, b in zip(ours[mine], times[library, mode])])
        for mine, library, mode in pairs
    ]


# ---------------------------------------------------------------- what is written

COLUMNS = ("model", "task", "dtype", "batch", "size", "library", "mode")
FIGURES = (
    "ms",
    "ms_q1",
    "ms_q3",
    "pictures_per_s",
    "ours_faster",
    "share_of_product_rate",
    "share_of_copy_rate",
    "peak_mb",
    "rest_mb",
)


def flat(results: dict) -> list[dict[str, str]]:
    """A row for each network and mode of each case, as text. ours_faster: ours in the same mode against this one."""
    rows = []
    for case in results["cases"]:
        ratio = {
            (each["library"], each["mode"]): each["median"] for each in case["ratios"] if each["ours"] == each["mode"]
        }
        for found in case["rows"]:
            times = {
                key: f"{1000 * found['seconds'][of]:.3f}"
                for key, of in (("ms", "median"), ("ms_q1", "q1"), ("ms_q3", "q3"))
            }
            figures = found | {"ours_faster": ratio.get((found["library"], found["mode"]))}
            texts = {
                key: "" if figures.get(key) is None else f"{figures[key]:.4g}" for key in FIGURES if key not in times
            }
            rows.append({key: str((case | found)[key]) for key in COLUMNS} | times | texts)
    return rows


def as_csv(results: dict) -> str:
    return csv_text((*COLUMNS, *FIGURES), flat(results))


def as_table(case: dict) -> str:
    lines = [
        f"{'':<34}{'ms':>10}{'q1 - q3':>22}{'pictures/s':>12}{'ours faster':>13}"
        f"{'of product':>12}{'of copy':>9}{'peak MB':>9}"
        f"{'':<34}{'ms':>10}{'q1 - q3':>22}{'pictures/s':>12}{'ours faster':>13}"
        f"{'of product':>12}{'of copy':>9}{'peak MB':>9}"
    ]
    for found in flat({"cases": [case]}):
        shares = [
            f"{100 * float(found[key]):.0f} %" if found[key] else ""
            for key in ("share_of_product_rate", "share_of_copy_rate")
        ]
        spread = f"{found['ms_q1']} - {found['ms_q3']}"
        name = f"{found['library']} {found['mode']}"
        lines.append(
            f"{name:<34}{found['ms']:>10}{spread:>22}{found['pictures_per_s']:>12}{found['ours_faster']:>13}"
            f"{shares[0]:>12}{shares[1]:>9}{found['peak_mb']:>9}".rstrip()
        )
    for each in case["ratios"]:
        if each["ours"] != each["mode"]:
            lines.append(
                f"ours {each['ours']} against {each['library']} {each['mode']}: {each['median']:.3f} ({each['q1']:.3f} "
                f"- {each['q3']:.3f})"
            )
    best = case["limits"]
    for found in case["rows"]:
        shares = ", ".join(
            f"{name.rsplit('::')[-1]} {100 * share:.0f} %" for name, share in found.get("operators", {}).items()
        )
        if shares:
            lines.append(f"{found['library']} {found['mode']}: {shares}")
    rates = ", ".join(
        f"{PRODUCT} by {library} {rate / 1e9:,.0f} G operations/s"
        for library, rate in best["operations_per_s_by"].items()
    )
    lines.append(f"limits: {rates}; {COPY} {best['bytes_per_s'] / 1e9:,.1f} GB/s")
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in case["floor"]["shares_of_operations"].items())
    lines.append(
        f"operations: {case['floor']['operations'] / case['batch'] / 1e9:,.2f} G a picture; of the forward pass "
        f"{shares}"
    )
    return "\n".join(lines)


def describe(args: argparse.Namespace) -> dict:
    device = torch.device(args.device)
    return {
        "environment": environment(device, 0),
        "settings": {
            "repeats": args.repeats,
            "warmup": args.warmup,
            "matrices": SIDE[device.type],
            "copied_bytes": COPIED[device.type],
        },
        "cases": [],
    }


def write(results: dict, folder: Path) -> None:
    """results.json, results.csv and the figures."""
    records.write(folder, "results", results, as_csv(results))
    try:
        draw(results, folder)
    except OSError as error:
        raise UserError(f"cannot write (--output {folder}): {error.strerror}") from error


# ---------------------------------------------------------------- figures


def draw(results: dict, folder: Path) -> None:
    """bars.png; batch.png, resolution.png and shares.png where there are several of them; accuracy.png where there are
    peers of known top-1.
    """
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(f"{case['task']}, {case['dtype']}" for case in results["cases"]))
    top1 = published_top1()
    drawings = {
        "bars": (lambda cases: cases, draw_bars),
        "batch": (lambda cases: series(cases, "batch"), lambda axis, cases: draw_lines(axis, cases, "batch")),
        "resolution": (lambda cases: series(cases, "size"), lambda axis, cases: draw_lines(axis, cases, "size")),
        "shares": (lambda cases: series(cases, "size"), draw_shares),
        "accuracy": (lambda cases: points(cases, top1), draw_accuracy),
    }
    for name, (choose, put) in drawings.items():
        chosen = {
            title: choose([case for case in results["cases"] if f"{case['task']}, {case['dtype']}" == title])
            for title in titles
        }
        chosen = {title: cases for title, cases in chosen.items() if cases}
        if not chosen:
            continue
        figure = Figure(figsize=(7.5, 4.2 * len(chosen)), layout="constrained")
        for axis, (title, cases) in zip(figure.subplots(len(chosen), squeeze=False).flat, chosen.items()):
            axis.set_title(title)
            put(axis, cases)
            tidy(axis)
        figure.savefig(folder / f"{name}.png", dpi=120)


def names_in(cases: list[dict]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((found["library"], found["mode"]) for case in cases for found in case["rows"]))


def draw_bars(axis, cases: list[dict]) -> None:
    """Pictures per second, quartiles as whiskers."""
    names = names_in(cases)
    for index, name in enumerate(names):
        found = {
            place: r for place, case in enumerate(cases) for r in case["rows"] if (r["library"], r["mode"]) == name
        }
        rates = [r["pictures_per_s"] for r in found.values()]
        whiskers = [
            [abs(cases[at]["batch"] / r["seconds"][q] - r["pictures_per_s"]) for at, r in found.items()]
            for q in ("q3", "q1")
        ]
        places = [place + (index - (len(names) - 1) / 2) * 0.8 / len(names) for place in found]
        axis.bar(places, rates, 0.8 / len(names), yerr=whiskers, error_kw=dict(lw=0.8), label=" ".join(name))
    axis.set_xticks(
        range(len(cases)), [f"{case['model']}\n{case['batch']} x {case['size']}" for case in cases], fontsize=8
    )
    axis.set_ylabel("pictures per second")
    axis.legend(frameon=False, fontsize=8)


def series(cases: list[dict], per: str) -> dict[tuple, list[dict]]:
    """The cases that differ in `per` alone, where there are several, by what they share."""
    other = {"batch": "size", "size": "batch"}[per]
    found = {}
    for case in cases:
        found.setdefault((case["model"], other, case[other]), []).append(case)
    return {key: sorted(group, key=lambda case: case[per]) for key, group in found.items() if len(group) > 1}


def draw_lines(axis, groups: dict[tuple, list[dict]], per: str) -> None:
    """Milliseconds a picture, both axes logarithmic; against the side also what would be linear in the number of
    pixels.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    for (model, other, value), cases in groups.items():
        for name in names_in(cases):
            found = [
                (case[per], 1000 / r["pictures_per_s"])
                for case in cases
                for r in case["rows"]
                if (r["library"], r["mode"]) == name
            ]
            label = f"{model}, {' '.join(name)} ({other} {value})"
            axis.loglog(
                *zip(*found), marker="o", markersize=3, linestyle="-" if name[0] == "ours" else "--", label=label
            )
        if per == "size":
            first = axis.lines[-len(names_in(cases))]
            sides, times = first.get_data()
            linear = [times[0] * (side / sides[0]) ** 2 for side in sides]
            axis.loglog(sides, linear, linestyle=":", color=first.get_color(), label=f"{model}, linear in pixels")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylabel("ms a picture")
    finish_lines(axis, groups, per)


def draw_shares(axis, groups: dict[tuple, list[dict]]) -> None:
    """Attention's shares of the counted operations against the side of a picture."""
    for (model, *_), cases in groups.items():
        for kind, style in (("LSA", ":"), ("GSA", "-")):
            found = [(case["size"], 100 * case["floor"]["shares_of_operations"][kind]) for case in cases]
            if any(share for _, share in found):
                axis.semilogx(*zip(*found), marker="o", markersize=3, linestyle=style, label=f"{model}, {kind}")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("share of the operations, %")
    finish_lines(axis, groups, "size")


def finish_lines(axis, groups: dict[tuple, list[dict]], per: str) -> None:
    ticks = sorted({case[per] for cases in groups.values() for case in cases})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel({"batch": "pictures in a batch", "size": "side of a picture, pixels"}[per])
    axis.legend(frameon=False, fontsize=7)


def published_top1() -> dict[str, tuple[str, float]]:
    """-> the paper's name and the published top-1 of models of gvt.MODEL_NAMES and of other networks of timm, at 224 x
    224.
    """
    names = {key: name for name, key in gvt.MODEL_NAMES.items()}
    found = {}
    for table, key in (("paper", "model"), ("peers", "timm")):
        with open(PUBLISHED / f"{table}.csv", newline="") as file:
            found |= {names.get(row[key], row[key]): (row["name"], float(row["acc1"])) for row in csv.DictReader(file)}
    return found


def points(cases: list[dict], top1: dict[str, tuple[str, float]]) -> list[tuple[str, str, float, float]]:
    """-> (network, mode, pictures per second, top-1) of the first batch at 224, where other networks are measured
    beside ours; else none.
    """
    cases = [
        case
        for case in cases
        if case["task"] == "inference" and case["size"] == 224 and case["batch"] == cases[0]["batch"]
    ]
    rows = [(case["model"], each) for case in cases for each in case["rows"]]
    if not any(each["library"] in top1 for _, each in rows):
        return []
    found = {}
    for model, each in rows:
        own = each["library"] in ("ours", PEER["inference"])
        if (key := model if own else each["library"]) in top1:
            name, accuracy = top1[key]
            found[f"{name} ({each['library']})" if own else name, each["mode"]] = each["pictures_per_s"], accuracy
    return [(*name, *place) for name, place in found.items()]


def draw_accuracy(axis, found: list[tuple[str, str, float, float]]) -> None:
    for mode in dict.fromkeys(mode for _, mode, _, _ in found):
        chosen = [(name, rate, accuracy) for name, own, rate, accuracy in found if own == mode]
        axis.scatter([rate for _, rate, _ in chosen], [accuracy for *_, accuracy in chosen], label=mode)
        for name, rate, accuracy in chosen:
            axis.annotate(name, (rate, accuracy), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axis.set(xlabel="pictures per second", ylabel="published top-1, %")
    axis.margins(0.2)
    axis.legend(frameon=False, fontsize=8)


# ---------------------------------------------------------------- the command line


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    names = list(gvt.MODEL_NAMES)
    paper = [name for name in names if gvt.VARIANTS[gvt.MODEL_NAMES[name]].timm]
    parser.add_argument(
        "--models", nargs="+", choices=names, default=paper, metavar="NAME", help="(the six of the paper)"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="other networks of timm, such as swin_tiny_patch4_window7_224",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=["inference"],
        help="features: four maps, beside mmsegmentation's (inference)",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=["eager", "compiled"],
        help="graphs: compiled, in CUDA graphs (eager compiled)",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=["float32"],
        help="inference: of the weights too, training: autocast (float32)",
    )
    parser.add_argument("--batch-size", nargs="+", type=positive, default=[8], metavar="N", help="(8)")
    parser.add_argument("--size", nargs="+", type=side, default=[224], metavar="PIXELS", help="side of a picture (224)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=("cpu", "cuda"),
        help="(cuda if there is one)",
    )
    parser.add_argument("--threads", type=positive, default=None, metavar="N", help="on a CPU (as many as torch takes)")
    parser.add_argument("--repeats", type=positive, default=30, metavar="N", help="rounds that count (%(default)s)")
    parser.add_argument("--warmup", type=count, default=3, metavar="N", help="rounds before them (%(default)s)")
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="training: measure ours with the MLPs recomputed in the backward pass too",
    )
    parser.add_argument(
        "--no-memory",
        dest="memory",
        action="store_false",
        help="do not measure peak memory, which starts a process for each",
    )
    parser.add_argument("--profile", action="store_true", help="record and print what each network's time goes to")
    parser.add_argument(
        "--least",
        type=above_zero,
        default=None,
        metavar="RATIO",
        help="end with 1 where ours is not so many times as fast",
    )
    parser.add_argument(
        "--output", type=Path, default=None, metavar="FOLDER", help="write results.json, results.csv and figures there"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")
    return check_args(parser.parse_args(argv))


def check_args(args: argparse.Namespace) -> argparse.Namespace:
    for name in args.peers:
        if not timm.is_model(name):
            raise UserError(f"unknown model (--peers {name}): expected a name of timm.list_models()")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"no CUDA device (--device cuda, torch {torch.__version__}): write --device cpu, or leave it away"
        )
    if args.device == "cpu" and "graphs" in args.modes:
        raise UserError("CUDA graphs without CUDA (--modes graphs): leave it away, or take a machine with a GPU")
    if args.device == "cpu" and "float16" in args.dtype:
        raise UserError("float16 is for GPUs (--dtype float16, --device cpu): take bfloat16")
    if (
        args.device == "cuda"
        and "bfloat16" in args.dtype
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UserError(f"no bfloat16 (--dtype bfloat16, {torch.cuda.get_device_name()}): take float16")
    if args.recompute and "training" not in args.tasks:
        raise UserError(
            "nothing is recomputed without a backward pass (--recompute): add --tasks training, or leave it away"
        )
    if "features" in args.tasks:
        if "alt_gvt_demo" in args.models:
            raise UserError("not in mmsegmentation (--tasks features --models alt_gvt_demo): take another model")
        libraries_of_features()
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = describe(args)
    cases = [Case(*each) for each in itertools.product(args.models, args.tasks, args.dtype, args.batch_size, args.size)]
    for number, case in enumerate(cases, start=1):
        progress(f"case {number} of {len(cases)}: {case}")
        results["cases"].append(measure(case, args))
        if args.output:
            write(results, args.output)
        if not args.json:
            print(f"{case}\n{as_table(results['cases'][-1])}\n", flush=True)
    if args.json:
        print(json.dumps(results, indent=1))
    slow = [
        f"{case['model']} {case['task']} {case['dtype']} {each['mode']}: {each['median']:.3f} x {each['library']}"
        for case in results["cases"]
        for each in case["ratios"]
        if args.least
        and each["ours"] == each["mode"]
        and each["library"] in PEER.values()
        and each["median"] < args.least
    ]
    if slow:
        print(f"benchmark.py: too slow (--least {args.least:g}): {'; '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


def run(argv: list[str]) -> int:
    return exit_code("benchmark.py", main, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
