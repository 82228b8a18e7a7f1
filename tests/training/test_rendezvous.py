"""Restarted processes meet in keys of their own, and wait for each other for a limited time."""

import time

import pytest
import torch.distributed as dist

from training import rendezvous
from training.errors import UserError


@pytest.fixture
def agent(monkeypatch):
    """The store that torchrun's agent keeps, and the variables that it gives to a process it restarted once."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield store
    if dist.is_initialized():
        dist.destroy_process_group()


def join(world: int, **settings):
    rendezvous.join(rank=0, world=world, dist_url="env://", timeout=30, backend="gloo", **settings)


def test_the_keys_of_the_attempt_before_are_not_seen(agent, monkeypatch):
    old = rendezvous.agent_store(0, 2, 5)
    for rank in range(2):
        old.set(f"process {rank}", "here")
    monkeypatch.setattr(rendezvous, "RESTART_S", 1)
    begin = time.monotonic()
    with pytest.raises(UserError) as error:
        join(2)
    assert time.monotonic() - begin < 10 and not dist.is_initialized()
    line = "the processes did not meet again within 1 s (missing: 1 of 2): look at their machines, then start again"
    assert str(error.value) == f"{line} with --resume auto"


def test_processes_that_are_there_meet(agent):
    join(1)
    assert dist.is_initialized() and dist.get_world_size() == 1


def test_an_agent_that_is_gone_ends_the_wait(agent, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(rendezvous, "RESTART_S", 1)
    with pytest.raises(RuntimeError):
        join(2)
