"""What the programs of accidents share: a small run, its processes, what is left in a folder, and a table of what was
tried.

Every program of this folder prints a row for each kind of accident, and ends with 1 where one was not survived. --short
is the form of the everyday tests; --json FILE leaves the rows for the table that `make faults` writes.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

STOPPING = str(HERE / "stopping.py")
TIMES = ("time", "data_time", "images_per_s", "max_memory_mb")
CLASSES = ("ant", "bee", "cat", "dog")
LIMIT_S = 240  # for any one program started here


class Table:
    """Rows of (accident, how it was made, tried, survived, what went wrong first)."""

    def __init__(self, program: str, json_file: str):
        self.program, self.json_file, self.rows, self.start = program, json_file, [], time.perf_counter()

    @contextlib.contextmanager
    def row(self, what: str, form: str) -> Iterator["Row"]:
        row, start = Row(), time.perf_counter()
        try:
            yield row
        except Exception as error:  # of the program of accidents itself: a row that was not survived
            row.lost(repr(error)[:300])
        record = {"program": self.program, "what": what, "form": form, "tried": row.tried, "survived": row.survived}
        record |= {
            "notes": row.notes,
            "first_loss": row.losses[0] if row.losses else "",
            "seconds": round(time.perf_counter() - start, 1),
        }
        self.rows.append(record)
        mark = "ok  " if row.tried == row.survived else "LOST"
        print(
            f"{mark} {what} [{form}]: {row.survived} of {row.tried} survived, {record['seconds']:.0f} s; {row.notes}",
            flush=True,
        )
        for loss in row.losses[:5]:
            print(f"     {loss}", flush=True)

    def skip(self, what: str, why: str) -> None:
        """A row for accidents that cannot be tried here."""
        record = {"program": self.program, "what": what, "form": "skipped", "tried": 0, "survived": 0}
        self.rows.append(record | {"notes": why, "first_loss": "", "seconds": 0.0, "skipped": True})
        print(f"skip {what}: {why}", flush=True)

    def end(self) -> int:
        if self.json_file:
            Path(self.json_file).write_text(json.dumps(self.rows))
        good = [row["tried"] == row["survived"] and (row["tried"] > 0 or "skipped" in row) for row in self.rows]
        return 0 if good and all(good) else 1


class Row:
    def __init__(self):
        self.tried = self.survived = 0
        self.notes, self.losses = "", []

    def kept(self) -> None:
        self.tried, self.survived = self.tried + 1, self.survived + 1

    def lost(self, why: str) -> None:
        self.tried += 1
        self.losses.append(why)

    def check(self, *problems: str) -> None:
        """One accident: survived where no problem has words."""
        found = [problem for problem in problems if problem]
        if found:
            self.lost("; ".join(found))
        else:
            self.kept()


def run_program(
    description: str, body: Callable[[Table, argparse.Namespace, Path], None], add: Callable = lambda parser: None
) -> None:
    """Options, a temporary folder (kept with --keep), the table and the exit code of a program of accidents."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="the form of the everyday tests")
    parser.add_argument("--json", default="", metavar="FILE", help="write the rows there")
    parser.add_argument("--keep", default="", metavar="FOLDER", help="work there and leave everything")
    parser.add_argument("--seed", type=int, default=0)
    add(parser)
    args = parser.parse_args()
    table = Table(Path(sys.argv[0]).name, args.json)
    folder = Path(args.keep or tempfile.mkdtemp(prefix="twins-faults-"))
    folder.mkdir(exist_ok=True)
    try:
        body(table, args, folder)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(table.end())


# ---------------------------------------------------------------- a small run


def make_data(folder: Path, *, train: int, val: int) -> Path:
    """Images of four classes: so many of each class."""
    from conftest import make_images

    if not folder.exists():
        make_images(folder / "train", classes=CLASSES, each=train)
        make_images(folder / "val", classes=CLASSES, each=val, seed=1)
    return folder


