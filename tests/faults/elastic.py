"""A training process is killed, and torchrun restarts them all: python tests/faults/elastic.py [--runs 10]

With --max-restarts the run must continue from its newest checkpoint by itself, with --standalone, with a port that was
given, and where torchrun's own store is not shared, and end with the bits of one that nobody disturbed.
"""

import os
import random
import signal
import time
from pathlib import Path

from common import Row, Started, command, complain, make_data, ranks, result, run_program, status, words

PROCESSES = 2
# Options of torchrun, and of the environment.
LAUNCHERS = {
    "--standalone": (("--standalone", "--max-restarts=3"), {}),
    "--master-port": (("--max-restarts=3",), {}),
    "no shared store": (("--standalone", "--max-restarts=3"), {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}),
}
WITHIN_S = 180  # a restart that hangs would wait for --dist-timeout, half an hour


def start(base: Path, folder: Path, name: str = "--master-port") -> Started:
    launcher, env = LAUNCHERS[name]
    options = words(make_data(base / "data", train=20, val=10), folder, epochs=2)
    return Started(command(options, processes=PROCESSES, launcher=launcher), base / "out", **env)


def kills(row: Row, base: Path, name: str, runs: int, expected: tuple, seed: int) -> None:
    """Kill a process, another one each time, at a time drawn by the seed."""
    draw, slowest = random.Random(seed), 0.0
    for number in range(runs):
        folder, rank, delay = base / f"{name}-{number}", number % PROCESSES, draw.uniform(0, 1.5)
        run = start(base, folder, name)
        if not run.wait_for(lambda run=run: "Epoch: [0]" in run.stdout()):
            row.lost(f"it ended too early: {run.stderr()[-300:]}")
            continue
        time.sleep(delay)
        if (pid := ranks(run.process.pid).get(rank)) is None:
            row.lost(f"it ended within {delay:.2f} s, before the kill: {run.stderr()[-300:]}")
            continue
        os.kill(pid, signal.SIGKILL)
        begin = time.monotonic()
        try:
            code = run.wait(WITHIN_S)
        except TimeoutError as error:
            row.lost(str(error))
            continue
        slowest = max(slowest, time.monotonic() - begin)
        same = code == 0 and result(folder) == expected
        row.check(
            complain(code == 0, f"exit {code}: {run.stderr()[-400:]}"),
            complain(run.stdout().count("| distributed init (rank 0)") == 2, "not restarted exactly once"),
            complain(same, f"other bits (process {rank}, {delay:.2f} s after the first step)"),
            complain((folder / "status.json").exists() and status(folder)["state"] == "finished", "not finished"),
        )
    row.notes = f"ended at most {slowest:.0f} s after the kill"


def body(table, args, base: Path) -> None:
    whole = start(base, base / "whole")
    if whole.wait() != 0:
        raise RuntimeError(f"the undisturbed run failed: {whole.stderr()[-500:]}")
    expected = result(base / "whole")
    for name in list(LAUNCHERS)[: 1 if args.short else None]:
        with table.row("a training process killed, --max-restarts=3", f"{PROCESSES} processes, {name}") as row:
            kills(row, base, name, 1 if args.short else args.runs, expected, args.seed)


if __name__ == "__main__":
    run_program(__doc__, body, lambda parser: parser.add_argument("--runs", type=int, default=10))
