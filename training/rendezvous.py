"""How the processes of a run meet, and meet again after torchrun restarted them."""

import datetime
import hashlib
import os
import time
import uuid

import torch.distributed as dist

from training.errors import UserError

RESTART_S = 60.0  # that restarted processes wait for each other: their files were read once
LOOK_AGAIN_S = 1.0  # for processes that restarted while the others waited


def join(*, rank: int, world: int, dist_url: str, timeout: float, **settings: object) -> None:
    """Initialize the process group. settings: of torch.distributed.init_process_group.

    Raises UserError if a restarted process waits for another in vain; ValueError or RuntimeError as torch does.
    """
    settings |= dict(rank=rank, world_size=world, timeout=datetime.timedelta(seconds=timeout))
    if dist_url != "env://" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(init_method=dist_url, **settings)
        return
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    wait = min(timeout, RESTART_S) if restarted else timeout
    dist.init_process_group(store=meet(agent_store(world, wait), rank, world, wait), **settings)


def agent_store(world: int, wait: float) -> dist.Store:
    """Return the store of torchrun's agent, which it keeps through restarts."""
    where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    seconds = datetime.timedelta(seconds=wait)
    return dist.TCPStore(where, port, world, is_master=False, timeout=seconds, wait_for_workers=False)


def meet(store: dist.Store, rank: int, world: int, wait: float) -> dist.Store:
    """Wait until all processes are there, before any of them opens connections; return the store with keys of theirs.

    The store also holds what dead processes wrote, and several agents may count different numbers of restarts. So each
    process brings a ticket, all derive the keys from the tickets, and only living processes answer under these keys.
    """
    deadline, tickets = time.monotonic() + wait, [f"ticket {each}" for each in range(world)]
    store.set(tickets[rank], uuid.uuid4().hex)
    while True:
        keys, left = tickets, deadline - time.monotonic()
        seconds = datetime.timedelta(seconds=min(max(left, 0.001), LOOK_AGAIN_S))
        try:
            store.wait(tickets, seconds)
            name = hashlib.sha256(b" ".join(store.multi_get(tickets))).hexdigest()
            keys = [f"{name} {each}" for each in range(world)]
            store.set(keys[rank], "here")
            store.wait(keys, seconds)
            return dist.PrefixStore(name, store)
        except dist.DistStoreError:
            if left <= 0:
                break
    missing = ", ".join(str(each) for each, key in enumerate(keys) if not store.check([key]))
    what = f"the processes did not meet within {wait:g} s (missing: {missing} of {world})"
    raise UserError(f"{what}: look at their machines, then start again with --resume auto")
