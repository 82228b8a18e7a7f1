"""Write the tables of the Markdown pages from the models and logs/: python -m tools.readme_tables [--check] [--readme
FILE ...].

The lines between two markers are replaced. After `speed` may stand records of logs/benchmarks, by a folder's name or by
the end of it, which means the newest such folder; `speed` alone shows all records:

    <!-- table: classification (python -m tools.readme_tables) -->
    <!-- end table -->

--check writes nothing, and exits with 1 if a table is out of date.
"""

import itertools
import json
import os
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import gvt
from tools import ablation_results
from tools.count import count, dense_model
from tools.measurement import read_csv
from tools.plot_logs import KEYS, ROOT, published_logs, read_log
from training import files
from training.errors import UserError, exit_code
from training.options import Parser, get_parser

LOGS = ROOT / "logs"
GPUS = 8  # of the official commands
PAGES = ("README.md", "docs/*.md", "segmentation/README.md", "detection/README.md", "logs/**/README.md")
START = re.compile(r"<!-- table: (\w+|speed(?: [\w-]+)+) \(python -m tools\.readme_tables\) -->")
END = "<!-- end table -->"
REGISTERED = {key: name for name, key in gvt.MODEL_NAMES.items()}
FLOPS = "FLOPs (G), with / without attention matmuls"
SIZES = f"{FLOPS} | FLOPs, paper | #params (M) | #params, paper"
DRIVE = "https://drive.google.com/file/d/{}/view"


# ---------------------------------------------------------------- the tables; links are relative to the root


