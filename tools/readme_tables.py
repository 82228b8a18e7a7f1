"""Write the tables of README files from the models and from logs/: python -m tools.readme_tables [--check] [--readme
FILE ...].

What stands between two lines such as these is replaced; after `speed` may come folders of logs/benchmarks, otherwise it
has all of them:

    <!-- table: classification (python -m tools.readme_tables) -->
    <!-- end table -->

--check writes nothing, and ends with 1 where a table is not what would be written.
"""

import csv
import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import gvt
from tools.count import count, dense_model
from tools.plot_logs import KEYS, LogError, published_logs, read_log
from training import files
from training.errors import UserError
from training.options import Parser, get_parser

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "logs"
GPUS = 8  # of the published commands
READMES = ROOT / "README.md", LOGS / "benchmarks" / "README.md"
START = re.compile(r"<!-- table: (\w+|speed(?: [\w-]+)+) \(python -m tools\.readme_tables\) -->")
END = "<!-- end table -->"
REGISTERED = {key: name for name, key in gvt.MODEL_NAMES.items()}


# ---------------------------------------------------------------- the tables


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def paper() -> list[dict[str, str]]:
    """A row for each model of the paper: see logs/README.md."""
    with open(LOGS / "published" / "paper.csv", newline="") as file:
        return list(csv.DictReader(file))


def by_config(prefixes: tuple[str, ...]) -> list[tuple[dict[str, str], dict[str, str]]]:
    """-> what is published of each config that begins so, and what tools/count.py found, which needs the libraries of
    `make dense`.
    """
    with open(LOGS / "published" / "dense.csv", newline="") as file:
        published = [row for row in csv.DictReader(file) if row["config"].startswith(prefixes)]
    with open(LOGS / "dense_counts.csv", newline="") as file:
        counts = {row["model"]: row for row in csv.DictReader(file)}
    return [(row, counts[dense_model(row["config"])]) for row in published]


def best(log: list[dict]) -> str:
    epoch = max(log, key=lambda epoch: epoch["test_acc1"])
    return f"{epoch['test_acc1']:.2f} ({epoch['epoch']:.0f})"


def classification() -> list[str]:
    header = (
        "Name",
        "Alias in this code",
        "Acc@1",
        "FLOPs (G), with / without attention products",
        "#params (M)",
        "URL",
        "Log: best Acc@1 (epoch)",
    )
    logs, rows = published_logs(), []
    for row in paper():
        counts = count(REGISTERED[row["model"]])
        rows.append(
            (
                row["name"],
                f"`{REGISTERED[row['model']]}`",
                row["acc1"],
                f"{counts['gmacs']:.1f} / {counts['gmacs_without_attention']:.1f}",
                f"{counts['params'] / 1e6:.1f}",
                f"[{row['model']}.pth](https://drive.google.com/file/d/{row['drive_id']}/view)",
                f"[{best(logs[row['log']])}](logs/published/classification.csv)",
            )
        )
    return markdown(header, rows)


def together(*figures: str) -> str:
    return " / ".join(figure or "-" for figure in figures) if any(figures) else ""


def size_columns(counts: dict[str, str]) -> tuple[str, str]:
    flops = together(*(f"{float(counts[key]):.1f}" for key in ("gmacs", "gmacs_without_attention")))
    return flops, f"{int(counts['params']) / 1e6:.1f}"


SIZES = "FLOPs (G), with / without attention products", "FLOPs, paper", "#params (M)", "#params, paper"


def segmentation() -> list[str]:
    header = "Config", "mIoU", "multi-scale", "Log: last mIoU, best (iteration)", *SIZES, "URL"
    rows = []
    for row, counts in by_config(("fpn", "upernet")):
        log = (
            f"[{row['log_miou']}, {row['log_best_miou']} ({row['log_best_iteration']})](logs/published/dense.csv)"
            if row["log_miou"]
            else ""
        )
        flops, params = size_columns(counts)
        url = (
            f"[{row['checkpoint']}](https://drive.google.com/file/d/{row['drive_id']}/view)" if row["drive_id"] else ""
        )
        name = f"[{row['config']}](segmentation/configs/{row['config']}.py)"
        rows.append((name, row["miou"], row["miou_ms"], log, flops, row["flops_g"], params, row["params_m"], url))
    return markdown(header, rows)


def detection() -> list[str]:
    """The paper's sizes of a model stand in its first row."""
    header = "Config", "Box AP / AP50 / AP75", "small / medium / large", "Mask AP / AP50 / AP75", *SIZES
    rows = []
    for row, counts in by_config(("retinanet", "mask_rcnn")):
        name = f"[{row['config']}](detection/configs/{row['config']}.py)"
        scores = [
            together(*(row[key] for key in keys.split()))
            for keys in ("ap ap50 ap75", "ap_s ap_m ap_l", "mask_ap mask_ap50 mask_ap75")
        ]
        flops, params = size_columns(counts)
        rows.append((name, *scores, flops, row["flops_g"], params, row["params_m"]))
    return markdown(header, rows)


