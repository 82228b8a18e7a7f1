"""Restarted processes meet in keys of their own, and wait for each other for a limited time."""

import time
from concurrent.futures import ThreadPoolExecutor

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


def meet(rank: int, late: float = 0.0):
    """Meet as a process of its own would, with a connection of its own."""
    time.sleep(late)
    return rendezvous.meet(rendezvous.agent_store(2, 20), rank, 2, 20)


def test_dead_processes_are_not_met(agent, monkeypatch):
    with ThreadPoolExecutor() as pool:
        list(pool.map(meet, (0, 1)))  # of an attempt before
    monkeypatch.setattr(rendezvous, "RESTART_S", 1)
    begin = time.monotonic()
    with pytest.raises(UserError) as error:
        join(2)
    assert time.monotonic() - begin < 10 and not dist.is_initialized()
    line = "the processes did not meet within 1 s (missing: 1 of 2): look at their machines, then start again"
    assert str(error.value) == f"{line} with --resume auto"


@pytest.mark.parametrize("late", [0, 1.5])
def test_all_processes_of_a_meeting_have_the_same_keys(agent, late):
    for attempt in range(2):  # keys and tickets of the first are there in the second
        with ThreadPoolExecutor() as pool:
            first, second = pool.map(meet, (0, 1), (0, late))
        first.set("attempt", str(attempt))
        assert second.get("attempt") == str(attempt).encode()
        assert not agent.check(["attempt"])


def test_a_process_that_restarts_while_the_others_wait_is_met(agent):
    """As when two agents restart their processes at different times."""
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(meet, 0)
        dead = rendezvous.agent_store(2, 20)
        dead.set("ticket 1", "of a process that died before it answered")
        first, second = waiting, pool.submit(meet, 1, 1.5)
        first.result().set("name", "same")
        assert second.result().get("name") == b"same"


def test_processes_that_are_there_meet(agent):
    join(1)
    assert dist.is_initialized() and dist.get_world_size() == 1


def test_an_agent_that_is_gone_ends_the_wait(agent, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(rendezvous, "RESTART_S", 1)
    with pytest.raises(RuntimeError):
        join(2)
