"""A long run that is watched: python tests/faults/soak.py [--updates N] (make soak)

A tiny model trains for ten epochs of 512 updates, with loading processes, and an evaluation and saves in each epoch.
Meanwhile the memory, open files and threads of its processes are noted, and log.txt and status.json are read at
moments of no choice. After the first epoch, the median memory of each process in each epoch must be within 2 % of the
second epoch's, no process may come or go, and open files and threads may not grow. Both files must be right whenever
they are read, and nothing may be left in /dev/shm.
"""

import contextlib
import json
import os
import re
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from common import LIMIT_S, Started, command, complain, make_data, run_program, status, words

EPOCHS, BATCH, WORKERS = 10, 2, 2
# The most that memory may change, and that open files may grow. In the short form the second epoch imports what draws
# the curves, and the first is too short to see as many batches wait in shared memory, each a file, as there may be.
LIMITS, SHORT_LIMITS = (0.02, 5), (0.04, 15)
READ_S, SEARCH_EVERY = 0.05, 4  # seconds between two readings; processes are searched for in each fourth


class Watch:
    """What was seen of a run's processes, by process and epoch, and how often its files were read."""

    def __init__(self, run: Started, folder: Path):
        self.run, self.folder, self.reads, self.epochs = run, folder, 0, 0
        self.seen = defaultdict(lambda: defaultdict(list))  # pid -> epoch -> (bytes, files, threads)
        self.pids, self.family, self.problems = set(), [], []

    def until_the_end(self, seconds: float) -> int:
        end, turn = time.monotonic() + seconds, 0
        while self.run.process.poll() is None:
            if time.monotonic() > end:
                self.run.kill()
                raise TimeoutError(f"it did not end in {seconds} s: {self.run.stderr()[-300:]!r}")
            self.read_files()
            if turn % SEARCH_EVERY == 0:
                self.family = self.run.family()
            # At each turn: how many batches wait in files of shared memory differs from one moment to the next.
            if self.epochs < EPOCHS:
                self.watch_processes()
            turn += 1
            time.sleep(READ_S)
        return self.run.process.returncode

    def read_files(self) -> None:
        """Read log.txt and status.json, and note what is wrong with them."""
        with contextlib.suppress(FileNotFoundError):  # in the beginning
            epochs = [json.loads(line)["epoch"] for line in (self.folder / "log.txt").read_text().splitlines()]
            if epochs != list(range(len(epochs))) or len(epochs) < self.epochs:
                self.problems.append(f"log.txt had the epochs {epochs} after {self.epochs}")
            self.epochs, self.reads = len(epochs), self.reads + 1
        with contextlib.suppress(FileNotFoundError):
            record = status(self.folder)
            by = f"process {self.run.process.pid} "
            if record["state"] not in ("running", "finished") or not record["by"].startswith(by):
                self.problems.append(f"status.json had {record}")
            self.reads += 1

    def watch_processes(self) -> None:
        for pid in self.family:
            with contextlib.suppress(OSError):  # it has just ended
                process = Path(f"/proc/{pid}")
                memory = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                values = memory, len(os.listdir(process / "fd")), len(os.listdir(process / "task"))
                self.seen[pid][self.epochs].append(values)
                self.pids.add(pid)

    def compare(self, limit: float, more_files: int) -> tuple[list[str], str]:
        """Return what changed after the first epoch, and the figures in words."""
        problems, figures = [], []
        lasting = {pid: epochs for pid, epochs in self.seen.items() if len(epochs) >= 2}  # not git, at the start
        for pid, epochs in lasting.items():
            memory, files, threads = ([[each[k] for each in epochs[e]] for e in sorted(epochs)] for k in range(3))
            medians = [median(values) for values in memory[1:]]
            change = max(abs(value / medians[0] - 1) for value in medians)
            problems += [
                complain(sorted(epochs) == list(range(EPOCHS)), f"process {pid} was there in epochs {sorted(epochs)}"),
                complain(change <= limit, f"process {pid}: memory changed by {change:.1%}: {medians}"),
                complain(
                    max(map(max, files[1:])) <= max(files[0]) + more_files,
                    f"process {pid}: open files {[max(each) for each in files]}",
                ),
                complain(
                    max(map(max, threads[1:])) <= max(threads[0]),
                    f"process {pid}: threads {[max(each) for each in threads]}",
                ),
            ]
            figures.append(
                f"{medians[0] / 2**20:.0f} to {medians[-1] / 2**20:.0f} MiB ({change:.2%}), "
                f"{max(files[0])} to {max(files[-1])} files, {max(threads[0])} to {max(threads[-1])} threads"
            )
        expected = 1 + 2 * WORKERS  # of training and of evaluation
        problems.append(complain(len(lasting) == expected, f"{len(lasting)} processes instead of {expected}"))
        return problems, "; ".join(figures)


def left_in_shared_memory(pids: set[int]) -> list[str]:
    """Return the files that bear the number of one of the run's processes in their names, as torch's do."""
    return [name for name in os.listdir("/dev/shm") if pids & {int(number) for number in re.findall(r"\d+", name)}]


def body(table, args, base: Path) -> None:
    updates = 100 if args.short else args.updates
    with table.row(f"{updates} updates in {EPOCHS} epochs, {WORKERS} loading processes", "watched") as row:
        data = make_data(base / "data", train=updates // EPOCHS * BATCH // 4, val=10)
        folder = base / "run"
        settings = {"epochs": EPOCHS, "batch-size": BATCH, "num_workers": WORKERS, "checkpoint-interval": 0}
        run, begin = Started(command(words(data, folder, **settings)), base / "out"), time.monotonic()
        watch = Watch(run, folder)
        code = watch.until_the_end(LIMIT_S + 0.15 * updates)
        watch.read_files()
        changes, figures = watch.compare(*(SHORT_LIMITS if args.short else LIMITS))
        row.check(
            complain(code == 0, f"exit {code}: {run.stderr()[-300:]}"),
            *watch.problems[:3],
            *changes,
            complain(watch.epochs == EPOCHS, f"{watch.epochs} epochs in log.txt"),
            complain(status(folder)["state"] == "finished", f"status.json: {status(folder)}"),
            complain(not left_in_shared_memory(watch.pids), f"/dev/shm: {left_in_shared_memory(watch.pids)}"),
        )
        each = re.search(r"^(\d+) updates an epoch", run.stdout(), re.M)[1]
        row.notes = (
            f"{each} updates an epoch, {time.monotonic() - begin:.0f} s, files read {watch.reads} times; {figures}"
        )


if __name__ == "__main__":
    run_program(__doc__, body, lambda parser: parser.add_argument("--updates", type=int, default=5120, metavar="N"))