def recipes() -> list[str]:
    """The peak learning rate and the command follow from main.py's defaults."""
    header = "Model", "Global batch", "Warm-up epochs", "Drop path", "Peak lr", "Command"
    default, rows = get_parser().get_default, []
    for row in paper():
        name, batch, warmup = REGISTERED[row["model"]], int(row["global_batch"]), int(row["warmup_epochs"])
        command = (
            f"python -m torch.distributed.launch --nproc_per_node={GPUS} --use_env main.py --model {name} --batch-size "
            f"{batch // GPUS} "
            f"--data-path path_to_imagenet --dist-eval --drop-path {row['drop_path']}"
        )
        if warmup != default("warmup_epochs"):
            command += f" --warmup-epochs {warmup}"
        rate = default("lr") * batch / 512
        rows.append((f"`{name}`", str(batch), str(warmup), row["drop_path"], f"{rate:g}", f"`{command}`"))
    return markdown(header, rows)


def runs(logs: Path = LOGS) -> list[str]:
    """Ours: the folders of logs/ that main.py wrote."""
    header = (
        "Run",
        "Model",
        "Data",
        "Epochs",
        "Best Acc@1 (epoch)",
        "Last Acc@1",
        "Images/s (median)",
        "Device",
        "Commit",
    )
    folders = sorted(path.parent for path in logs.glob("*/log.txt") if path.with_name("environment.json").exists())
    return markdown(header, map(run_row, folders)) if folders else ["none yet"]


def run_row(folder: Path) -> list[str]:
    log = read_log(folder, keys=(*KEYS, "images_per_s"))
    args = read_json(folder / "args.json", "model", "data_path", "epochs")
    environment = read_json(folder / "environment.json", "device", "commit")
    return [
        f"[{folder.name}](logs/{folder.name})",
        f"`{args['model']}`",
        Path(args["data_path"]).name,
        str(len(log)) if len(log) == args["epochs"] else f"{len(log)} of {args['epochs']}",
        best(log),
        f"{log[-1]['test_acc1']:.2f}",
        f"{statistics.median(epoch['images_per_s'] for epoch in log):.0f}",
        environment["device"],
        short(environment["commit"]),
    ]


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
    """Ours: the folders of logs/ that hold what segmentation/train.py or detection/train.py wrote."""
    header = (
        "Run",
        "Iterations",
        "Loss, first and last",
        "Last scores",
        "Of other pictures",
        "Minutes of training",
        "Device, threads",
        "Commit",
    )
    folders = sorted(path.parent for path in logs.glob("*/scalars.json"))
    return markdown(header, map(dense_run_row, folders)) if folders else ["none yet"]


def dense_run_row(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "scalars.json").read_text().splitlines()]
    environment = read_json(folder / "environment.json", "device", "threads", "commit")
    steps, scored = [line for line in lines if "loss" in line], [line for line in lines if scores(line)]
    between = zip(steps, [0, *(line["iter"] for line in steps)])
    seconds = sum(line["time"] * (line["iter"] - before) for line, before in between)
    others = (
        f"{path.stem.removeprefix('scores_')}: {scores(json.loads(path.read_text()))}"
        for path in sorted(folder.glob("scores_*.json"))
    )
    return [
        f"[{folder.name}](logs/{folder.name})",
        str(lines[-1]["step"]),
        f"{steps[0]['loss']:.3g}, {steps[-1]['loss']:.3g}",
        scores(scored[-1]) if scored else "",
        "; ".join(others),
        f"{seconds / 60:.0f}",
        f"{environment['device']}, {environment['threads']}",
        short(environment["commit"]),
    ]


def short(commit: str) -> str:
    commit, plus, changes = commit.partition("+")
    return commit[:8] + plus + changes if commit else "unknown"


MODES = ("eager", "compiled", "graphs")


def speed(*folders: str, logs: Path = LOGS) -> list[str]:
    """What tools/benchmark.py wrote: for each of its folders where it was measured and how, then a row for each
    case.
    """
    lines = []
    for path in [logs / "benchmarks" / name / "results.json" for name in folders] or sorted(
        logs.glob("benchmarks/*/results.json")
    ):
        found = read_json(path, "environment", "settings", "cases")
        where = found["environment"]
        versions = f"torch {where['torch']}, timm {where['timm']}"
        when = f"{where['started'][:10]}, {found['settings']['repeats']} rounds"
        what = f"{where['hardware']}, {where['threads']} threads, {versions}, {when}"
        lines += ["", f"{what}. `{where['command']}`", "", *speeds(found["cases"])]
    return [*lines, ""] if lines else ["none yet"]


