"""Two machines, of which one dies or loses the network: python tests/faults/machines.py

Two network namespaces, joined by a pair of virtual interfaces, stand for the machines; the second has host name and
process numbers of its own. They train together, under torchrun's static and its c10d rendezvous, with the bits and the
exact evaluation of two processes on one machine. When one is killed, the other ends with one line, and continues alone.
When the link goes down in the middle of the training, both end after --dist-timeout with one line, and continue
together: started again by hand, or by torchrun's --max-restarts, which also outlives a process that is killed. Skipped
where namespaces are not allowed.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common import ROOT, Started, command, complain, error_lines, make_data, ranks, result, run_program, status, words

DIST_S, ADDRESSES = 15, ("10.77.0.1", "10.77.0.2")
LINE_S, LAUNCHER_S = 5, 75  # the most that the line takes after its cause, and that torchrun takes after the line
DOWN_S = (5, 25)  # how long the link stays down after both lines: less and more than restarted processes wait here
GONE = "^main.py: error: no answer from another process of this run"


def unsupported_reason() -> str:
    """Return why there can be no two machines here; empty if there can."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if sys.platform != "linux" or missing:
        return f"no {' and no '.join(missing) or 'Linux'} here"
    name = f"twins-{os.getpid()}-try"
    try:
        for line in (["ip", "netns", "add", name], ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "true"]):
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                return f"namespaces are not allowed here ({done.stderr.strip()[:100]})"
        return ""
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


