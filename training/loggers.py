"""What a run tells of each epoch beside log.txt and summary.csv: curves.png, TensorBoard, Weights & Biases.

None of them can end a run: one that fails is warned of once, and left out from then on.
"""

import gc
import os
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from training import curves, files
from training.errors import UserError, library_reason
from training.options import Options
from training.run_folder import RunFolder, log_lines
from utils import is_main_process, log, warn

CURVES, TENSORBOARD, WANDB_ID = "curves.png", "tb", "wandb_id.txt"
PACKAGES = {"log_tensorboard": "tensorboard", "log_wandb": "wandb"}  # by the option that needs them


def check_packages(args: Options) -> None:
    """Raise UserError if a logger is asked for whose package is missing."""
    for name, package in PACKAGES.items():
        if getattr(args, name) and find_spec(package) is None:
            raise UserError(f"{package} is missing (--{name.replace('_', '-')}): pip install {package}")


class Curves:
    """Draw curves.png again after each epoch."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, line: dict) -> None:
        self.draw(log_lines(self.folder / files.LOG))
        gc.collect()  # figures are cycles of megabytes, and would stay until Python looks for cycles by itself

    def draw(self, epochs: list[dict]) -> None:
        figure = curves.draw(epochs, f"{self.folder.resolve().name}: {len(epochs)} epochs")
        files.atomic_write(self.folder / CURVES, lambda file: figure.savefig(file, format="png", dpi=100))

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files in tb/. Those of epochs that a resumed run trains again are hidden."""

    def __init__(self, folder: Path, first_epoch: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=str(folder / TENSORBOARD), purge_step=first_epoch)

    def write(self, line: dict) -> None:
        for name, value in numbers(line).items():
            self.writer.add_scalar(name, value, global_step=line["epoch"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of wandb, which a resumed run continues; WANDB_MODE=offline and the other variables of wandb hold."""

    def __init__(self, folder: Path, args: Options, *, resumed: bool):
        import wandb

        path = folder / WANDB_ID
        if not (resumed and path.is_file()):
            files.write_text(path, uuid.uuid4().hex[:8] + "\n")
        project = os.environ.get("WANDB_PROJECT", "twins")
        settings = dict(id=path.read_text().strip(), resume="allow", dir=str(folder), config=args.stored)
        self.run = wandb.init(project=project, name=folder.resolve().name, **settings)

    def write(self, line: dict) -> None:
        self.run.log(numbers(line), step=line["epoch"])

    def close(self) -> None:
        self.run.finish()


def numbers(line: dict) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "epoch" and isinstance(value, (int, float))}


class Loggers:
    """The loggers of a run, in its main process; none in the others."""

    def __init__(self, folder: RunFolder, args: Options, *, first_epoch: int):
        self.active = {}
        path, resumed = folder.path, folder.resumed
        makers: dict[str, Callable] = {CURVES: lambda: Curves(path)}
        if find_spec("matplotlib") is None and is_main_process():
            log(f"no {CURVES}: matplotlib is missing (pip install --requirement requirements-dev.txt)")
            makers.pop(CURVES)
        if args.log_tensorboard:
            makers["TensorBoard"] = lambda: TensorBoard(path, first_epoch)
        if args.log_wandb:
            makers["wandb"] = lambda: Wandb(path, args, resumed=resumed)
        for name, make in makers.items() if is_main_process() else ():
            if (made := self.attempt(name, make)) is not None:
                self.active[name] = made

    def attempt(self, name: str, work: Callable[[], object]) -> object:
        """Return what `work` returns; None after a failure, of which one line is logged."""
        try:
            return work()
        except Exception as error:  # of another library, its network or the disk
            self.active.pop(name, None)
            warn(f"{name} is left out from here on, the run goes on: {library_reason(error)}")
            return None

    def write(self, line: dict) -> None:
        for name, logger in list(self.active.items()):
            self.attempt(name, lambda logger=logger: logger.write(line))

    def close(self) -> None:
        for name, logger in list(self.active.items()):
            self.attempt(name, logger.close)
        self.active = {}
