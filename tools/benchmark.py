"""Time Twins beside other implementations and networks: python -m tools.benchmark [--models NAME ...] [--tasks ...].

One run measures in turns, so that whatever else the machine does affects all alike: our model; timm's model of the same
weights, or mmsegmentation's backbone (--tasks features); other networks (--peers); and a large GEMM, the machine's peak
rate. Before anything is timed, all that hold the same weights must give the same logits, maps or gradients. A ratio is
the median of the rounds' ratios, above 1 where ours is faster.

What is compared with the peak rate is counted, not measured: the operations of convolutions and matrix products,
attention's included, two per multiply-add; a training step has its backward pass too. python -m tools.figures draws
from the results.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import gvt

# isort: split
import timm
import torch
import torch.nn.functional as F
from timm.models.twins import Twins as TimmTwins
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dense import libraries
from gvt_ops import accelerate, onednn
from tools.count import FlopCounterMode, conv_flop_count, side
from tools.measurement import columns, environment, progress, quartiles, run_rounds, seconds, text_table, write_record
from tools.readme_tables import MODES, percentages, same_mode
from training import checkpoint, formats
from training.errors import UserError, exit_code
from training.options import Parser, above_zero, count, positive

TASKS = ("inference", "training", "features")
DTYPES = ("float32", "bfloat16", "float16")
SAME_WEIGHTS = {"inference": "timm", "training": "timm", "features": "mmseg"}
RECOMPUTED = "MLP recomputed"  # ours, with less memory
GEMM = "GEMM"
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
REFERENCE_CHUNK = 8  # images of the float64 reference at once
SMALLEST_SHARE = 0.01  # of an operator in a profile
TOLERANCE = 2  # times the rounding error of plain PyTorch in the same dtype
LOSS_SCALE = {"float16": 1024.0}

Name = tuple[str, str]  # a library or network, and a mode


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured in turns: a model of gvt.MODEL_NAMES, a task, a dtype, a batch of size x size images."""

    model: str
    task: str
    dtype: str
    batch: int
    size: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def autocast(self) -> bool:
        return self.task == "training" and self.dtype in ("bfloat16", "float16")

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.autocast else self.torch_dtype

    def __str__(self) -> str:
        return f"{self.model} {self.task} {self.dtype} {self.batch} x {self.size} x {self.size}"


# ---------------------------------------------------------------- networks


def build(case: Case, library: str, device: torch.device) -> nn.Module:
    """Build "ours", RECOMPUTED, "timm", "mmseg", all with the same weights, or another network of timm by its name."""
    if library in ("ours", RECOMPUTED):
        model = build_ours(case)
        if library == RECOMPUTED:
            model.set_grad_checkpointing(part="mlp")
    elif library in SAME_WEIGHTS.values():
        model = build_peer(case, library)
    else:
        torch.manual_seed(0)
        fixed = timm.get_pretrained_cfg(library).fixed_input_size
        model = timm.create_model(library, **(dict(img_size=case.size) if fixed else {}))
    return model.to(device, case.weight_dtype).train(case.task == "training")


def build_ours(case: Case) -> nn.Module:
    """Build with seeded weights, and pad windows at a map's edge as the other library does."""
    torch.manual_seed(0)
    if case.task == "features":
        libraries.load("mmseg")
        from dense.backbone import TwinsBackbone

        model = TwinsBackbone(gvt.MODEL_NAMES[case.model], drop_path_rate=0.0, pad="published")
    else:
        model = timm.create_model(case.model, pad="zero")
    with torch.no_grad():
        # Biases and norms are neither all 0 nor all 1: each must find its place in the other library.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.02 * torch.randn_like(parameter)
    return accelerate(model)


def build_peer(case: Case, library: str) -> nn.Module:
    """Build timm's or mmsegmentation's network with our weights, and the official eps of each norm."""
    v = gvt.VARIANTS[gvt.MODEL_NAMES[case.model]]
    shape = {name: list(getattr(v, name)) for name in ("mlp_ratios", "depths", "sr_ratios")}
    shape |= dict(embed_dims=list(v.dims), num_heads=list(v.heads))
    windows = None if v.window is None else [v.window] * len(v.dims)
    if library == "timm":
        model = TimmTwins(img_size=case.size, wss=windows, **shape)
    else:
        libraries.load("mmseg")
        from mmseg.models import backbones

        # The option is spelled so there.
        own = dict(norm_after_stage=False) if windows is None else dict(norm_after_stage=True, windiow_sizes=windows)
        model = (backbones.PCPVT if windows is None else backbones.SVT)(qkv_bias=True, **own, **shape)
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5 if "patch_embeds" in name or name.endswith("attn.norm") else 1e-6
    state, _, _ = formats.from_official(build_ours(case).state_dict(), library, source=case.model)
    checkpoint.load_into(model, state, source=case.model)
    return model