def speeds(cases: list[dict]) -> list[str]:
    """Pictures per second of ours / each other, mode for mode, with the ratio; and the faster mode's share of the
    product's rate.

    Where sizes differ, attention's shares of the operations too.
    """
    sizes = len({case["size"] for case in cases}) > 1
    pairs = list(
        dict.fromkeys(
            (ratio["library"], ratio["mode"])
            for case in cases
            for ratio in case["ratios"]
            if ratio["ours"] == ratio["mode"]
        )
    )
    pairs.sort(key=lambda pair: MODES.index(pair[1]))  # stable: the order of the libraries stays
    rows = []
    for case in cases:
        rates = {(row["library"], row["mode"]): row for row in case["rows"]}
        ahead = {
            (ratio["library"], ratio["mode"]): ratio["median"]
            for ratio in case["ratios"]
            if ratio["ours"] == ratio["mode"]
        }
        best = max((row for row in case["rows"] if row["library"] == "ours"), key=lambda row: row["pictures_per_s"])
        row = [f"`{case['model']}`", case["task"], case["dtype"], f"{case['batch']} x {case['size']}"]
        for library, mode in pairs:
            both = [rates[name]["pictures_per_s"] for name in (("ours", mode), (library, mode)) if name in rates]
            row.append(
                f"{both[0]:.3g} / {both[1]:.3g} = {ahead[library, mode]:.2f}" if (library, mode) in ahead else ""
            )
        rows.append([*row, f"{100 * best['share_of_product_rate']:.0f} % ({best['mode']})"])
        if sizes:
            rows[-1].append(
                ", ".join(
                    f"{name} {100 * share:.0f} %" for name, share in case["floor"]["shares_of_operations"].items()
                )
            )
    columns = [
        "Model",
        "Task",
        "dtype",
        "Batch",
        *(f"ours / {library}, {mode}" for library, mode in pairs),
        "Share of product rate",
    ]
    return markdown([*columns, *(["Of operations"] if sizes else [])], rows)


def read_json(path: Path, *keys: str) -> dict:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({path}): put back what was written there") from error
    lacking = [key for key in keys if key not in record]
    if lacking:
        raise UserError(f"no {', '.join(lacking)} ({path}): put back what was written there")
    return record


TABLES = {
    "classification": classification,
    "recipes": recipes,
    "segmentation": segmentation,
    "detection": detection,
    "runs": runs,
    "dense_runs": dense_runs,
    "speed": speed,
}


# ---------------------------------------------------------------- the README


def find_tables(lines: list[str], source: Path) -> list[tuple[str, int, int]]:
    """-> (name, first, stop) for each pair of markers, in order: lines[first:stop] is what stands between them."""
    found, opened = [], None
    for index, line in enumerate(lines):
        where = f"{source}, line {index + 1}"
        if line.startswith("<!-- table:"):
            if opened:
                break
            match = START.fullmatch(line)
            if not match or match[1].split()[0] not in TABLES:
                raise UserError(
                    f"unknown table ({where}): expected <!-- table: NAME (python -m tools.readme_tables) --> of "
                    f"{', '.join(TABLES)}"
                )
            opened = match[1], index + 1
        elif line == END:
            if not opened:
                raise UserError(f"end of no table ({where}): write the line that begins it, or take this one away")
            found.append((*opened, index))
            opened = None
    if opened:
        raise UserError(f"table {opened[0]} is not closed ({source}, line {opened[1]}): write {END} where it ends")
    return found


def fill(lines: list[str], source: Path) -> tuple[list[str], list[str]]:
    """-> the lines of a README with its tables made anew, and the names of the tables that differ."""
    new, changed, end = [], [], 0
    for name, first, stop in find_tables(lines, source):
        kind, *folders = name.split()
        table = TABLES[kind](*folders)
        new += lines[end:first] + table
        end = stop
        if table != lines[first:stop]:
            changed.append(name)
    return new + lines[end:], changed


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="only say whether the tables are up to date, by the exit code"
    )
    parser.add_argument("--readme", type=Path, nargs="+", default=READMES, metavar="FILE", help="(the project's)")
    args = parser.parse_args(argv)
    return max([update(path, check=args.check) for path in args.readme])


def update(readme: Path, *, check: bool) -> int:
    """-> the exit code for one file."""
    try:
        text = readme.read_text()
    except OSError as error:
        raise UserError(f"cannot be read (--readme {readme}): give a file") from error
    lines, changed = fill(text.split("\n"), readme)
    if check and changed:
        print(
            f"readme_tables.py: out of date ({readme}, {', '.join(changed)}): run python -m tools.readme_tables",
            file=sys.stderr,
        )
        return 1
    if changed:
        files.write_text(readme, "\n".join(lines))
    print(f"{readme}: {'wrote ' + ', '.join(changed) if changed else 'tables are up to date'}")
    return 0


def run(argv: list[str]) -> int:
    try:
        return main(argv)
    except (UserError, LogError) as error:
        print(f"readme_tables.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