def markdown(header: str | Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a table. `header` holds the names of its columns, or is a text with | between them."""
    columns, rows = header.split(" | ") if isinstance(header, str) else list(header), list(rows)
    if not rows:
        return ["none yet"]
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def read_json(path: Path, *keys: str) -> dict:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({path}): restore the recorded file") from error
    lacking = [key for key in keys if key not in record]
    if lacking:
        raise UserError(f"no {', '.join(lacking)} ({path}): restore the recorded file")
    return record


def paper() -> list[dict[str, str]]:
    """Return a row for each model of the paper; logs/README.md describes the columns."""
    return read_csv(LOGS / "published" / "paper.csv")


def best(log: list[dict]) -> str:
    epoch = max(log, key=lambda epoch: epoch["test_acc1"])
    return f"{epoch['test_acc1']:.2f} ({epoch['epoch']:.0f})"


def classification() -> list[str]:
    logs, rows = published_logs(), []
    for row in paper():
        name = REGISTERED[row["model"]]
        counts = count(name)
        flops = f"{counts['gmacs']:.1f} / {counts['gmacs_without_attention']:.1f}"
        url = f"[{row['model']}.pth]({DRIVE.format(row['drive_id'])})"
        log = f"[{best(logs[row['log']])}](logs/published/classification.csv)"
        rows.append((row["name"], f"`{name}`", row["acc1"], flops, f"{counts['params'] / 1e6:.1f}", url, log))
    return markdown(f"Name | Alias in this code | Acc@1 | {FLOPS} | #params (M) | URL | Log: best Acc@1 (epoch)", rows)


def recipe(row: dict[str, str]) -> tuple[str, int, list[str], str]:
    """Return name, batch per GPU, [global batch, warm-up epochs, drop path, peak rate] and command of a model's recipe.

    The rate and the command follow from main.py's defaults.
    """
    default, name, batch = get_parser().get_default, REGISTERED[row["model"]], int(row["global_batch"])
    command = (
        f"python -m torch.distributed.launch --nproc_per_node={GPUS} --use_env main.py --model {name} "
        f"--batch-size {batch // GPUS} --data-path path_to_imagenet --dist-eval --drop-path {row['drop_path']}"
    )
    if int(row["warmup_epochs"]) != default("warmup_epochs"):
        command += f" --warmup-epochs {row['warmup_epochs']}"
    settings = [row["global_batch"], row["warmup_epochs"], row["drop_path"], f"{default('lr') * batch / 512:g}"]
    return f"`{name}`", batch // GPUS, settings, f"`{command}`"


def recipes() -> list[str]:
    rows = [(name, *settings, command) for name, _, settings, command in map(recipe, paper())]
    return markdown("Model | Global batch | Warm-up epochs | Drop path | Peak lr | Command", rows)


def settings() -> list[str]:
    """The recipes without their commands, for a narrow table."""
    rows = [(name, f"{GPUS} x {batch}", *settings[1:]) for name, batch, settings, _ in map(recipe, paper())]
    return markdown("Model | GPUs x `--batch-size` | `--warmup-epochs` | `--drop-path` | Peak lr", rows)


def by_config(prefixes: tuple[str, ...]) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Return the reported numbers and our counts of each config that begins with one of `prefixes`.

    The counts are read from logs/dense_counts.csv, because counting needs the libraries of `make dense`.
    """
    published = [row for row in read_csv(LOGS / "published" / "dense.csv") if row["config"].startswith(prefixes)]
    counts = {row["model"]: row for row in read_csv(LOGS / "dense_counts.csv")}
    return [(row, counts[dense_model(row["config"])]) for row in published]


def together(*numbers: str) -> str:
    return " / ".join(number or "-" for number in numbers) if any(numbers) else ""


def size_columns(row: dict[str, str], counts: dict[str, str]) -> tuple[str, ...]:
    flops = together(*(f"{float(counts[key]):.1f}" for key in ("gmacs", "gmacs_without_attention")))
    return flops, row["flops_g"], f"{int(counts['params']) / 1e6:.1f}", row["params_m"]


def segmentation() -> list[str]:
    rows = []
    for row, counts in by_config(("fpn", "upernet")):
        name = f"[{row['config']}](segmentation/configs/{row['config']}.py)"
        log = f"{row['log_miou']}, {row['log_best_miou']} ({row['log_best_iteration']})"
        log = f"[{log}](logs/published/dense.csv)" if row["log_miou"] else ""
        url = f"[{row['checkpoint']}]({DRIVE.format(row['drive_id'])})" if row["drive_id"] else ""
        rows.append((name, row["miou"], row["miou_ms"], log, *size_columns(row, counts), url))
    return markdown(f"Config | mIoU | multi-scale | Log: last mIoU, best (iteration) | {SIZES} | URL", rows)


def detection() -> list[str]:
    """The paper's sizes of a model stand in its first row."""
    rows = []
    for row, counts in by_config(("retinanet", "mask_rcnn")):
        name = f"[{row['config']}](detection/configs/{row['config']}.py)"
        columns = "ap ap50 ap75", "ap_s ap_m ap_l", "mask_ap mask_ap50 mask_ap75"
        scores = [together(*(row[key] for key in keys.split())) for keys in columns]
        rows.append((name, *scores, *size_columns(row, counts)))
    return markdown(f"Config | Box AP / AP50 / AP75 | small / medium / large | Mask AP / AP50 / AP75 | {SIZES}", rows)


# ---------------------------------------------------------------- our runs and records


def runs(logs: Path = LOGS) -> list[str]:
    """Return the table of our classification runs: the folders of logs/ that main.py wrote."""
    folders = sorted(path.parent for path in logs.glob("*/log.txt") if path.with_name("environment.json").exists())
    header = "Run | Model | Data | Epochs | Best Acc@1 (epoch) | Last Acc@1 | Images/s (median) | Device | Commit"
    return markdown(header, map(run_row, folders))


def run_row(folder: Path) -> list[str]:
    log = read_log(folder, keys=(*KEYS, "images_per_s"))
    args = read_json(folder / "args.json", "model", "data_path", "epochs")
    environment = read_json(folder / "environment.json", "device", "commit")
    names = f"[{folder.name}](logs/{folder.name})", f"`{args['model']}`", Path(args["data_path"]).name
    epochs = str(len(log)) if len(log) == args["epochs"] else f"{len(log)} of {args['epochs']}"
    rate = statistics.median(epoch["images_per_s"] for epoch in log)
    results = best(log), f"{log[-1]['test_acc1']:.2f}", f"{rate:.0f}"
    return [*names, epochs, *results, environment["device"], short(environment["commit"])]


def finetuning(logs: Path = LOGS) -> list[str]:
    """Return a row for each way of fine-tuning: the last top-1 of its runs logs/finetuning/DATA/WAY-SEED."""
    ways: dict[tuple[str, str], list[dict]] = {}
    for folder in sorted(path.parent for path in logs.glob("finetuning/*/*/log.txt")):
        args, environment = read_json(folder / "args.json", "lr"), read_json(folder / "environment.json", "commit")
        line = read_log(folder)[-1] | {"lr": args["lr"], "commit": short(environment["commit"])}
        ways.setdefault((folder.parent.name, folder.name.rpartition("-")[0]), []).append(line)
    rows = []
    for (data, way), last in ways.items():
        scores = [line["test_acc1"] for line in last]
        commits = ", ".join(sorted({line["commit"] for line in last}))
        results = f"{statistics.mean(scores):.2f}", ", ".join(f"{score:.2f}" for score in scores)
        rows.append([data, way, f"{last[0]['lr']:.3g}", f"{last[0]['n_parameters']:,}", *results, commits])
    return markdown("Data | Way | `--lr` | Trained parameters | Mean top-1 | Each seed | Commit", rows)


def short(commit: str) -> str:
    commit, plus, changes = commit.partition("+")
    return commit[:8] + plus + changes if commit else "unknown"


SCORES = {
    "mIoU": "mIoU {:.2f}",
    "coco/bbox_mAP": "box AP {:.3f}",
    "coco/bbox_mAP_50": "AP50 {:.3f}",
    "coco/segm_mAP": "mask AP {:.3f}",
    "coco/segm_mAP_50": "AP50 {:.3f}",
}


def scores(record: dict) -> str:
    return ", ".join(words.format(record[key]) for key, words in SCORES.items() if key in record)


def dense_runs(logs: Path = LOGS) -> list[str]:
    """Return the table of our dense runs: the folders of logs/ that train.py of segmentation/ or detection/ wrote."""
    folders = sorted(path.parent for path in logs.glob("*/scalars.json"))
    header = (
        "Run | Iterations | Loss, first and last | Last scores | Scores on other images | Training time (min) | "
        "Device, threads | Commit"
    )
    return markdown(header, map(dense_run_row, folders))


def dense_run_row(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "scalars.json").read_text().splitlines()]
    environment = read_json(folder / "environment.json", "device", "threads", "commit")
    steps, scored = [line for line in lines if "loss" in line], [line for line in lines if scores(line)]
    # A line's time is the mean of the iterations since the line before it.
    between = zip(steps, [0, *(line["iter"] for line in steps)])
    seconds = sum(line["time"] * (line["iter"] - before) for line, before in between)
    others = {path.stem.removeprefix("scores_"): path for path in sorted(folder.glob("scores_*.json"))}
    others = "; ".join(f"{name}: {scores(json.loads(path.read_text()))}" for name, path in others.items())
    losses, last = f"{steps[0]['loss']:.3g}, {steps[-1]['loss']:.3g}", scores(scored[-1]) if scored else ""
    machine = f"{environment['device']}, {environment['threads']}"
    results = str(lines[-1]["step"]), losses, last, others, f"{seconds / 60:.0f}"
    return [f"[{folder.name}](logs/{folder.name})", *results, machine, short(environment["commit"])]