# ---------------------------------------------------------------- what is run, and what comes out


class Runner:
    """A network on a batch: step() is what is timed, outputs() what must be equal."""

    def __init__(self, case: Case, module: nn.Module, mode: str, device: torch.device):
        self.case, self.module = case, module
        torch.manual_seed(1)
        self.images = torch.randn(case.batch, 3, case.size, case.size).to(device, case.weight_dtype)
        self.targets = torch.randint(1000, (case.batch,)).to(device)
        options = dict(fullgraph=True, dynamic=False, mode="reduce-overhead" if mode == "graphs" else None)
        self.model = module if mode == "eager" else torch.compile(module, **options)
        if case.task == "training":
            self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
            self.scaler = torch.amp.GradScaler(device.type, enabled=case.dtype == "float16")

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=self.case.torch_dtype, enabled=self.case.autocast):
            return F.cross_entropy(self.model(images), targets)

    def step(self) -> None:
        if self.case.task != "training":
            with torch.inference_mode():
                self.model(self.images)
            return
        self.scaler.scale(self.loss(self.images, self.targets)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def outputs(self, chunk: int | None = None) -> Tensor:
        """Return logits, maps or gradients as one float64 vector. chunk: images at once (all)."""
        parts = [part.split(chunk or self.case.batch) for part in (self.images, self.targets)]
        if self.case.task == "training":
            return self.gradients(zip(*parts))
        with torch.inference_mode():
            results = [self.model(images) for images in parts[0]]
        tensors = [part for result in results for part in ([result] if isinstance(result, Tensor) else result)]
        return torch.cat([tensor.flatten() for tensor in tensors]).double()

    def gradients(self, batches) -> Tensor:
        """Return the gradients of the mean loss over all batches, parameters sorted by name."""
        scale = LOSS_SCALE.get(self.case.dtype, 1.0)
        for images, targets in batches:
            (scale * self.loss(images, targets) * len(images) / self.case.batch).backward()
        parameters = [parameter for _, parameter in sorted(self.module.named_parameters())]
        gradients = torch.cat([parameter.grad.flatten() for parameter in parameters]).double() / scale
        self.module.zero_grad(set_to_none=True)
        return gradients


def reference(case: Case, device: torch.device) -> tuple[Tensor, float]:
    """Return the outputs in float64, and the root mean square error of plain PyTorch in the case's dtype."""
    outputs = []
    for each in (dataclasses.replace(case, dtype="float64"), case):
        runner = Runner(each, build(each, "ours", device), "eager", device)
        accelerate(runner.module, enable=False).set_fused_attn(False)
        outputs.append(runner.outputs(REFERENCE_CHUNK))
    exact, plain = outputs
    return exact, rms(plain - exact)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def check_outputs(case: Case, runners: dict[Name, Runner], device: torch.device) -> dict:
    """Return the errors of all that hold our weights; raise UserError if one is above TOLERANCE times plain PyTorch's.

    An error is the root mean square of the differences from the outputs in float64.
    """
    exact, plain_error = reference(case, device)
    same = ("ours", RECOMPUTED, SAME_WEIGHTS[case.task])
    errors = {" ".join(name): rms(runner.outputs() - exact) for name, runner in runners.items() if name[0] in same}
    for name, error in errors.items():
        # Not `>`: the error of NaN is NaN.
        if not error <= TOLERANCE * plain_error:
            off = f"off by {error:.3g}, expected at most {TOLERANCE} x {plain_error:.3g}, the error of the dtype itself"
            raise UserError(f"outputs differ ({name}, {case}): {off}; nothing was timed")
    return {"rms_of_outputs": rms(exact), "rms_error_of_dtype": plain_error, "rms_error": errors}


# ---------------------------------------------------------------- time and memory


def peak_steps(dtype: torch.dtype, device: torch.device) -> dict[Name, Callable[[], object]]:
    """Return what the machine's peak rate is measured with: GEMMs of both CPU libraries."""
    a, b, out = (torch.randn(2 * [GEMM_SIDE[device.type]], device=device).to(dtype) for _ in range(3))
    steps = {(GEMM, "mm"): lambda: torch.mm(a, b, out=out)}
    if onednn.unsupported_reason(a, b) is None:
        steps[GEMM, "oneDNN"] = lambda: onednn.linear(a, b)
    return steps


def resident_mb(key: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def peak_memory(case: Case, name: Name, device: torch.device, threads: int) -> dict[str, float]:
    """Return the MB at the peak of two steps (peak_mb) and before them (rest_mb: network, batch, optimizer).

    For a process of its own. CUDA: of torch's allocator. Linux: resident memory of the whole process, Python and
    libraries included. Elsewhere nothing is returned.
    """
    torch.set_num_threads(threads)
    library, mode = name
    runner = Runner(case, build(case, library, device), mode, device)
    for _ in range(2):
        seconds(runner.step, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated() / 2**20
    elif sys.platform == "linux":
        # Resets the peak.
        Path("/proc/self/clear_refs").write_text("5")
        rest = resident_mb("VmRSS")
    else:
        return {}
    for _ in range(2):
        seconds(runner.step, device)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident_mb("VmHWM")
    # The kernel updates a peak late, and in steps of many pages.
    return {"peak_mb": max(peak, rest), "rest_mb": rest}


def memory_of(case: Case, name: Name, device: torch.device) -> dict[str, float]:
    progress(f"  memory of {' '.join(name)}")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(peak_memory, case, name, device, torch.get_num_threads()).result()


def operators(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return the share of a step's time that each operator takes, without those that it calls; the largest first."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as trace:
        for _ in range(3):
            step()
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    spent = {event.key: getattr(event, attribute) for event in trace.key_averages()}
    shares = {name: spent[name] / sum(spent.values()) for name in sorted(spent, key=spent.get, reverse=True)}
    return {name: share for name, share in shares.items() if share >= SMALLEST_SHARE}


# ---------------------------------------------------------------- counted operations


def count_step(case: Case) -> dict:
    """Return the operations of a step, as this file's docstring defines them, and attention's shares."""
    training = case.task == "training"
    with torch.device("meta"):
        # The plain classifier pads windows in the way that takes the fewest operations.
        model = build_ours(case) if case.task == "features" else timm.create_model(case.model)
        images, targets = torch.empty(case.batch, 3, case.size, case.size), torch.empty(case.batch, dtype=torch.long)
    # Unfused, attention's products are visible to the counter.
    model.set_fused_attn(False)
    mapping = {torch.ops.aten.convolution_backward: convolution_backward_operations}
    with torch.set_grad_enabled(training), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        out = model(images)
        shares = attention_shares(model, counter)
        if training:
            F.cross_entropy(out, targets).backward()
    return {"operations": counter.get_total_flops(), "shares_of_operations": shares}


def attention_shares(model: nn.Module, counter: FlopCounterMode) -> dict[str, float]:
    """Return the shares of the counted operations in LSA and GSA, projections and sub-sampling included."""
    counts, inside = counter.get_flop_counts(), {"LSA": 0, "GSA": 0}
    for path, module in model.named_modules():
        if isinstance(module, (gvt.LocalAttention, gvt.GlobalAttention)):
            kind = "LSA" if isinstance(module, gvt.LocalAttention) else "GSA"
            inside[kind] += sum(counts[f"{type(model).__name__}.{path}"].values())
    return {kind: operations / counter.get_total_flops() for kind, operations in inside.items()}


def convolution_backward_operations(grad, x, weight, *others, out_shape) -> int:
    """Count a convolution's backward pass; torch's counter takes one with groups for one without."""
    wanted = others[-1]
    return sum(wanted[:2]) * conv_flop_count(x, weight, grad, transposed=False)


# ---------------------------------------------------------------- a case: what is measured, and what is written


def measure(case: Case, args: argparse.Namespace) -> dict:
    """Return the record of a case: peak rate, counts, a row for each network and mode, ratios."""
    device = torch.device(args.device)
    torch.compiler.reset()
    progress("  building")
    names = ["ours", SAME_WEIGHTS[case.task], *(args.peers if case.task != "features" else ())]
    if args.recompute and case.task == "training":
        names.append(RECOMPUTED)
    modules = {library: build(case, library, device) for library in names}
    runners = {(each, mode): Runner(case, modules[each], mode, device) for mode in args.modes for each in names}
    progress("  compiling, comparing outputs" if set(args.modes) - {"eager"} else "  comparing outputs")
    agreement = check_outputs(case, runners, device)
    steps = {name: runner.step for name, runner in runners.items()} | peak_steps(case.torch_dtype, device)
    timed = {name: lambda _, step=step: seconds(step, device) for name, step in steps.items()}
    times = run_rounds(timed, repeats=args.repeats, warmup=args.warmup)
    rates = {by: 2 * GEMM_SIDE[device.type] ** 3 / median(times[GEMM, by]) for what, by in steps if what == GEMM}
    counts, peak = count_step(case), max(rates.values())
    least = counts["operations"] / peak
    rows = [row(name, case, times[name], least) for name in runners]
    for found, (name, runner) in zip(rows, runners.items()):
        if args.profile:
            found["operators"] = operators(runner.step, device)
        if args.memory:
            found |= memory_of(case, name, device)
    return dataclasses.asdict(case) | {
        "limits": {"operations_per_s": peak, "operations_per_s_by": rates},
        "floor": counts | {"operations_s": least},
        "outputs": agreement,
        "rows": rows,
        "ratios": ratios({name: times[name] for name in runners}),
    }


def row(name: Name, case: Case, times: list[float], least: float) -> dict:
    """least: seconds of the counted operations at the peak rate."""
    library, mode = name
    found = {"library": library, "mode": mode, "seconds": quartiles(times)}
    found["pictures_per_s"] = case.batch / median(times)
    # The counts are those of our network.
    if library in ("ours", RECOMPUTED, *SAME_WEIGHTS.values()):
        found["share_of_product_rate"] = least / median(times)
    return found | {"rounds_s": [round(each, 7) for each in times]}


def ratios(times: dict[Name, list[float]]) -> list[dict]:
    """Compare ours with each other network, mode for mode, and in its fastest mode with the other's eager."""
    ours = {mode: spent for (library, mode), spent in times.items() if library == "ours"}
    others = [name for name in times if name[0] != "ours"]
    fastest = min(ours, key=lambda mode: median(ours[mode]))
    pairs = [(mode, (library, mode)) for library, mode in others]
    pairs += [(fastest, (library, mode)) for library, mode in others if mode == "eager" != fastest]
    names = [{"ours": mine, "library": library, "mode": mode} for mine, (library, mode) in pairs]
    rounds = [[b / a for a, b in zip(ours[mine], times[other])] for mine, other in pairs]
    return [name | quartiles(values) for name, values in zip(names, rounds)]


FIGURES = ("pictures_per_s", "ours_faster", "share_of_product_rate", "peak_mb", "rest_mb")


def flat(results: dict) -> list[dict[str, str]]:
    """Return a row for each network and mode of each case, as text. ours_faster compares the same mode."""
    rows = []
    for case in results["cases"]:
        faster = same_mode(case)
        for found in case["rows"]:
            names = {key: str(case[key]) for key in ("model", "task", "dtype", "batch", "size")}
            names |= {key: found[key] for key in ("library", "mode")}
            figures = found | {"ours_faster": faster.get((found["library"], found["mode"]))}
            texts = {key: "" if figures.get(key) is None else f"{figures[key]:.4g}" for key in FIGURES}
            rows.append(names | columns("ms", found["seconds"], 1000) | texts)
    return rows


def as_text(case: dict) -> str:
    shown = ("ms", "ms_q1", "ms_q3", *FIGURES[:-1])
    rows = flat({"cases": [case]})
    table = [{"": f"{row['library']} {row['mode']}"} | {key: row[key] for key in shown} for row in rows]
    lines = [text_table(table)]
    for each in case["ratios"]:
        if each["ours"] != each["mode"]:
            spread = f"{each['median']:.3f} ({each['q1']:.3f} - {each['q3']:.3f})"
            lines.append(f"ours {each['ours']} against {each['library']} {each['mode']}: {spread}")
    for found in case["rows"]:
        if "operators" in found:
            shares = {name.rsplit("::")[-1]: share for name, share in found["operators"].items()}
            lines.append(f"{found['library']} {found['mode']}: {percentages(shares)}")
    rates = case["limits"]["operations_per_s_by"].items()
    lines.append(f"peak rates: {', '.join(f'{GEMM} by {name} {rate / 1e9:,.0f} GFLOP/s' for name, rate in rates)}")
    operations = f"{case['floor']['operations'] / case['batch'] / 1e9:,.2f} G an image"
    lines.append(f"operations: {operations}; of the forward pass {percentages(case['floor']['shares_of_operations'])}")
    return "\n".join(lines)


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="benchmark.py", description=__doc__.splitlines()[0])
    add, names = parser.add_argument, list(gvt.MODEL_NAMES)
    paper = [name for name in names if gvt.VARIANTS[gvt.MODEL_NAMES[name]].timm]
    add("--models", nargs="+", choices=names, default=paper, metavar="NAME", help="(the six of the paper)")
    add("--peers", nargs="+", default=[], metavar="NAME", help="other networks, by timm's names")
    add("--tasks", nargs="+", choices=TASKS, default=["inference"], help="features: four maps (inference)")
    add("--modes", nargs="+", choices=MODES, default=["eager", "compiled"], help="graphs: CUDA's (eager compiled)")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="training: of autocast (float32)")
    add("--batch-size", nargs="+", type=positive, default=[8], metavar="N", help="(8)")
    add("--size", nargs="+", type=side, default=[224], metavar="PIXELS", help="side of an image (224)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, choices=("cpu", "cuda"), help="(cuda if there is one)")
    add("--threads", type=positive, metavar="N", help="on a CPU (torch's default)")
    add("--repeats", type=positive, default=30, metavar="N", help="timed rounds (%(default)s)")
    add("--warmup", type=count, default=3, metavar="N", help="rounds before them (%(default)s)")
    add("--recompute", action="store_true", help="training: ours with recomputed MLPs too")
    add("--no-memory", dest="memory", action="store_false", help="no peak memory, which takes a process for each")
    add("--profile", action="store_true", help="record and print what each network's time goes to")
    add("--least", type=above_zero, default=0.0, metavar="RATIO", help="exit with 1 if a ratio is lower")
    add("--output", type=Path, metavar="FOLDER", help="write results.json and results.csv there")
    add("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    for name in args.peers:
        if not timm.is_model(name):
            raise UserError(f"unknown model (--peers {name}): expected a name of timm.list_models()")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"no CUDA device (--device cuda, torch {torch.__version__}): pass --device cpu, or omit it")
    if args.device == "cpu" and "graphs" in args.modes:
        raise UserError("CUDA graphs without CUDA (--modes graphs): omit it, or use a machine with a GPU")
    if args.device == "cpu" and "float16" in args.dtype:
        raise UserError("float16 is for GPUs (--dtype float16, --device cpu): use bfloat16")
    old = args.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if old and "bfloat16" in args.dtype:
        raise UserError(f"no bfloat16 (--dtype bfloat16, {torch.cuda.get_device_name()}): use float16")
    if args.recompute and "training" not in args.tasks:
        raise UserError("nothing to recompute without a backward pass (--recompute): add --tasks training, or omit it")
    if "features" in args.tasks:
        if "alt_gvt_demo" in args.models:
            raise UserError("not in mmsegmentation (--tasks features --models alt_gvt_demo): use another model")
        libraries.load("mmseg")


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    settings = {"repeats": args.repeats, "warmup": args.warmup, "matrices": GEMM_SIDE[device.type]}
    results = {"environment": environment(device), "settings": settings, "cases": []}
    cases = [Case(*each) for each in itertools.product(args.models, args.tasks, args.dtype, args.batch_size, args.size)]
    for number, case in enumerate(cases, start=1):
        progress(f"case {number} of {len(cases)}: {case}")
        results["cases"].append(measure(case, args))
        if args.output:
            write_record(args.output, "results", results, flat(results))
        if not args.json:
            print(f"{case}\n{as_text(results['cases'][-1])}\n", flush=True)
    if args.json:
        print(json.dumps(results, indent=1))
    slow = [
        f"{case['model']} {case['task']} {case['dtype']} {mode}: {ratio:.3f} x {library}"
        for case in results["cases"]
        for (library, mode), ratio in same_mode(case).items()
        if library in SAME_WEIGHTS.values() and ratio < args.least
    ]
    if slow:
        print(f"benchmark.py: too slow (--least {args.least:g}): {'; '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(exit_code("benchmark.py", main, sys.argv[1:]))