class Machines:
    """Two network namespaces with a link between them."""

    def __init__(self):
        number = os.getpid() % 10**6
        self.names, self.links = [[f"twins-{number}-{k}" for k in (1, 2)], [f"tw{number}v{k}" for k in (1, 2)]]

    def __enter__(self) -> "Machines":
        try:
            for name in self.names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
            for name, link, address in zip(self.names, self.links, ADDRESSES):
                ip("link", "set", link, "netns", name)
                ip("-n", name, "address", "add", f"{address}/24", "dev", link)
                ip("-n", name, "link", "set", link, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for name in self.names:  # the links end with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def line(self, machine: int, program: list[str]) -> list[str]:
        """Return the words that start a program on a machine."""
        inside = ["ip", "netns", "exec", self.names[machine]]
        if machine == 1:  # a computer of its own: with it ends all that runs on it
            inside += ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
            inside += ["sh", "-c", 'hostname second; exec "$@"', "sh"]
        return [*inside, *program]

    @contextlib.contextmanager
    def running(self, folder: Path, options: list[str], rendezvous: str, *launcher: str) -> Iterator[list[Started]]:
        """Start main.py on both, a process each; kill what is left at the end. launcher: more options of torchrun."""
        runs = []
        try:
            for machine in (0, 1):
                program = [sys.executable, *torchrun(rendezvous, machine), *launcher, str(ROOT / "main.py"), *options]
                env = {"GLOO_SOCKET_IFNAME": self.links[machine]}
                runs.append(Started(self.line(machine, program), folder / f"out-{machine}", **env))
            yield runs
        finally:
            for run in runs:
                if run.process.poll() is None:
                    run.kill()

    @contextlib.contextmanager
    def link_down(self) -> Iterator[None]:
        link = ["-n", self.names[0], "link", "set", self.links[0]]
        ip(*link, "down")
        try:
            yield
        finally:
            ip(*link, "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def torchrun(rendezvous: str, machine: int) -> list[str]:
    line = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    if rendezvous == "static":
        return [*line, f"--node_rank={machine}", f"--master_addr={ADDRESSES[0]}", "--master_port=29500"]
    # torchrun looks for the host of its store by names, which namespaces share.
    line += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29500", "--rdzv-id=twins"]
    return [*line, f"--rdzv-conf=is_host={1 - machine}", f"--local-addr={ADDRESSES[machine]}"]


class Scenes:
    def __init__(self, base: Path, machines: Machines):
        self.base, self.machines = base, machines
        self.data = make_data(base / "data", train=20, val=5)  # 20 images of val, in batches of 3
        whole = Started(command(self.options(base / "whole"), processes=2), base / "out")
        if whole.wait() != 0:
            raise RuntimeError(f"the run on one machine failed: {whole.stderr()[-500:]}")
        self.expected = result(base / "whole")

    def options(self, folder: Path, **changes: object) -> list[str]:
        return words(self.data, folder, **{"epochs": 4, "dist-timeout": DIST_S} | changes)

    def together(self, folder: Path, rendezvous: str) -> list[str]:
        """Let both train to the end; return the problems."""
        with self.machines.running(self.base, self.options(folder), rendezvous) as runs:
            codes = [run.wait() for run in runs]
        if codes != [0, 0]:
            return [f"exit {codes}: {runs[0].stderr()[-300:]} {runs[1].stderr()[-300:]}"]
        return [complain(result(folder) == self.expected, "other bits or scores than two processes on one machine")]

    def evaluation(self) -> list[str]:
        """Score the same weights on both machines and in one process; return the problems."""
        weights = ["--eval", "--resume", str(self.base / "whole" / "checkpoint.pth"), "--device", "cpu"]
        weights += ["--data-path", str(self.data), "--num_workers", "0", "--batch-size", "2"]
        alone = Started(command(weights), self.base / "out")
        with self.machines.running(self.base, [*weights, "--dist-eval"], "static") as runs:
            codes = [alone.wait(), *(run.wait() for run in runs)]
        scores = [re.findall(r"^\* Acc@1 .*", run.stdout(), re.M) for run in (alone, runs[0])]
        return [
            complain(codes == [0, 0, 0], f"exit {codes}: {runs[0].stderr()[-300:]}"),
            complain(len(scores[0]) == 1 and scores[0] == scores[1], f"other scores than one process has: {scores}"),
        ]

    def killed(self) -> tuple[list[str], str]:
        """Kill the second machine; the first ends, and continues alone with the same global batch."""
        folder = self.base / "killed"
        with self.machines.running(self.base, self.options(folder), "static") as runs:
            if not runs[0].wait_for(lambda: "Epoch: [1]" in runs[0].stdout()):
                return [f"it ended too early: {runs[0].stderr()[-300:]}"], ""
            runs[1].kill()
            problems, took = self.end(runs[:1], LINE_S)
        alone = self.machines.line(0, command(self.options(folder, **{"batch-size": 4})))
        again = Started(alone, self.base / "out")
        code = again.wait()
        problems += [
            complain(code == 0, f"it did not continue alone (exit {code}): {again.stderr()[-300:]}"),
            complain(bool(re.search("resume: .*2 processes", again.stdout())), "no line about the number of processes"),
            complain(status(folder)["state"] == "finished", f"status.json: {status(folder)}"),
        ]
        return problems, f"the other one's line after {took:.1f} s"

    def unplugged(self) -> tuple[list[str], str]:
        """Take the link down; both end, and continue when it is up again."""
        folder = self.base / "unplugged"
        with self.machines.running(self.base, self.options(folder), "static") as runs:
            if not runs[0].wait_for(lambda: "Epoch: [1]" in runs[0].stdout()):
                return [f"it ended too early: {runs[0].stderr()[-300:]}"], ""
            with self.machines.link_down():
                problems, took = self.end(runs, DIST_S + LINE_S)
        problems.append(complain(status(folder)["state"] == "failed", f"status.json: {status(folder)}"))
        return problems + self.together(folder, "static"), f"both lines after {took:.1f} s"

    def restarted(self, rendezvous: str) -> tuple[list[str], str]:
        """Kill the second machine's training process; torchrun restarts both."""
        folder = self.base / f"restarted-{rendezvous}"
        with self.machines.running(self.base, self.options(folder), rendezvous, "--max-restarts=3") as runs:
            if not runs[0].wait_for(lambda: "Epoch: [1]" in runs[0].stdout()):
                return [f"it ended too early: {runs[0].stderr()[-300:]}"], ""
            os.kill(ranks(runs[1].process.pid)[1], signal.SIGKILL)
            begin = time.monotonic()
            problems = self.finished(folder, runs)
            return problems, f"ended {time.monotonic() - begin:.0f} s after the kill"

    def finished(self, folder: Path, runs: list[Started]) -> list[str]:
        """Wait for the end of restarted runs; return the problems."""
        codes = [run.wait() for run in runs]
        if codes != [0, 0]:
            return [f"exit {codes}: {[error_lines(run.stderr()) for run in runs]}"]
        return [complain(result(folder) == self.expected, "other bits than two processes on one machine")]

    def plugged_in_again(self, down: float) -> tuple[list[str], str]:
        """Take the link down, and up again after both lines and `down` seconds; torchrun restarts both."""
        folder = self.base / f"plugged-in-{down:g}"
        with self.machines.running(self.base, self.options(folder), "static", "--max-restarts=3") as runs:
            if not runs[0].wait_for(lambda: "Epoch: [1]" in runs[0].stdout()):
                return [f"it ended too early: {runs[0].stderr()[-300:]}"], ""
            begin = time.monotonic()
            with self.machines.link_down():
                for run in runs:
                    run.wait_for(lambda run=run: error_lines(run.stderr()))
                time.sleep(down)
            took, problems = time.monotonic() - begin, self.finished(folder, runs)
            counts = ", ".join(str(len(error_lines(run.stderr()))) for run in runs)
        return problems, f"down for {took:.0f} s; lines of the two machines: {counts}"

    def end(self, runs: list[Started], within: float) -> tuple[list[str], float]:
        """Wait for the one line of each run, and for its end; return the problems, and when the last line came."""
        begin = time.monotonic()
        for run in runs:
            run.wait_for(lambda run=run: error_lines(run.stderr()))
        took, problems = time.monotonic() - begin, []
        for run in runs:
            code, lines = run.wait(LAUNCHER_S), error_lines(run.stderr())
            problems.append(complain(code == 1, f"exit {code}"))
            problems.append(complain(len(lines) == 1 and bool(re.search(GONE, lines[0])), f"it said {lines}"))
        return [*problems, complain(took <= within, f"the line took {took:.0f} s, expected {within}")], took


def body(table, args, base: Path) -> None:
    if reason := unsupported_reason():
        table.skip("two machines", reason)
        return
    with Machines() as machines:
        scenes = Scenes(base, machines)
        with table.row("one of two machines killed", "SIGKILL to all of a namespace") as row:
            problems, row.notes = scenes.killed()
            row.check(*problems)
        if args.short:
            return
        for rendezvous in ("static", "c10d"):
            with table.row("training on two machines", f"network namespaces, {rendezvous} rendezvous") as row:
                row.check(*scenes.together(base / rendezvous, rendezvous))
            with table.row("one of two processes killed", f"SIGKILL; {rendezvous}, --max-restarts=3") as row:
                problems, row.notes = scenes.restarted(rendezvous)
                row.check(*problems)
        with table.row("evaluation on two machines", "network namespaces") as row:
            row.check(*scenes.evaluation())
        with table.row("the link between two machines down", "ip link set down") as row:
            problems, row.notes = scenes.unplugged()
            row.check(*problems)
        for down in DOWN_S:
            with table.row("the link down and up again", "ip link set down, up; --max-restarts=3") as row:
                problems, row.notes = scenes.plugged_in_again(down)
                row.check(*problems)


if __name__ == "__main__":
    run_program(__doc__, body)
