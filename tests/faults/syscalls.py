"""SIGKILL at every write, fsync, rename, link and unlink of one save: python tests/faults/syscalls.py

Afterwards the newest checkpoint that can be read must be whole, and not older than the last complete one. Through
strace where it is there; else from inside the process.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from common import HERE, Row, complain, environment, run_program
from conftest import have_strace

from training import checkpoint, files
from training.errors import UserError

ONE_SAVE = str(HERE / "one_save.py")
CALLS = "write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat"


def newest_whole(folder: Path) -> int:
    """The epoch of the checkpoint that a run would continue from; -1 for none."""
    for path in files.candidates(folder):
        try:
            payload = checkpoint.load(path)
        except UserError:
            continue
        values = {value for tensor in payload["model"].values() for value in tensor.unique().tolist()}
        return payload["epoch"] if values == {float(payload["epoch"])} else -2
    return -1


def attempt(prepared: Path, folder: Path, line: list[str], options: list[str]) -> tuple[int, str]:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared, folder)
    done = subprocess.run([*line, str(folder), *options], capture_output=True, text=True, env=environment())
    return done.returncode, done.stderr


def check(row: Row, prepared: Path, folder: Path, line: list[str], options: list[str], what: str) -> bool:
    """One interrupted save. False where it was not interrupted: there are no more calls, and the save must have gone
    well.
    """
    code, said = attempt(prepared, folder, line, options)
    killed, newest = code in (137, -9), newest_whole(folder)
    if not killed and options:
        if code != 0 or newest != 4:
            row.lost(f"{what}: the save ended with {code} and epoch {newest}: {said[-200:]}")
        return False
    row.check(
        complain(killed, f"{what}: it was not killed (exit {code}): {said[-200:]}"),
        complain(newest >= 3, f"{what}: the newest whole checkpoint is of epoch {newest}"),
    )
    return killed


def dry_run(prepared: Path, folder: Path, log: Path) -> dict[str, range]:
    """For each call that the save makes, which ones of the program's are the save's own, counted from 1."""
    line = ["strace", "-f", "-y", "-o", str(log), "-e", f"trace={CALLS},openat,open", sys.executable, ONE_SAVE]
    code, said = attempt(prepared, folder, line, [])
    if code != 0 or newest_whole(folder) != 4:
        raise RuntimeError(f"the save fails without an accident: {said[-300:]}")
    counts, before, begun = Counter(), Counter(), False  # of calls inside the save, and before it
    main = log.read_text().split()[0]
    for text in log.read_text().splitlines():
        found = re.match(r"(\d+) +(\w+)\(", text)
        if not found or found[1] != main or found[2] in ("open", "openat"):
            begun = begun or (".tmp" in text and str(folder) in text)
            continue
        (counts if begun else before)[found[2]] += 1
    return {call: range(before[call] + 1, before[call] + number + 1) for call, number in counts.items()}


def body(table, args, base: Path) -> None:
    from one_save import prepare

    prepared, folder = base / "prepared", base / "folder"
    if not prepared.exists():
        prepare(prepared)
    if have_strace():
        with table.row("SIGKILL at each call of one save", "strace's injection") as row:
            calls = dry_run(prepared, folder, base / "strace.log")
            for call, numbers in calls.items():
                for number in list(numbers)[-1:] if args.short else numbers:
                    inject = f"inject={call}:signal=SIGKILL:when={number}"
                    line = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", inject, sys.executable, ONE_SAVE]
                    check(row, prepared, folder, line, [], f"{call} {number}")
            row.notes = ", ".join(f"{len(numbers)} {call}" for call, numbers in calls.items())
        return
    with table.row("SIGKILL at each call of one save", "from inside the process") as row:
        number, step = 1, 12 if args.short else 1
        while check(row, prepared, folder, [sys.executable, ONE_SAVE], ["at", str(number)], f"call {number}"):
            number += step
        row.notes = f"the save makes fewer than {number} calls"


if __name__ == "__main__":
    run_program(__doc__, body)
