"""What the tools that measure have in common: progress, spread, the machine's name, and files of records."""

import csv
import io
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

import utils
from training import files
from training.errors import UserError


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high}


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else utils.platform.machine()


def environment(device: torch.device, seed: int) -> dict:
    return utils.environment(device, seed) | {"hardware": hardware(device)}


def csv_text(columns: Iterable[str], rows: Iterable[Mapping]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(folder: Path, name: str, results: dict, table: str, shown: str = "") -> None:
    """FOLDER/name.json, FOLDER/name.csv, and FOLDER/table.txt where there is something to be read."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
        files.write_text(folder / f"{name}.csv", table)
        if shown:
            files.write_text(folder / "table.txt", shown + "\n")
    except OSError as error:
        raise UserError(f"cannot write (--output {folder}): {error.strerror}") from error
