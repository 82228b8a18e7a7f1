"""Distributed processes, random states, meters and the record of the environment."""

import contextlib
import ctypes
import datetime
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from training import rendezvous
from training.devices import TESTED, choose_device
from training.errors import UserError, print_error, short_reason
from training.launcher import launcher_variables
from training.progress import LIVE, Pace

try:
    import resource
except ImportError:  # on Windows
    resource = None

ROOT = Path(__file__).resolve().parent
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


# ---------------------------------------------------------------- processes


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def log(*words: object) -> None:
    """Print in the main process."""
    if is_main_process():
        LIVE.clear()
        print(*words, flush=True)


def warn(message: str) -> None:
    """Print a warning on the error stream in the main process."""
    if is_main_process():
        LIVE.clear()
        print_error(message, kind="warning")


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors on a CPU, for the rest of the process.

    By default it returns each block above 32 MiB to the kernel and takes the next one page by page. Older versions
    keep blocks up to 32 MiB only.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)


def init_device(name: str, *, given: bool, dist_url: str = "env://", timeout: float = 1800) -> torch.device:
    """Choose the device, and join the run's other processes if a launcher started several (NCCL; on a CPU gloo)."""
    variables = launcher_variables(os.environ)
    os.environ.update(variables or {})
    device = choose_device(name, given=given, local_rank=int(variables["LOCAL_RANK"]) if variables else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if variables is None:
        log("Not using distributed mode")
    else:
        join_processes(variables, device, dist_url=dist_url, timeout=timeout)
    if device.type == "cpu" and not given:
        log("device: cpu (no CUDA device found)")
    if device.type not in TESTED:
        warn(f"untested (--device {name}): compare a short run with one of --device cpu")
    return device


def join_processes(variables: dict[str, str], device: torch.device, *, dist_url: str, timeout: float) -> None:
    """Meet the other processes. Tensors on a GPU go through NCCL, all else through gloo, where a lost process is an
    error of Python.
    """
    rank, world = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    print(f"| distributed init (rank {rank}): {dist_url}", flush=True)
    how = dict(backend="cpu:gloo,cuda:nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
    try:
        rendezvous.join(rank=rank, world=world, dist_url=dist_url, timeout=timeout, **how)
    except (ValueError, RuntimeError) as error:  # no such address, or a process that does not come
        raise UserError(f"the processes did not meet (--dist_url {dist_url}): {short_reason(error, 120)}") from error


def leave(code: int) -> NoReturn:
    """End the process; after an error at once, for the orderly way waits for workers, of which one may be stuck."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Leave the process group when all went well. After an error the launcher stops the other processes."""
    yield
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def all_gather(value: object) -> list:
    """Return a picklable value of each process in every process."""
    values = [value] * get_world_size()
    if get_world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def in_main_process(work: Callable[[], object]) -> object:
    """Return in every process what `work` returns in the main one; a UserError there is raised in all of them."""
    answer = [None, None]
    if is_main_process():
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = str(error)
    if get_world_size() > 1:
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def any_process(value: bool) -> bool:
    """Return in every process whether `value` is true in any."""
    return bool(all_reduce_sum(torch.tensor(float(value))) > 0)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all processes in place; with one process, the same bits."""
    if get_world_size() > 1:
        dist.all_reduce(values)
    return values


# ---------------------------------------------------------------- random states


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_random_state() -> dict:
    """Return this process's random states as tensors and plain values, for torch.load(weights_only=True)."""
    version, keys, gauss = random.getstate()
    name, numpy_keys, *rest = np.random.get_state()
    state = {
        "python": [version, torch.tensor(keys), gauss],
        "numpy": [name, torch.from_numpy(numpy_keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_random_state(state: dict) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    name, numpy_keys, *rest = state["numpy"]
    np.random.set_state((name, numpy_keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


# ---------------------------------------------------------------- meters


class Meter:
    """A running series: the median and mean of its last 20 values, and the mean of all."""

    def __init__(self, form: str = "{median:.4f} ({mean:.4f})", window: int = 20):
        self.form, self.recent = form, deque(maxlen=window)
        self.total, self.count = 0.0, 0

    def update(self, value: float, n: int = 1) -> None:
        self.recent.append(value)
        self.total += value * n
        self.count += n

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def __str__(self) -> str:
        recent = sorted(self.recent) or [0.0]
        return self.form.format(
            median=recent[(len(recent) - 1) // 2],
            mean=self.mean,
            avg=sum(recent) / len(recent),
            value=(self.recent or [0.0])[-1],
        )


def peak_memory_mb() -> float:
    """Return the peak of the GPU's allocator if CUDA is in use, else of the process, in MiB; 0 on Windows."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class MetricLogger:
    """Meters by name, and a line about them every few steps of a loop."""

    def __init__(self, **forms: str):
        self.meters = {name: Meter(form) for name, form in forms.items()}
        self.step_time, self.data_time, self.images, self.seconds = Meter("{avg:.4f}"), Meter("{avg:.4f}"), 0, 0.0

    def update(self, n: int = 1, **values: float) -> None:
        for name, value in values.items():
            self.meters[name].update(value, n)

    def __str__(self) -> str:
        return "  ".join(f"{name}: {meter}" for name, meter in self.meters.items())

    def state_dict(self) -> dict:
        return {
            name: {"recent": list(meter.recent), "total": meter.total, "count": meter.count}
            for name, meter in self.meters.items()
        }

    def load_state_dict(self, state: Mapping) -> None:
        for name, meter in self.meters.items():
            meter.total, meter.count = state[name]["total"], state[name]["count"]
            meter.recent.extend(state[name]["recent"])

    def log_every(self, batches: Iterable, steps: int, header: str, every: int = 10, start: int = 0) -> Iterator:
        """Yield batches number `start` to `steps`, and measure the time for data and for the step.

        A batch's first tensor has the images.
        """
        begin = end = time.perf_counter()
        width, pace = len(str(steps)), Pace()
        live = LIVE.wanted and is_main_process()
        batches = iter(batches)
        for i in range(start, steps):
            batch = next(batches)
            self.data_time.update(time.perf_counter() - end)
            self.images += len(batch[0])
            yield batch
            now = time.perf_counter()
            self.step_time.update(now - end)
            pace.add(now - end)
            end = now
            if live or i % every == 0 or i == steps - 1:
                eta = datetime.timedelta(seconds=int(pace.left(steps - 1 - i)))
                times = f"time: {self.step_time}  data: {self.data_time}  max mem: {peak_memory_mb():.0f}"
                (LIVE.show if live else log)(f"{header}  [{i:>{width}}/{steps}]  eta: {eta}  {self}  {times}")
        self.seconds = time.perf_counter() - begin
        total = datetime.timedelta(seconds=int(self.seconds))
        log(f"{header} Total time: {total} ({self.seconds / max(steps - start, 1):.4f} s / it)")

    def rates(self) -> dict[str, float]:
        """Return seconds, data seconds, images per second of all processes, and peak memory of the last loop."""
        per_s = self.images * get_world_size() / self.seconds if self.seconds else 0.0
        times = {
            "time": round(self.seconds, 3),
            "data_time": round(self.data_time.total, 3),
            "images_per_s": round(per_s, 2),
        }
        return times | {"max_memory_mb": round(peak_memory_mb())}


# ---------------------------------------------------------------- records


def git_commit() -> str:
    """Return the commit of this code, with +changes if files differ from it; empty outside a checkout."""
    try:
        run = dict(cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
        return commit + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def command_line() -> str:
    """Return the command that started this process as one would type it, with `python FILE` or `python -m MODULE`."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])


def environment(device: torch.device, seed: int) -> dict:
    """Return what a run was made with: command, commit, versions, machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "command": command_line(),
        "commit": git_commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("torch", "torchvision", "timm", "numpy", "pillow")},
        "device": f"{device.type}: {name}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": get_world_size(),
        "seed": seed,
    }
