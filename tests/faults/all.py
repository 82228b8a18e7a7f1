"""All programs of accidents, and a table of what was tried and survived: python tests/faults/all.py [--short] [--output
FOLDER]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import HERE, ROOT, environment
from conftest import have_strace
from torch import device

import utils
from training import files

PROGRAMS = ("kill", "syscalls", "disk", "corrupt", "hostile", "malformed", "stuck", "clock", "elastic", "machines")


def table(rows: list[dict], record: dict, minutes: float) -> str:
    tried = sum(row["tried"] for row in rows)
    lost = tried - sum(row["survived"] for row in rows)
    commit, columns = record["commit"][:8], ("program", "what", "form", "tried", "survived")
    lines = [
        "# Fault-injection results",
        "",
        f"`python tests/faults/all.py`, {record['started'][:10]}, commit {commit}: {tried} accidents, "
        f"{lost} not survived, {minutes:.0f} minutes.",
        f"torch {record['torch']}, Python {record['python']}, {record['device']} with {record['cores']} cores; "
        f"{'strace was there' if have_strace() else 'no strace: calls were interrupted from inside the process'}.",
        "",
        "| Program | Accident | How | Tried | Survived | Seconds | Notes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [*(str(row[name]) for name in columns), f"{row['seconds']:.0f}", row["notes"] + row["first_loss"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "What each proves stands at the top of its file in tests/faults.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "faults")
    args = parser.parse_args()
    record, rows, start = utils.environment(device("cpu"), 0), [], time.perf_counter()
    failed = []
    for program in PROGRAMS:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "rows.json"
            line = [
                sys.executable,
                str(HERE / f"{program}.py"),
                "--json",
                str(result),
                *(["--short"] if args.short else []),
            ]
            code = subprocess.run(line, env=environment(), cwd=ROOT).returncode
            if code != 0:
                failed.append(program)
            rows += json.loads(result.read_text()) if result.exists() else []
    args.output.mkdir(parents=True, exist_ok=True)
    files.write_text(args.output / "README.md", table(rows, record, (time.perf_counter() - start) / 60))
    print(f"{args.output / 'README.md'}: {'all survived' if not failed else 'LOST in ' + ', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
