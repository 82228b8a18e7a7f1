"""The work folder of a training run: one run at a time, mmengine's checkpoints, and main.py's status.json."""

import contextlib
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.runner import Runner

from training import files
from training.errors import UserError
from training.run_folder import RunFolder

LAST = "last_checkpoint"  # the file with the newest checkpoint's name
CHECKPOINTS = ("iter_*.pth", "epoch_*.pth")  # which can be resumed


class WorkFolder(RunFolder):
    OPTION, RESUME = "--work-dir", "--resume-from"

    def run_files(self) -> list[Path]:
        found = (path for pattern in (LAST, *CHECKPOINTS, "best_*.pth") for path in self.path.glob(pattern))
        return sorted(found, key=lambda path: path.name != LAST)

    def check_free(self) -> None:
        if taken_by := files.owner(self.path):
            raise UserError(files.in_use(self.path, taken_by, self.OPTION))

    def checkpoint_of(self, source: str | None) -> str | None:
        """Return the file to resume from: itself, or the newest of a folder; None or "auto" is this one.

        Returns None if this folder has none; raises UserError for another folder without one.
        """
        own = source in (None, "auto")
        if not own and not Path(source).is_dir():
            return source
        path = newest(self.path if own else Path(source))
        if path is None and not own:
            raise UserError(
                f"no checkpoint in the folder (--resume-from {source}): expected {' or '.join(CHECKPOINTS)}"
            )
        return path and str(path)


def newest(folder: Path) -> Path | None:
    """Return the checkpoint that LAST names, in the folder itself if it was moved; without LAST, the last written."""
    with contextlib.suppress(OSError):
        named = Path((folder / LAST).read_text().strip())
        if found := [path for path in (folder / named.name, named) if path.is_file()]:
            return found[0]
    found = [path for pattern in CHECKPOINTS for path in folder.glob(pattern)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


class OpenFolder(Hook):
    """Open the work folder after all checks, for as long as `stack` is: an earlier run's files stay until then."""

    priority = "LOWEST"

    def __init__(self, folder: WorkFolder, stack: contextlib.ExitStack):
        self.folder, self.stack = folder, stack

    def before_train(self, runner: Runner) -> None:
        self.note_progress(runner, runner.epoch, runner.iter)
        self.stack.enter_context(self.folder.open(dict))
        Runner.dump_config(runner)
        if runner.validate_first and runner.val_loop is not None:
            runner.val_loop.run()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.note_progress(runner, checkpoint["meta"]["epoch"], checkpoint["meta"]["iter"])

    def note_progress(self, runner: Runner, epochs: int, iterations: int) -> None:
        updates = iterations - epochs * runner.epoch_length
        self.folder.status.progress = {"epoch": epochs - 1, "updates": updates}
