"""Time Twins beside other implementations and networks: python -m tools.benchmark [--models NAME ...] [--tasks ...].

One run measures in turns, so that whatever else the machine does affects all alike: our model; timm's model of the same
weights, or mmsegmentation's backbone (--tasks features); other networks (--peers); each in the modes of --modes, which
tools/contenders.py describes; and a large GEMM, the machine's peak rate. Each has a process of its own, which sleeps
while another is timed. Before anything is timed, all that hold the same weights must give the same logits, maps or
gradients. What cannot run is a row that says why. A ratio is the median of the rounds' ratios, above 1 where ours is
faster.

What is compared with the peak rate is counted, not measured: the operations of convolutions and matrix products,
attention's included, two per multiply-add; a training step has its backward pass too. python -m tools.figures draws
from the results.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import gvt

# isort: split
import timm
import torch
import torch.nn.functional as F
from torch import nn

from dense import libraries
from tools.contenders import GEMM, GEMM_SIDE, RECOMPUTED, REFERENCE, RUNTIMES, SAME_WEIGHTS, Case, Name, build_ours
from tools.count import FlopCounterMode, conv_flop_count, side
from tools.measurement import columns, environment, progress, quartiles, run_rounds, text_table, write_record
from tools.readme_tables import MODES, percentages, same_mode
from tools.turns import Contender
from training.errors import UserError, exit_code
from training.options import Parser, above_zero, count, positive

TASKS = ("inference", "training", "features")
DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = 2  # times the rounding error of plain PyTorch in the same dtype
STEPS = {"cpu": 1, "cuda": 5}  # of a round
# Variables of the environment that change what is measured.
SWITCHES = (
    "TWINS_ACCELERATE",
    "TWINS_WINDOW_KERNEL",
    "TORCHINDUCTOR_LAYOUT_OPTIMIZATION",
    "TORCH_CUDNN_SDPA_DEPRIORITIZED",
)


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
    device, peer = torch.device(args.device), SAME_WEIGHTS[case.task]
    libraries = ["ours", peer, *(args.peers if case.task != "features" else ())]
    if args.recompute and case.task == "training":
        libraries.append(RECOMPUTED)
    names = [(library, mode) for mode in args.modes for library in libraries]
    with contextlib.ExitStack() as stack:
        start = {
            name: stack.enter_context(Contender(case, name, device))
            for name in [*names, (GEMM, "mm"), (GEMM, "oneDNN"), (REFERENCE, "float64")]
        }
        agreement = check_outputs(case, start)
        timed = {name: lambda _, each=each: each.ask("time", args.steps) for name, each in start.items()}
        times = run_rounds(timed, repeats=args.repeats, warmup=args.warmup)
        times = {name: spent for name, spent in times.items() if start[name].failed is None}
        facts = {}
        for name in names:
            progress(f"  facts of {' '.join(name)}")
            facts[name] = start[name].ask("facts", memory=args.memory, profiled=args.profile)
            if facts[name] is None:
                facts[name] = {"facts_failed": start[name].failed} if name in times else {}
    rates = {by: 2 * GEMM_SIDE[device.type] ** 3 / median(spent) for (what, by), spent in times.items() if what == GEMM}
    if not rates:
        raise UserError(f"no peak rate ({case}): {start[GEMM, 'mm'].failed}")
    counts, peak = count_step(case), max(rates.values())
    least = counts["operations"] / peak
    found = {name: times[name] for name in names if name in times}
    return dataclasses.asdict(case) | {
        "limits": {"operations_per_s": peak, "operations_per_s_by": rates},
        "floor": counts | {"operations_s": least},
        "outputs": agreement,
        "rows": [row(name, case, times.get(name), least, start[name].failed) | facts[name] for name in names],
        "ratios": ratios(found),
        "comparisons": comparisons(found, peer),
        "fastest": {library: name[1] for library in libraries if (name := best(found, library, MODES))},
    }


def check_outputs(case: Case, contenders: dict[Name, Contender]) -> dict:
    """Have all run once; return the errors of those that hold our weights. The reference ends.

    An error is the root mean square of the differences from the outputs in float64. Beyond TOLERANCE times plain
    PyTorch's, another runtime has failed, and PyTorch's modes raise UserError.
    """
    reference, same, errors = contenders.pop((REFERENCE, "float64")), ("ours", RECOMPUTED, SAME_WEIGHTS[case.task]), {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "reference.npy"
        progress("  reference in float64")
        size, plain_error = reference.ask("save", path) or (None, None)
        if size is None:
            raise UserError(f"no reference ({case}): {reference.failed}")
        reference.close()
        for name, contender in contenders.items():
            if name[0] == GEMM:
                continue
            progress(f"  {' '.join(name)}")
            error = contender.ask("error", path if name[0] in same else None)
            if contender.failed is not None:
                progress(f"  {' '.join(name)} failed: {contender.failed}")
            elif name[0] in same:
                errors[" ".join(name)] = error
                # Not `>`: the error of NaN is NaN.
                if not error <= TOLERANCE * plain_error:
                    refuse(case, contender, f"off by {error:.3g}, expected at most {TOLERANCE} x {plain_error:.3g}")
    return {"rms_of_outputs": size, "rms_error_of_dtype": plain_error, "rms_error": errors}


def refuse(case: Case, contender: Contender, off: str) -> None:
    off += ", the error of the dtype itself"
    if contender.name[1] not in RUNTIMES:
        raise UserError(f"outputs differ ({' '.join(contender.name)}, {case}): {off}; nothing was timed")
    contender.fail(f"outputs differ: {off}")
    progress(f"  {' '.join(contender.name)} failed: {contender.failed}")


def row(name: Name, case: Case, times: list[float] | None, least: float, failed: str | None) -> dict:
    """times: of the rounds, None if it failed. least: seconds of the counted operations at the peak rate."""
    library, mode = name
    found = {"library": library, "mode": mode}
    if times is None:
        return found | {"failed": failed}
    found |= {"seconds": quartiles(times), "pictures_per_s": case.batch / median(times)}
    # The counts are those of our network.
    if library in ("ours", RECOMPUTED, *SAME_WEIGHTS.values()):
        found["share_of_product_rate"] = least / median(times)
    return found | {"rounds_s": [round(each, 7) for each in times]}


def ratios(times: dict[Name, list[float]]) -> list[dict]:
    """Compare ours with each other network, mode for mode, and in its fastest mode with the other's eager."""
    ours = [name for name in times if name[0] == "ours"]
    others = [name for name in times if name[0] != "ours"]
    fastest = best(times, "ours", MODES)
    pairs = [(("ours", mode), (library, mode)) for library, mode in others if ("ours", mode) in ours]
    pairs += [(fastest, other) for other in others if other[1] == "eager" and ours and fastest[1] != "eager"]
    return [compare(times, *pair) for pair in pairs]


