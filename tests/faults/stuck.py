"""Processes that die or hang: python tests/faults/stuck.py

A data-loading process killed or stopped, a training process killed or stopped, the launcher killed. All must end within
their time, with a line that says which process it was; afterwards the run is continued, and ends with the bits of one
that nobody disturbed.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from common import (
    Started,
    alive,
    command,
    complain,
    descendants,
    error_lines,
    make_data,
    ranks,
    result,
    run_program,
    status,
    words,
)

LOADER_S, DIST_S, SHUTDOWN_S, LAUNCHER_S = 5, 6, 5, 5


class Scene:
    """A run of so many training processes, and what an undisturbed one ends with."""

    def __init__(self, base: Path, *, processes: int, epochs: int = 4):
        self.base, self.processes = base, processes
        self.data = make_data(base / "data", train=20, val=10)
        self.options = {
            "epochs": epochs,
            "num_workers": 1 if processes > 1 else 2,
            "loader-timeout": LOADER_S,
            "dist-timeout": DIST_S,
        }
        self.launcher = (f"--shutdown-timeout={SHUTDOWN_S}",)
        whole = self.start(base / f"whole-{processes}")
        if whole.wait() != 0:
            raise RuntimeError(f"the undisturbed run failed: {whole.stderr()[-500:]}")
        self.expected = result(base / f"whole-{processes}")

    def start(self, folder: Path) -> Started:
        return Started(
            command(words(self.data, folder, **self.options), processes=self.processes, launcher=self.launcher),
            self.base / "out",
        )

    def disturb(
        self,
        name: str,
        act: Callable[[Started], list[int]],
        *,
        within: float,
        says: str,
        rc: tuple[int, ...] = (1,),
        at: str = "Epoch: [1]",
    ) -> list[str]:
        """Start a run, do `act` to it when it has printed `at`, and return the problems. `act` gives the processes that
        must be gone at the end.
        """
        folder = self.base / name
        run = self.start(folder)
        if not run.wait_for(lambda: at in run.stdout()):
            return [f"it ended too early: {run.stderr()[-300:]}"]
        watched = act(run)
        begin = time.monotonic()
        code = run.wait(within + 60)
        took = time.monotonic() - begin
        while time.monotonic() < begin + within and any(alive(pid) for pid in watched):
            time.sleep(0.05)
        lost = [pid for pid in watched if alive(pid)]
        for pid in lost:  # of a scene that went wrong
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        said = " | ".join(error_lines(run.stderr()))
        problems = [
            complain(code in rc, f"{name}: exit {code}: {run.stderr()[-300:]}"),
            complain(took <= within, f"{name}: it took {took:.0f} s, expected {within}"),
            complain(not lost, f"{name}: processes {lost} are left after {within} s"),
            complain(re.search(says, said) is not None, f"{name}: it said {said!r}"),
            complain(
                "Traceback (most recent call last)" not in run.stderr().split("torch/distributed")[0],
                f"{name}: a traceback",
            ),
        ]
        self.seconds = took
        again = self.start(folder)
        code = again.wait()
        problems.append(complain(code == 0, f"{name}: it did not continue (exit {code}): {again.stderr()[-300:]}"))
        if code == 0:
            problems.append(
                complain(result(folder) == self.expected, f"{name}: other bits or another log than the undisturbed run")
            )
            problems.append(complain(status(folder)["state"] == "finished", f"{name}: status {status(folder)}"))
        return problems


def loaders(run: Started) -> list[int]:
    """The data-loading processes of a run of one training process."""
    return [pid for pid in descendants(run.process.pid) if "main.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def send(number: int, find: Callable[[Started], int]) -> Callable[[Started], list[int]]:
    def act(run: Started) -> list[int]:
        target, family = find(run), run.family()
        os.kill(target, number)
        return family

    return act


def scene(table, what: str, form: str, base: Path, processes: int, **how: object) -> None:
    with table.row(what, form) as row:
        prepared = SCENES.setdefault(processes, None) or Scene(base, processes=processes)
        SCENES[processes] = prepared
        row.check(*prepared.disturb(re.sub(r"\W+", "-", what), **how))
        row.notes = f"ended after {prepared.seconds:.1f} s"


SCENES: dict[int, Scene | None] = {}


def body(table, args, base: Path) -> None:
    gone, stopped = r"\(pid \d+\) is gone", r"\(pid \d+\) is stopped"
    one = dict(base=base, processes=1)
    two = dict(base=base, processes=2)
    loader = dict(within=15, says=r"data loading failed \(DataLoader worker \(pid\(?s?\)? \d+\)")
    scene(
        table,
        "a data-loading process killed",
        "SIGKILL",
        **one,
        act=send(signal.SIGKILL, lambda run: loaders(run)[0]),
        **loader,
    )
    stuck = dict(within=15, says=r"data loading failed \(DataLoader timed out after 5 seconds \[.*pid \d+ is stopped")
    scene(
        table,
        "a data-loading process stopped",
        "SIGSTOP",
        **one,
        act=send(signal.SIGSTOP, lambda run: loaders(run)[0]),
        **stuck,
    )
    if args.short:
        return
    idle = dict(stuck, at="Epoch: [0] Total time")
    scene(
        table,
        "a training's data-loading process stopped in the evaluation",
        "SIGSTOP",
        **one,
        act=send(signal.SIGSTOP, lambda run: min(loaders(run))),
        **idle,
    )
    rank = dict(within=DIST_S + SHUTDOWN_S + 15)
    kill, stop = signal.SIGKILL, signal.SIGSTOP
    scene(
        table,
        "training process 1 killed",
        "SIGKILL",
        **two,
        act=send(kill, lambda run: ranks(run.process.pid)[1]),
        says=gone,
        **rank,
    )
    scene(
        table,
        "training process 0 killed",
        "SIGKILL",
        **two,
        act=send(kill, lambda run: ranks(run.process.pid)[0]),
        says=gone,
        **rank,
    )
    scene(
        table,
        "training process 1 stopped",
        "SIGSTOP",
        **two,
        act=send(stop, lambda run: ranks(run.process.pid)[1]),
        says=stopped,
        **rank,
    )
    launcher = dict(within=LAUNCHER_S, says="", rc=(-9,))
    scene(table, "the launcher killed", "SIGKILL", **two, act=send(kill, lambda run: run.process.pid), **launcher)


if __name__ == "__main__":
    run_program(__doc__, body)