MODES = ("eager", "compiled", "graphs", "freezing", "onnxruntime", "openvino")


def record(name: str, logs: Path = LOGS) -> Path:
    """Return the file of a record of tools.benchmark: NAME is its folder, or what follows the date (the newest)."""
    found = sorted(logs.glob(f"benchmarks/????-??-??_{name}/results.json"))
    return found[-1] if found else logs / "benchmarks" / name / "results.json"


def speed(*names: str, logs: Path = LOGS) -> list[str]:
    """Return, for each record, a line of where and how it was measured, then a row for each case."""
    lines = []
    for path in [record(name, logs) for name in names] or sorted(logs.glob("benchmarks/*/results.json")):
        found = read_json(path, "environment", "settings", "cases")
        where = found["environment"]
        versions = f"torch {where['torch']}, timm {where['timm']}"
        when = f"{where['started'][:10]}, {found['settings']['repeats']} rounds"
        flags = [flag.upper().replace("_", "-") for flag in where.get("processor", {}).get("flags", ())]
        hardware = where["hardware"] + (f" ({', '.join(flags)})" if flags else "")
        what = f"{hardware}, {where['threads']} threads, {versions}, {when}"
        lines += ["", f"{what}. `{where['command']}`", "", *speeds(found["cases"])]
    return [*lines, ""] if lines else ["none yet"]


