"""A run's folder: opened by one run at a time, with its records, its log, and what became of the run."""

import contextlib
import datetime
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from training import files
from training.errors import Preempted, UserError, short_reason
from training.outputs import csv_lines
from training.processes import explain, is_lost_process
from utils import all_gather, in_main_process, is_main_process, warn

NON_FINITE = "non_finite.json"  # which images a step had whose loss was not finite
RUN_FILES = (files.CHECKPOINT, files.BEST, files.LOG)  # a folder with one of them holds a run


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Status:
    """status.json: {"state": running | finished | preempted | failed, "reason", "epoch", "updates", "by", "started",
    "time"}.

    A failure is written by the process that had it; those that only notice that another one is gone leave its reason.
    Nothing is written once the path leads to another folder than it did when `remember` was called.
    """

    def __init__(self, folder: Path, started: str):
        self.path, self.started, self.progress = Path(folder) / files.STATUS, started, {"epoch": -1, "updates": 0}
        self.identity = None

    def remember(self) -> None:
        with contextlib.suppress(OSError):  # the other machines of a run need not see the folder
            self.identity = self._identity()

    def is_elsewhere(self) -> bool:
        """Return True if the path leads to another folder than at `remember`, as after an unmount."""
        try:
            return self.identity is not None and self._identity() != self.identity
        except OSError:  # what writes has an error of its own
            return False

    def _identity(self) -> tuple[int, int]:
        status = self.path.parent.stat()
        return status.st_dev, status.st_ino

    def write(self, state: str, reason: str = "") -> None:
        record = {"state": state, "reason": reason, **self.progress}
        record |= {"by": files.this_process(), "started": self.started, "time": now()}
        if self.is_elsewhere():
            return
        with contextlib.suppress(OSError):  # a full disk has an error of its own, which comes first
            files.write_text(self.path, json.dumps(record, indent=1) + "\n")

    def fail(self, reason: str, *, echo: bool = False) -> None:
        if not (echo and self.has_failed()):
            self.write("failed", reason)

    def has_failed(self) -> bool:
        """Return True if this run's failure has been written already."""
        try:
            record = json.loads(self.path.read_text())
            return record["state"] == "failed" and record["started"] == self.started
        except (OSError, ValueError, KeyError, TypeError):
            return False


class RunFolder:
    """The folder of a run. Every process must make one, and call open and attempt; the main process writes.

    overwrite: replace a run that the folder holds. keep_going: a file that cannot be written is a warning.
    """

    OPTION, RESUME = "--output_dir", "--resume"  # of the command line, for messages

    def __init__(self, path: Path, overwrite: bool = False, keep_going: bool = False):
        self.path, self.overwrite, self.keep_going = path, overwrite, keep_going
        self.unwritten: list[dict] = []  # lines of the log
        self.resumed = False  # from a checkpoint of this folder, which --overwrite then leaves
        self.status, self.reason = Status(path, in_main_process(now)), ""  # why the run ended before its last epoch

    def run_files(self) -> list[Path]:
        """Return the files of a run that the folder holds."""
        named = (self.path / name for name in RUN_FILES)
        return [*(path for path in named if path.exists()), *files.older_checkpoints(self.path)]

    def check_no_run(self) -> None:
        if not self.overwrite and (held := self.run_files()):
            advice = f"{self.RESUME} it, or --overwrite it, or choose another {self.OPTION}"
            raise UserError(f"the folder holds a run ({held[0]}): {advice}")

    @contextlib.contextmanager
    def open(self, records: Callable[[], dict[str, object]]) -> Iterator[None]:
        """Own the folder, write `records` (text, or values for JSON), and keep status.json up to date until the end."""
        in_main_process(lambda: self._open(records()))
        self.status.remember()
        if is_main_process():
            self.status.write("running")
        try:
            yield
            if is_main_process():
                self.status.write("finished", self.reason)
        except Preempted as error:
            if is_main_process():
                self.status.write("preempted", str(error))
            raise
        except BaseException as error:
            _, reason = explain(error) or (1, short_reason(error, 300))
            self.status.fail(reason, echo=is_lost_process(error))
            raise
        finally:
            if is_main_process():
                self.lock.release()

    def _open(self, records: dict[str, object]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = files.Lock(self.path)
            if self.lock.taken_by is None:
                files.remove_unfinished(self.path)
        except OSError as error:
            raise UserError(f"cannot make the folder ({self.OPTION} {self.path}): {error.strerror}") from error
        if self.lock.taken_by is not None:
            raise UserError(files.in_use(self.path, self.lock.taken_by, self.OPTION))
        if self.overwrite and not self.resumed:
            for path in self.run_files():
                path.unlink(missing_ok=True)
        if not self.resumed:
            (self.path / files.BAD_IMAGES).unlink(missing_ok=True)
        for name, record in records.items():
            self.write(name, record if isinstance(record, str) else json.dumps(record, indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        self.check_same()
        try:
            files.write_text(self.path / name, text)
        except OSError as error:
            advice = "make room and continue with --resume auto"
            raise UserError(f"cannot write ({self.path / name}): {error.strerror}; {advice}") from error

    def write_log(self, line: dict) -> None:
        """Write a line of JSON for each epoch, and all as a table; one logged before a restart is not logged twice."""
        self.unwritten.append(line)  # until it is written: with --keep-going, the disk may be full for some epochs
        first = self.unwritten[0]["epoch"]
        lines = [earlier for earlier in log_lines(self.path / files.LOG) if earlier["epoch"] < first] + self.unwritten
        self.write(files.LOG, "".join(json.dumps(each) + "\n" for each in lines))
        fields = list(dict.fromkeys(name for each in lines for name in each))
        rows = ({name: each.get(name) for name in fields} for each in lines)
        self.write(files.SUMMARY, "".join(csv_lines(fields, rows)))
        self.unwritten = []

    def check_same(self) -> None:
        """Raise UserError if the path leads to another folder than when the run began."""
        if self.status.is_elsewhere():
            what = f"another folder than when the run began ({self.OPTION} {self.path})"
            raise UserError(f"{what}: if its disk was unmounted, mount it and continue with --resume auto")

    def attempt(self, write: Callable[[], None]) -> bool:
        """Let the main process write. Return True if it could; a UserError is raised in all processes, or a warning."""

        def into_the_same_folder() -> None:
            self.check_same()
            write()

        try:
            in_main_process(into_the_same_folder)
            return True
        except UserError as error:
            if not self.keep_going:
                raise
            warn(f"going on (--keep-going): {error}")
            return False


def record_images(folder: RunFolder, train_loader, size: int, epoch: int, step: int) -> None:
    """Write which images each process had in a step that failed. All processes fail at the same one."""
    train_loader.sampler.set_epoch(epoch, step * size)
    keys = itertools.islice(train_loader.sampler, size)
    shares = all_gather([train_loader.dataset.name(index) for _, _, index in keys])
    record = {"epoch": epoch, "step": step, "images": shares}
    in_main_process(lambda: folder.write(NON_FINITE, json.dumps(record, indent=1) + "\n"))


def log_lines(path: Path) -> list[dict]:
    """Return the lines of a log; skip with a warning what is no line of one, as after a lost end of the file."""
    lines = []
    for number, text in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else []):
        try:
            line = json.loads(text)
            if not isinstance(line["epoch"], int):
                raise ValueError(line["epoch"])
            lines.append(line)
        except (ValueError, TypeError, KeyError):
            warn(f"line {number + 1} of {path} is no line of a log: skipped")
    return lines
