"""Which device a process computes on."""

import os

import torch

from training.errors import UserError

TESTED = ("cpu", "cuda")


def choose_device(name: str, *, given: bool, local_rank: int | None) -> torch.device:
    """Return the device of this process; raise UserError if it does not exist. given: whether --device was passed."""
    try:
        kind, index = torch.device(name).type, torch.device(name).index or 0
    except RuntimeError:
        raise UserError(f"no such device (--device {name}): use cuda or cpu") from None
    if kind == "cpu":
        return torch.device(kind)
    if kind not in TESTED:
        return other_device(name, alone=local_rank is None)
    count = torch.cuda.device_count()
    if not torch.cuda.is_available():
        if given:
            where = f"--device {name}, torch {torch.__version__}"
            raise UserError(f"no CUDA device ({where}): pass --device cpu, or omit --device")
        return torch.device("cpu")
    if index >= count:
        raise UserError(f"no such device (--device {name}): this machine has {count}")
    if local_rank is not None:
        # Slurm may show each task only its own GPU.
        index = local_rank % count if "SLURM_LOCALID" in os.environ else local_rank
    if index >= count:
        raise UserError(f"process {index} of this machine has no GPU of its own ({count} found): start fewer")
    return torch.device(kind, index)


def other_device(name: str, *, alone: bool) -> torch.device:
    """Return a device that is neither cpu nor cuda; raise UserError if this torch and machine do not have it."""
    device, found = torch.device(name), torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != device.type or (device.index or 0) >= torch.accelerator.device_count():
        where = f"--device {name}, torch {torch.__version__}"
        raise UserError(f"no such device here ({where}): use cuda or cpu, or omit --device")
    if not alone:
        raise UserError(f"several processes (--device {name}): start one, only cuda and cpu can be several")
    return device
