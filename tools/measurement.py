"""What the tools that measure share: rounds in turns, quartiles, tables, and the files of a record."""

import csv
import io
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import torch

import utils
from gvt_ops.onednn import PROCESSOR
from training import files, threads
from training.errors import UserError

PROCESSOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
THREAD_VARIABLES = ("OMP_NUM_THREADS", threads.WAIT, threads.SPINS, "KMP_BLOCKTIME")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_rounds(
    steps: Mapping[Hashable, Callable[[int], object]], *, repeats: int, warmup: int = 0, label: str = "round"
) -> dict[Hashable, list]:
    """Call each step with the number of the round, in every round; return the results of those after the warm-up.

    The order within a round is shuffled, so that no step always follows the same one. label: how progress names a
    round, "" for no progress.
    """
    results, order = {name: [] for name in steps}, random.Random(0)
    for number in range(warmup + repeats):
        for name in order.sample(list(steps), len(steps)):
            results[name].append(steps[name](number))
        done = number + 1 - warmup
        if label and (done in (0, repeats) or done % 10 == 0):
            progress(f"  {label} {max(done, 0)} of {repeats}")
    return {name: values[warmup:] for name, values in results.items()}


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of a step, with all that it starts on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high}


def columns(name: str, values: dict[str, float] | None, scale: float = 1.0) -> dict[str, str]:
    """Return quartiles as cells of a table, in columns name, name_q1 and name_q3; empty if there are none."""
    keys = {name: "median", f"{name}_q1": "q1", f"{name}_q3": "q3"}
    return {column: f"{scale * values[key]:.3f}" if values else "" for column, key in keys.items()}


def environment(device: torch.device) -> dict:
    """Return the command, commit and versions, as a training run records them, the processor, and what tells its
    threads how to wait.
    """
    found = utils.environment(device, 0) | {"hardware": hardware(device), "processor": processor()}
    found["thread_policy"] = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    if device.type == "cuda":
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()["name"]


def processor() -> dict:
    """Return the name, and of PROCESSOR_FLAGS those that it has. Only Linux tells flags."""
    found = {}
    for line in PROCESSOR.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    flags = [flag for flag in PROCESSOR_FLAGS if flag in found.get("flags", "").split()]
    return {"name": found.get("model name") or platform.machine(), "flags": flags}


def text_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return a table in aligned columns, which are the keys of each row."""
    cells = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_record(folder: Path, name: str, record: dict, rows: Sequence[Mapping], *, shown: str = "") -> None:
    """Write FOLDER/name.json, FOLDER/name.csv of the rows, and FOLDER/table.txt of what was shown."""
    texts = {f"{name}.json": json.dumps(record, indent=1) + "\n", f"{name}.csv": csv_text(rows)}
    if shown:
        texts["table.txt"] = shown + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            files.write_text(folder / file, text)
    except OSError as error:
        raise UserError(f"cannot write (--output {folder}): {error.strerror}") from error
