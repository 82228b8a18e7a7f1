"""Import all of mmsegmentation or mmdetection without their noise, or name the command that installs them."""

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import contextlib
import importlib
import importlib.util
import io
import warnings
from collections.abc import Iterator

from training.errors import UserError

TASKS = {"mmseg": "segmentation", "mmdet": "detection"}
# Importing these packages of a library fills its registries.
PACKAGES = ("datasets", "engine", "evaluation", "models", "structures", "visualization")

# The beginnings of warnings for the libraries' own developers, or about choices that are made on purpose here.
NOISE = [
    "`torch.jit",  # they compile small functions in a way that torch will drop
    "faster_coco_eval is not installed",  # one more metric, which nothing here uses
    "``MultiScaleDeformableAttention`` has been moved",
    "`broadcast_buffers` is deprecated",  # mmengine's name for torch's forward_sync_buffers
    "The draw is False",  # of their visualization hooks: --show and --show-dir turn them on
    "Default ``avg_non_ignore`` is False",  # on purpose: as in the official code
]
SKIPPED = "Could not import OneDL"  # an optional service of the forks' makers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of NOISE."""
    with warnings.catch_warnings():
        for begin in NOISE:
            warnings.filterwarnings("ignore", message=begin)
        yield


def needed(library: str) -> tuple[str, ...]:
    return "mmcv", "mmengine", library


def versions(library: str) -> dict[str, str]:
    return {name: importlib.import_module(name).__version__ for name in needed(library)}


def load(library: str) -> None:
    """Import all of "mmseg" or "mmdet"."""
    for name in needed(library):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{TASKS[library]} needs {name}, which is not installed: run make dense")
    printed = io.StringIO()
    with quiet(), contextlib.redirect_stdout(printed):
        for package in PACKAGES:
            importlib.import_module(f"{library}.{package}")
    for line in printed.getvalue().splitlines():
        if not line.startswith(SKIPPED):
            print(line)
