"""Processes, meters, random states and records: what the other files of the classification code share."""

import contextlib
import ctypes
import datetime
import os
import platform
import random
import re
import resource
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

from training.errors import UserError, print_error

ROOT = Path(__file__).resolve().parent
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


# ---------------------------------------------------------------- processes


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def say(*words: object) -> None:
    """Print, in one process of a run."""
    if is_main_process():
        print(*words, flush=True)


def warn(message: str) -> None:
    """A line on the error stream, in one process of a run."""
    if is_main_process():
        print_error(message, kind="warning")


def launcher_variables(environ: dict[str, str]) -> dict[str, str] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, from torchrun's variables or Slurm's. None: a single
    process.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return {"LOCAL_RANK": "0"} | {k: environ[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if k in environ}
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    # A batch script has the variables of its job's first task, but is no task itself unless srun started it.
    only_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
    if "SLURM_PROCID" not in environ or int(tasks) == 1 or only_script:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes).group()  # rack[1-2]-node[03-07,9],other -> rack1-node03
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environ.get("MASTER_ADDR", re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)),
        # The same for all tasks of a job, and another one for the next job on the same node.
        "MASTER_PORT": environ.get("MASTER_PORT", str(20000 + int(environ.get("SLURM_JOB_ID", 0)) % 20000)),
    }


def keep_freed_memory() -> None:
    """On a CPU: let the C library reuse the memory of freed tensors, where it can be told so (glibc), for the rest of
    the process.

    Unless told, it gives each block above 32 MiB back, and takes the next from the kernel anew, page by page. Older
    ones can be told so of blocks up to 32 MiB only.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)


def init_device(name: str, *, written: bool, dist_url: str = "env://", timeout: float = 1800) -> torch.device:
    """Choose the device, and join the other processes of the run where a launcher started several (NCCL on GPUs, gloo
    on a CPU).
    """
    try:
        kind, index = torch.device(name).type, torch.device(name).index or 0
    except RuntimeError:
        raise UserError(f"no such device (--device {name}): write cuda or cpu") from None
    if kind == "cuda" and torch.cuda.is_available() and index >= torch.cuda.device_count():
        raise UserError(f"no such device (--device {name}): this machine has {torch.cuda.device_count()}")
    if kind == "cuda" and not torch.cuda.is_available():
        if written:
            raise UserError(
                f"no CUDA device (--device {name}, torch {torch.__version__}): write --device cpu, or leave it away"
            )
        kind = "cpu"
    variables = launcher_variables(os.environ)
    if variables is not None:
        os.environ.update(variables)
        index = int(variables["LOCAL_RANK"])
        if kind == "cuda" and "SLURM_LOCALID" in os.environ:
            index %= torch.cuda.device_count()  # Slurm may show each task only its own GPU
        if kind == "cuda" and index >= torch.cuda.device_count():
            raise UserError(
                f"process {index} of this machine has no GPU of its own ({torch.cuda.device_count()} found): start "
                "fewer"
            )
    device = torch.device(kind, index) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if variables is None:
        say("Not using distributed mode")
    else:
        rank, world = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        print(f"| distributed init (rank {rank}): {dist_url}", flush=True)
        where = dict(init_method=dist_url, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=timeout))
        try:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", **where)
        except (ValueError, RuntimeError) as error:  # no such address, or a process that does not come
            reason = str(error).strip().splitlines()[0][:120]
            raise UserError(f"the processes did not meet (--dist_url {dist_url}): {reason}") from error
    if kind == "cpu" and not written:
        say("device: cpu (no CUDA device found)")
    return device


def leave(code: int) -> NoReturn:
    """End the process. After an error at once: the orderly way waits for data-loading processes, of which one may be
    stuck; they end too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Leave the other processes in an orderly way when all went well. After an error they are the launcher's to
    stop.
    """
    yield
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def all_gather(value: object) -> list:
    """A picklable value of each process, in every process."""
    values = [value] * get_world_size()
    if get_world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def in_main_process(work: Callable[[], object]) -> object:
    """What `work` gives in the first process, in every process; a UserError there is one in all, so that none waits for
    it.
    """
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


def any_process(value: bool, device: torch.device) -> bool:
    """Whether it is true in any process, in every process."""
    return bool(all_reduce_sum(torch.tensor(float(value), device=device if get_world_size() > 1 else "cpu")) > 0)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place; of one process, the same bits."""
    if get_world_size() > 1:
        dist.all_reduce(values)
    return values


# ---------------------------------------------------------------- random states


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_random_state() -> dict:
    """This process's random states as tensors and plain values, which torch.load(weights_only=True) takes."""
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
    """Of the GPU's allocator where CUDA is in use, else of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class MetricLogger:
    """Meters by name, and a line about them every few steps of a loop."""

    def __init__(self, **forms: str):
        self.meters = {name: Meter(form) for name, form in forms.items()}
        self.step_time, self.data_time, self.pictures, self.seconds = Meter("{avg:.4f}"), Meter("{avg:.4f}"), 0, 0.0

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
        """Yield batches number `start` to `steps`, measuring the time for data and for the step. The pictures are the
        first tensor's.
        """
        begin = end = time.perf_counter()
        width = len(str(steps))
        batches = iter(batches)
        for i in range(start, steps):
            batch = next(batches)
            self.data_time.update(time.perf_counter() - end)
            self.pictures += len(batch[0])
            yield batch
            now = time.perf_counter()
            self.step_time.update(now - end)
            end = now
            if i % every == 0 or i == steps - 1:
                eta = datetime.timedelta(seconds=int(self.step_time.mean * (steps - 1 - i)))
                say(
                    f"{header}  [{i:>{width}}/{steps}]  eta: {eta}  {self}  time: {self.step_time}  data: "
                    f"{self.data_time}"
                    f"  max mem: {peak_memory_mb():.0f}"
                )
        self.seconds = time.perf_counter() - begin
        total = datetime.timedelta(seconds=int(self.seconds))
        say(f"{header} Total time: {total} ({self.seconds / max(steps - start, 1):.4f} s / it)")

    def rates(self) -> dict[str, float]:
        """Seconds, data seconds, pictures per second of all processes, and peak memory of the last loop."""
        per_s = self.pictures * get_world_size() / self.seconds if self.seconds else 0.0
        times = {
            "time": round(self.seconds, 3),
            "data_time": round(self.data_time.total, 3),
            "images_per_s": round(per_s, 2),
        }
        return times | {"max_memory_mb": round(peak_memory_mb())}


# ---------------------------------------------------------------- records


def git_commit() -> str:
    """The commit of this code, with a mark if files differ from it; empty outside a checkout."""
    try:
        run = dict(cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
        return commit + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def command_line() -> str:
    """The command that started this process, as one would type it: `python FILE ...` or `python -m MODULE ...`."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])


def environment(device: torch.device, seed: int) -> dict:
    """What a run was made with: command, commit, versions, machine."""
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
