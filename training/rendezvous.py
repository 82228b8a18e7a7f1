"""How the processes of a run meet, and meet again after torchrun restarted them."""

import datetime
import os

import torch.distributed as dist

from training.errors import UserError

RESTART_S = 60.0  # that restarted processes wait for each other: their files were read once


def join(*, rank: int, world: int, dist_url: str, timeout: float, **settings: object) -> None:
    """Initialize the process group. settings: of torch.distributed.init_process_group.

    Raises UserError if a restarted process waits for another in vain; ValueError or RuntimeError as torch does.
    """
    settings |= dict(rank=rank, world_size=world, timeout=datetime.timedelta(seconds=timeout))
    if dist_url != "env://" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(init_method=dist_url, **settings)
        return
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    wait = min(timeout, RESTART_S) if attempt else timeout
    store = agent_store(attempt, world, wait)
    meet(store, rank, world, wait)
    dist.init_process_group(store=store, **settings)


def agent_store(attempt: int, world: int, wait: float) -> dist.Store:
    """Return the store of torchrun's agent, with keys of this attempt alone.

    The agent keeps its store through restarts: restarted processes would read the addresses of the dead ones.
    """
    where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    seconds = datetime.timedelta(seconds=wait)
    store = dist.TCPStore(where, port, world, is_master=False, timeout=seconds, wait_for_workers=False)
    return dist.PrefixStore(f"attempt {attempt}", store)


def meet(store: dist.Store, rank: int, world: int, wait: float) -> None:
    """Wait until all processes are there, before any of them opens connections to the others."""
    keys = [f"process {each}" for each in range(world)]
    store.set(keys[rank], "here")
    try:
        store.wait(keys, datetime.timedelta(seconds=wait))
    except dist.DistStoreError:
        missing = [str(each) for each, key in enumerate(keys) if not store.check([key])]
        what = f"the processes did not meet again within {wait:g} s (missing: {', '.join(missing)} of {world})"
        raise UserError(f"{what}: look at their machines, then start again with --resume auto") from None
