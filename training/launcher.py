"""A process under a launcher (torchrun). Needs the standard library only: main.py asks before torch is imported."""

import ctypes
import os
import re
import signal
import sys
import threading
import time

from training.errors import PREEMPTED

LAST_SECONDS = 4.0  # that a process without its launcher has for saving


def launched() -> bool:
    """Return True if a launcher (torchrun) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def die_with_parent(name: str) -> None:
    """Have the kernel send this process the signal of that name when its parent ends (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.Signals[name]), 0, 0, 0)  # PR_SET_PDEATHSIG


def end_with_launcher() -> None:
    """End soon after the launcher does: a SIGTERM at once, so that the state is saved, and some seconds later the end
    in any case.

    torchrun's processes outlive it otherwise, and go on writing into the run's folder.
    """
    parent = os.getppid()
    die_with_parent("SIGTERM")

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        time.sleep(LAST_SECONDS)
        os._exit(PREEMPTED)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()


def launcher_variables(environ: dict[str, str]) -> dict[str, str] | None:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun or Slurm set them.

    None: a single process.
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
