"""What the tests share: one thread, no network, golden weights, small data sets, and the command line as a
subprocess.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch is: threads that wait leave the cores to other processes

import json
import math
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gvt  # first: it lets torchvision be imported, and registers the models

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # its workers share the cores


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@torch.no_grad()
def golden_weights(model: torch.nn.Module, prefix: str = "") -> torch.nn.Module:
    """Fill every parameter by the formula that the golden numbers were made with, by its name. In float64."""
    model.double()
    for name, parameter in model.named_parameters():
        name = prefix + name
        phase = (zlib.crc32(name.encode()) % 10007) / 10007 * 2 * math.pi
        wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7548776662466927 + phase)
        matrix = parameter.dim() >= 2
        scale = (parameter[0].numel()) ** -0.5 if matrix else 0.1
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_((base + scale * wave).reshape(parameter.shape))
    return model


def golden_images(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.sin(torch.arange(batch * 3 * height * width, dtype=torch.float64) * 0.5698402909980532).reshape(
        batch, 3, height, width
    )


def relative(value, expected) -> float:
    """The largest difference, relative to the expected number."""
    value, expected = torch.as_tensor(value, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    return ((value - expected).abs() / expected.abs()).max().item()


def make_images(folder: Path, *, classes: tuple[str, ...], each: int, size: int = 40, seed: int = 0) -> None:
    """folder/CLASS/N.png: noise around a color of the class, so that there is something to learn."""
    random = np.random.default_rng(seed)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        color = np.array([40 + 60 * (index % 4), 200 - 50 * (index % 3), 60 * (index % 5)])
        for number in range(each):
            pixels = np.clip(color + random.normal(0, 40, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A data set of 4 classes: 48 train images, 101 val images in uneven classes."""
    root = tmp_path_factory.mktemp("toy")
    make_images(root / "train", classes=("ant", "bee", "cat", "dog"), each=12)
    make_images(root / "val", classes=("ant", "bee", "cat", "dog"), each=25, seed=1)
    Image.new("RGB", (50, 40), (40, 200, 0)).save(root / "val" / "ant" / "extra.png")
    return root


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """Weights of the demo model for the classes of `toy`, not trained, that predict more than one of them."""
    torch.manual_seed(1)
    model = gvt.Twins(gvt.VARIANTS["alt_gvt_demo"], num_classes=4)
    with torch.no_grad():
        model.head.weight.mul_(20)
    path = tmp_path_factory.mktemp("classifier") / "x.pth"
    args = dict(model="alt_gvt_demo", input_size=32, eval_crop_ratio=0.875)
    torch.save({"model": model.state_dict(), "args": args, "class_names": ["ant", "bee", "cat", "dog"]}, path)
    return path


# What main.py warns of in SMALL_RUN: its few images at the default rate, its few epochs, and its val.
SHORT_SCHEDULE = (
    *("main.py: warning: the learning rate does not fall", "main.py: warning: warm-up takes"),
    "main.py: warning: val has more images than train",
)
SMALL_RUN = [
    "--model",
    "alt_gvt_demo",
    "--input-size",
    "32",
    "--batch-size",
    "8",
    "--num_workers",
    "0",
    "--epochs",
    "2",
    "--device",
    "cpu",
]


def run_main(
    *words: object, launcher: tuple[str, ...] = (), env: dict | None = None, timeout: float = 240
) -> subprocess.CompletedProcess:
    """main.py as a user runs it, one thread a process. The result has rc as returncode, stdout and stderr."""
    command = [sys.executable, *launcher, str(ROOT / "main.py"), *map(str, words)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"} | (env or {})
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=settings, cwd=ROOT)


def have_strace() -> bool:
    """Return True if strace may watch a program here, and change what its calls return."""
    if not shutil.which("strace"):
        return False
    return subprocess.run(["strace", "-e", "inject=getppid:retval=7", "true"], capture_output=True).returncode == 0


def launch(processes: int) -> tuple[str, ...]:
    """The published launcher's words, on a free port."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ("-m", "torch.distributed.launch", f"--nproc_per_node={processes}", f"--master_port={port}", "--use_env")


def errors_of(text: str) -> list[str]:
    """The lines of an error stream but for the warnings of SHORT_SCHEDULE."""
    return [line for line in text.splitlines() if not line.startswith(SHORT_SCHEDULE)]


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
