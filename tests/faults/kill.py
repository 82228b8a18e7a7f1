"""kill -9 of a whole run, and signals that ask it to end, at seeded random times; each time it is continued: python
tests/faults/kill.py

In the end the state and the log must be those of a run that nobody stopped. 200 updates, saved every 5, on 2 processes
and on 4. Some kills are aimed: inside a save (its unfinished file must be left in the folder), and inside an
evaluation.
"""

import os
import random
import re
import signal
import time
from pathlib import Path

from common import CLASSES, Row, Started, command, complain, make_data, ranks, result, run_program, status, words

UPDATES_EPOCH, BATCH = 20, 2  # a process's batch


def stepping(run: Started) -> bool:
    return "Epoch: [" in run.stdout()


def in_evaluation(run: Started) -> bool:
    """The last lines are of an evaluation that has not ended."""
    tail = run.stdout()[-600:]
    return "Test:" in tail.rpartition("Averaged stats")[2] and "* Acc@1" not in tail.rpartition("Averaged stats")[2]


class Killer:
    def __init__(self, base: Path, *, processes: int, epochs: int, seed: int):
        self.base, self.processes, self.random = base, processes, random.Random(seed)
        images = UPDATES_EPOCH * BATCH * processes // len(CLASSES)
        self.data = make_data(base / f"data-{processes}", train=images, val=10)
        self.options = {"epochs": epochs, "batch-size": BATCH}
        self.cycle, self.counts = 0, {"inside a save": 0, "in an evaluation": 0, "anywhere": 0}
        whole = base / f"whole-{processes}"
        if not (whole / "log.txt").exists():
            run = Started(command(words(self.data, whole, **self.options), processes=processes), base / "out")
            if run.wait() != 0:
                raise RuntimeError(f"the run that nobody stops failed: {run.stderr()[-500:]}")
        self.expected = result(whole)

    def folder(self) -> Path:
        return self.base / f"run-{self.processes}-{self.cycle}"

    def start(self) -> Started:
        line = command(words(self.data, self.folder(), **self.options), processes=self.processes)
        return Started(line, self.base / "out")

    def finished(self) -> bool:
        return (self.folder() / "status.json").exists() and status(self.folder())["state"] == "finished"

    def compare(self) -> str:
        """Let the run end; what differs from the run that nobody stopped, in words."""
        if not self.finished():
            run = self.start()
            code = run.wait()
            if code != 0:
                return f"it did not continue (exit {code}): {run.stderr()[-300:]}"
        state, log = result(self.folder())
        same = complain(state == self.expected[0], "other bits than the run that nobody stopped") + complain(
            log == self.expected[1], "another log"
        )
        return same + complain(not list(self.folder().glob(".*.tmp")), "an unfinished file is left")

    def strike(self, kind: str) -> bool:
        """Start or continue the run, and kill it at a moment of this kind; False where it ended before."""
        run = self.start()
        delay = self.random.uniform(0.0, 0.8)
        if not run.wait_for(lambda: stepping(run) or self.finished()):
            return False
        unfinished = list(self.folder().glob(".*.tmp"))
        if kind == "inside a save":
            skip = {path.name for path in unfinished}
            hit = run.wait_for(lambda: [p for p in self.folder().glob(".checkpoint*.tmp") if p.name not in skip])
        elif kind == "in an evaluation":
            hit = run.wait_for(lambda: in_evaluation(run))
        else:
            end = time.monotonic() + delay
            hit = run.wait_for(lambda: time.monotonic() > end)
        if not hit:
            return False
        evaluating = in_evaluation(run)
        run.kill()
        left = [path for path in self.folder().glob(".checkpoint*.tmp") if path not in unfinished]
        sort = "inside a save" if left else "in an evaluation" if evaluating and in_evaluation(run) else "anywhere"
        self.counts[sort] += 1
        return True