def words(data: Path, folder: Path, **changes: object) -> list[str]:
    """Options of a run with everything on that has a state of its own."""
    options = {
        **{"model": "alt_gvt_demo", "input-size": 32, "batch-size": 2, "num_workers": 0, "device": "cpu", "epochs": 3},
        **{"data-path": data, "output_dir": folder, "resume": "auto", "checkpoint-interval": 5},
        # A schedule for so few steps: main.py warns of the default one, and some programs count the lines.
        **{"warmup-epochs": 0, "min-lr": 1e-7},
    } | changes
    flags = ["--repeated-aug", "--model-ema", "--dist-eval"]
    return flags + [part for name, value in options.items() for part in (f"--{name}", str(value))]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def command(
    options: list[str], *, processes: int = 1, where: str = "none", launcher: tuple[str, ...] = ()
) -> list[str]:
    """The words that start a run: under torchrun where it has several processes."""
    program = [STOPPING, where, *options] if where != "none" else [str(ROOT / "main.py"), *options]
    if processes == 1:
        return [sys.executable, *program]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}", *launcher]
    return [sys.executable, *torchrun, *program]


class Started:
    """A program that is running, with what it prints in files."""

    def __init__(self, line: list[str], folder: Path, **env: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / "stdout", folder / "stderr"
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                line, stdout=out, stderr=err, env=environment() | env, cwd=ROOT, start_new_session=True
            )

    def stdout(self) -> str:
        return self.out.read_text(errors="replace")

    def stderr(self) -> str:
        return self.err.read_text(errors="replace")

    def wait_for(self, test: Callable[[], object], seconds: float = LIMIT_S) -> bool:
        """Wait until `test` gives something true; False if the program ends first."""
        end = time.monotonic() + seconds
        while not test():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                raise TimeoutError(
                    f"nothing happened for {seconds} s: {self.stdout()[-200:]!r} {self.stderr()[-300:]!r}"
                )
            time.sleep(0.002)
        return True

    def wait(self, seconds: float = LIMIT_S) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(
                f"it did not end in {seconds} s: {self.stdout()[-200:]!r} {self.stderr()[-300:]!r}"
            ) from None

    def family(self) -> list[int]:
        """The program and all processes that descend from it."""
        return [self.process.pid, *descendants(self.process.pid)]

    def kill(self) -> list[int]:
        """SIGKILL for all of them at once, unless the program has ended."""
        if self.process.poll() is not None:
            return []
        pids = self.family()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return pids


def descendants(pid: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parents.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(
                    int(entry.name)
                )
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def ranks(pid: int) -> dict[int, int]:
    """The training processes under a launcher: rank -> pid."""
    found = {}
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            env = dict(
                part.partition("=")[::2]
                for part in Path(f"/proc/{child}/environ").read_text(errors="replace").split("\0")
            )
            line = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            if "RANK" in env and any(word.endswith(("main.py", "stopping.py")) for word in line[:4]):
                found.setdefault(int(env["RANK"]), child)  # its loading processes, which look alike, come later
    return found


def alive(pid: int) -> bool:
    from training.processes import process_state

    return process_state(pid) != "gone"


# ---------------------------------------------------------------- what is left


def result(folder: Path) -> tuple[str, list[dict]]:
    """A finished run: the digest of its state, and its log without times and memory."""
    from tools.checkpoint_hash import digest
    from training import checkpoint

    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return digest(checkpoint.load(folder / "checkpoint.pth")), [
        {k: v for k, v in line.items() if k not in TIMES} for line in lines
    ]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def contents(folder: Path) -> dict[str, str]:
    """The hash of each file, but for the lock and what became of the run, which every start may write."""
    skip = (".lock", "status.json")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in skip]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def error_lines(text: str) -> list[str]:
    """What main.py said on its error stream; the launcher's own words left out."""
    return [line for line in text.splitlines() if line.startswith("main.py: ")]


def complain(condition: bool, words: str) -> str:
    """`words` where the condition fails."""
    return "" if condition else words