def comparisons(times: dict[Name, list[float]], peer: str) -> list[dict]:
    """Compare the best of ours with the best of the library of the same weights: where several modes of PyTorch ran in
    those ("PyTorch"), and all of ours with OpenVINO on its model ("all").
    """
    pytorch = [mode for mode in MODES if mode not in RUNTIMES]
    several = len({mode for _, mode in times} & set(pytorch)) > 1
    found = []
    if several and (mine := best(times, "ours", pytorch)) and (other := best(times, peer, pytorch)):
        found.append({"of": "PyTorch"} | compare(times, mine, other))
    if (peer, "openvino") in times and (mine := best(times, "ours", MODES)):
        found.append({"of": "all"} | compare(times, mine, (peer, "openvino")))
    return found


def best(times: dict[Name, list[float]], library: str, modes: tuple[str, ...] | list[str]) -> Name | None:
    names = [name for name in times if name[0] == library and name[1] in modes]
    return min(names, key=lambda name: median(times[name]), default=None)


def compare(times: dict[Name, list[float]], mine: Name, other: Name) -> dict:
    rounds = [b / a for a, b in zip(times[mine], times[other])]
    return {"ours": mine[1], "library": other[0], "mode": other[1]} | quartiles(rounds)


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
            texts["failed"] = found.get("failed", "")
            rows.append(names | columns("ms", found.get("seconds"), 1000) | texts)
    return rows