def same_mode(case: dict) -> dict[tuple[str, str], float]:
    """Return the median ratios of ours to each other library, by (library, mode), both in that mode."""
    same = [ratio for ratio in case["ratios"] if ratio["ours"] == ratio["mode"]]
    return {(ratio["library"], ratio["mode"]): ratio["median"] for ratio in same}


def percentages(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())


# Which modes are compared, and the title of the column.
BEST = {"PyTorch": "best of ours / best of {}, PyTorch", "all": "best of all of ours / OpenVINO on {}'s model"}


def speeds(cases: list[dict]) -> list[str]:
    """Return images per second of ours / each other network, with the ratio, and the % of peak GEMM throughput.

    If the cases differ in image size, attention's shares of the operations too. If several modes were compared, the
    best of each library and the GEMM rate too.
    """
    sizes = len({case["size"] for case in cases}) > 1
    pairs = dict.fromkeys((row["library"], row["mode"]) for case in cases for row in case["rows"])
    # Sorting is stable: the order of the libraries stays.
    pairs = sorted((pair for pair in pairs if pair[0] != "ours"), key=lambda pair: MODES.index(pair[1]))
    bests = dict.fromkeys((each["of"], each["library"]) for case in cases for each in case.get("comparisons", ()))
    bests = sorted(bests, key=lambda best: list(BEST).index(best[0]))
    rows = []
    for case in cases:
        rates = {(row["library"], row["mode"]): row.get("pictures_per_s") for row in case["rows"]}
        row = [f"`{case['model']}`", case["task"], case["dtype"], f"{case['batch']} x {case['size']}"]
        row += [both_rates(rates, ("ours", mode), (library, mode), same_mode(case)) for library, mode in pairs]
        row += [best_rates(rates, case, *best) for best in bests]
        if bests:
            row.append(f"{case['limits']['operations_per_s'] / 1e9:,.0f}")
        ours = [row for row in case["rows"] if row["library"] == "ours" and "failed" not in row]
        best = max(ours, key=lambda row: row["pictures_per_s"], default=None)
        row.append(f"{100 * best['share_of_product_rate']:.0f} % ({best['mode']})" if best else "")
        if sizes:
            row.append(percentages(case["floor"]["shares_of_operations"]))
        rows.append(row)
    columns = ["Model", "Task", "dtype", "Batch", *(f"ours / {library}, {mode}" for library, mode in pairs)]
    columns += [BEST[of].format(library) for of, library in bests] + ["GEMM, GFLOP/s"] * bool(bests)
    return markdown([*columns, "% of peak GEMM throughput", *["Operations"] * sizes], rows)


def both_rates(rates: dict, mine: tuple[str, str], other: tuple[str, str], ratios: dict) -> str:
    """Return "ours / other = ratio"; "failed" for one that has no rate, and nothing if neither was run."""
    if mine not in rates or other not in rates:
        return ""
    texts = ["failed" if rates[name] is None else f"{rates[name]:.3g}" for name in (mine, other)]
    return " / ".join(texts) + (f" = {ratios[other]:.2f}" if other in ratios else "")