def kills(
    row: Row, base: Path, *, processes: int, total: int, saves: int, evaluations: int, epochs: int, seed: int
) -> None:
    killer = Killer(base, processes=processes, epochs=epochs, seed=seed)
    least = {"inside a save": saves, "in an evaluation": evaluations, "anywhere": 0}
    plan = [
        *["inside a save"] * saves,
        *["in an evaluation"] * evaluations,
        *["anywhere"] * (total - saves - evaluations),
    ]
    killer.random.shuffle(plan)
    done, problems = 0, []
    while plan:
        kind = plan.pop()
        if killer.strike(kind):
            done += 1
        else:  # the run had ended: its result counts, and the next run begins
            plan.append(kind)
            problems.append(killer.compare())
            killer.cycle += 1
        if not plan:  # an aimed kill may have come too late
            plan = [kind for kind, number in least.items() if killer.counts[kind] < number]
        if done + killer.cycle > 3 * total:
            raise RuntimeError(f"the awaited step does not come: {killer.counts}")
    problems.append(killer.compare())
    for _ in range(done):  # each was survived where all runs ended right
        row.check(*problems)
    kinds = ", ".join(f"{number} {kind}" for kind, number in killer.counts.items())
    row.notes = f"{done} kills in {killer.cycle + 1} runs: {kinds}"


def signals(row: Row, base: Path, *, total: int, epochs: int, seed: int) -> None:
    """SIGTERM and SIGUSR1, to the launcher and to one process: all agree on the update, save, and end with 143."""
    killer = Killer(base, processes=2, epochs=epochs, seed=seed)
    killer.cycle, slowest, number = 1000, 0.0, 0
    launcher = ("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",)  # the launcher passes on those only
    while number < total:
        name = ("SIGTERM", "SIGUSR1")[number // 2 % 2]
        run = Started(
            command(words(killer.data, killer.folder(), **killer.options), processes=2, launcher=launcher), base / "out"
        )
        if not run.wait_for(lambda run=run: stepping(run) or killer.finished()) or killer.finished():
            run.wait()
            row.check(killer.compare())
            killer.cycle += 1
            continue
        target = run.process.pid if number % 2 == 0 else ranks(run.process.pid)[number // 2 % 2]
        time.sleep(killer.random.uniform(0.0, 0.8))
        begin = time.monotonic()
        os.kill(target, signal.Signals[name])
        code, took = run.wait(), time.monotonic() - begin
        if killer.finished():
            continue  # it came too late
        number, slowest = number + 1, max(slowest, took)
        said = re.findall(r"main.py: stopped: stopped by .* after (\d+ epochs and \d+ updates)", run.stderr())
        row.check(
            complain(
                code == 1 and status(killer.folder())["state"] == "preempted",
                f"{name}: exit {code}, {status(killer.folder())}",
            ),
            complain(
                len(said) == 2 and len(set(said)) == 1, f"{name}: the processes said {said}: {run.stderr()[-300:]}"
            ),
            complain(
                run.stderr().count("exitcode  : 143") >= 1 or target == run.process.pid,
                f"{name}: {run.stderr()[-300:]}",
            ),
            complain(took < 20, f"{name}: it took {took:.0f} s"),
        )
    row.check(killer.compare())
    row.notes = f"the slowest end took {slowest:.1f} s"


def body(table, args, base: Path) -> None:
    if args.short:
        with table.row("kill -9 of the run, 2 processes", "SIGKILL to the launcher and all its processes") as row:
            kills(row, base, processes=2, total=3, saves=1, evaluations=1, epochs=2, seed=args.seed)
        with table.row("SIGTERM and SIGUSR1, 2 processes", "to the launcher and to one process") as row:
            signals(row, base, total=2, epochs=2, seed=args.seed)
        return
    with table.row(
        "kill -9 of the run, 2 processes, 200 updates", "SIGKILL to the launcher and all its processes"
    ) as row:
        kills(row, base, processes=2, total=20, saves=5, evaluations=2, epochs=10, seed=args.seed)
    with table.row(
        "kill -9 of the run, 4 processes, 200 updates", "SIGKILL to the launcher and all its processes"
    ) as row:
        kills(row, base, processes=4, total=5, saves=1, evaluations=1, epochs=10, seed=args.seed)
    with table.row("SIGTERM and SIGUSR1, 2 processes, 200 updates", "to the launcher and to one process") as row:
        signals(row, base, total=10, epochs=10, seed=args.seed)


if __name__ == "__main__":
    run_program(__doc__, body)