def as_text(case: dict) -> str:
    shown = ("ms", "ms_q1", "ms_q3", *FIGURES[:-1])
    rows = flat({"cases": [case]})
    table = [{"": f"{row['library']} {row['mode']}"} | {key: row[key] for key in shown} for row in rows]
    lines = [text_table(table)]
    lines += [f"{row['library']} {row['mode']} failed: {row['failed']}" for row in rows if row["failed"]]
    for each in [*(ratio for ratio in case["ratios"] if ratio["ours"] != ratio["mode"]), *case["comparisons"]]:
        spread = f"{each['median']:.3f} ({each['q1']:.3f} - {each['q3']:.3f})"
        of = {"PyTorch": "best of PyTorch: ", "all": "best of all: "}.get(each.get("of"), "")
        lines.append(f"{of}ours {each['ours']} against {each['library']} {each['mode']}: {spread}")
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
    add(
        "--modes",
        nargs="+",
        choices=MODES,
        default=["eager", "compiled"],
        help=f"of {', '.join(MODES)} (eager compiled)",
    )
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="training: of autocast (float32)")
    add("--batch-size", nargs="+", type=positive, default=[8], metavar="N", help="(8)")
    add("--size", nargs="+", type=side, default=[224], metavar="PIXELS", help="side of an image (224)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, choices=("cpu", "cuda"), help="(cuda if there is one)")
    add("--threads", type=positive, metavar="N", help="on a CPU (torch's default)")
    add("--repeats", type=positive, default=30, metavar="N", help="timed rounds (%(default)s)")
    add("--warmup", type=count, default=3, metavar="N", help="rounds before them (%(default)s)")
    add("--steps", type=positive, metavar="N", help="of a round, of which the mean is taken (1, on a GPU 5)")
    add("--recompute", action="store_true", help="training: ours with recomputed MLPs too")
    add("--no-memory", dest="memory", action="store_false", help="no peak memory")
    add("--profile", action="store_true", help="record and print what each network's time goes to")
    add("--least", type=above_zero, default=0.0, metavar="RATIO", help="exit with 1 if a ratio is lower")
    add("--output", type=Path, metavar="FOLDER", help="write results.json and results.csv there")
    add("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    args.steps = args.steps or STEPS[args.device]
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
    for mode in args.modes:
        if mode in RUNTIMES and args.tasks != ["inference"]:
            raise UserError(f"for inference only (--modes {mode}): pass --tasks inference")
        if mode in RUNTIMES and args.device == "cuda":
            raise UserError(f"for CPUs here (--modes {mode} --device cuda): pass --device cpu, or omit it")
        if mode == "freezing" and "training" in args.tasks:
            raise UserError("weights that are constants do not train (--modes freezing): omit --tasks training")
    if args.recompute and "training" not in args.tasks:
        raise UserError("nothing to recompute without a backward pass (--recompute): add --tasks training, or omit it")
    if "features" in args.tasks:
        if "alt_gvt_demo" in args.models:
            raise UserError("not in mmsegmentation (--tasks features --models alt_gvt_demo): use another model")
        libraries.load("mmseg")


def too_slow(cases: list[dict], least: float) -> list[str]:
    """Return a text for each mode in which ours is below the bound, or failed where there is one."""
    found = []
    for case in cases:
        name = f"{case['model']} {case['task']} {case['dtype']}"
        for (library, mode), ratio in same_mode(case).items():
            if library in SAME_WEIGHTS.values() and ratio < least:
                found.append(f"{name} {mode}: {ratio:.3f} x {library}")
        failed = [row["mode"] for row in case["rows"] if row["library"] == "ours" and "failed" in row]
        found += [f"{name} {mode}: failed" for mode in failed if least]
    return found


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    settings = {"repeats": args.repeats, "warmup": args.warmup, "steps": args.steps}
    settings["matrices"] = GEMM_SIDE[device.type]
    settings["switches"] = {name: os.environ[name] for name in SWITCHES if name in os.environ}
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
    slow = too_slow(results["cases"], args.least)
    if slow:
        print(f"benchmark.py: too slow (--least {args.least:g}): {'; '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(exit_code("benchmark.py", main, sys.argv[1:]))