def best_rates(rates: dict, case: dict, of: str, library: str) -> str:
    """Return "ours / other = ratio (modes)" of the comparison of the best modes."""
    for each in case.get("comparisons", ()):
        if (each["of"], each["library"]) == (of, library):
            other = library, each["mode"]
            text = both_rates(rates, ("ours", each["ours"]), other, {other: each["median"]})
            return f"{text} ({each['ours']}{f' / {other[1]}' if of == 'PyTorch' else ''})"
    return ""


def ablation_rates() -> list[str]:
    return markdown(*ablation_results.rate_table())


def ablation_runs() -> list[str]:
    return markdown(*ablation_results.run_table())


def ablation_contrasts() -> list[str]:
    return markdown(*ablation_results.contrast_table())


TABLES = {table.__name__: table for table in (classification, recipes, settings, segmentation, detection)}
TABLES |= {table.__name__: table for table in (runs, dense_runs, finetuning, speed)}
TABLES |= {table.__name__: table for table in (ablation_rates, ablation_runs, ablation_contrasts)}


# ---------------------------------------------------------------- the pages


def make_table(name: str, page: Path) -> list[str]:
    """Return the lines of a table, with links relative to the folder of a page of the project."""
    kind, *records = name.split()
    folder = page.resolve().parent
    start = folder if folder.is_relative_to(ROOT) else ROOT

    def relative(match: re.Match) -> str:
        return f"]({os.path.relpath(ROOT / match[1], start)})"

    return [re.sub(r"\]\((?!https)([^)]+)\)", relative, line) for line in TABLES[kind](*records)]


def fill(lines: list[str], page: Path) -> tuple[list[str], list[str]]:
    """Return a page's lines with the tables between its markers written anew, and the names of those that differ."""
    new, changed, done = [], [], 0
    markers = [number for number, line in enumerate(lines) if line.startswith("<!-- table:") or line == END]
    for first, last in itertools.zip_longest(markers[::2], markers[1::2]):
        where, match = f"{page}, line {first + 1}", START.fullmatch(lines[first])
        if lines[first] == END:
            raise UserError(f"end of no table ({where}): write the line that begins it, or delete this one")
        if not match or match[1].split()[0] not in TABLES:
            expected = f"expected <!-- table: NAME (python -m tools.readme_tables) --> of {', '.join(TABLES)}"
            raise UserError(f"unknown table ({where}): {expected}")
        if last is None or lines[last] != END:
            raise UserError(f"table {match[1]} is not closed ({where}): write {END} after it")
        table = make_table(match[1], page)
        changed += [match[1]] if table != lines[first + 1 : last] else []
        new += [*lines[done : first + 1], *table]
        done = last
    return [*new, *lines[done:]], changed


def update(page: Path, *, check: bool) -> int:
    """Return the exit code for one page."""
    try:
        text = page.read_text()
    except OSError as error:
        raise UserError(f"cannot be read (--readme {page}): give a file") from error
    lines, changed = fill(text.split("\n"), page)
    if check and changed:
        advice = "run python -m tools.readme_tables"
        print(f"readme_tables.py: out of date ({page}, {', '.join(changed)}): {advice}", file=sys.stderr)
        return 1
    if changed:
        files.write_text(page, "\n".join(lines))
    print(f"{page}: {'wrote ' + ', '.join(changed) if changed else 'tables are up to date'}")
    return 0


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    note = "only report by the exit code whether the tables are up to date"
    parser.add_argument("--check", action="store_true", help=note)
    parser.add_argument("--readme", type=Path, nargs="+", metavar="FILE", help="(every page of the project)")
    args = parser.parse_args(argv)
    pages = args.readme or [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    return max([update(page, check=args.check) for page in pages])


if __name__ == "__main__":
    sys.exit(exit_code("readme_tables.py", main, sys.argv[1:]))
