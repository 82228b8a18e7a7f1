"""Samplers: every image where it belongs, the same global order for any number of processes, equal to the published
ones.
"""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from samplers import BalancedSampler, RASampler, ShuffleSampler, eval_indices

lengths, worlds, epochs = st.integers(1, 700), st.integers(1, 8), st.integers(0, 400)


def drawn(kind, length, world, epoch, seed=0):
    """What each process draws."""
    samplers = [kind(length, seed=seed, rank=rank, world=world) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    for sampler in samplers:
        assert len(list(sampler)) == len(sampler)
    return [list(sampler) for sampler in samplers]


@settings(max_examples=60, deadline=None)
@given(lengths, worlds, epochs)
def test_shuffle_equals_torchs_distributed_sampler(length, world, epoch):
    """Which the published training used; with the published seed 0."""
    for rank, mine in enumerate(drawn(ShuffleSampler, length, world, epoch)):
        theirs = DistributedSampler(range(length), num_replicas=world, rank=rank, shuffle=True)
        theirs.set_epoch(epoch)
        assert [index for _, _, index in mine] == list(theirs)


@settings(max_examples=60, deadline=None)
@given(lengths, worlds, epochs)
def test_repeated_augmentation_equals_the_published_order(length, world, epoch):
    """Each index three times in a row, padded from the start, dealt out in turn, cut to a multiple of 256 over the
    processes.
    """
    order = torch.randperm(length, generator=torch.Generator().manual_seed(epoch)).tolist()
    order = [index for index in order for _ in range(3)]
    total = math.ceil(length * 3 / world) * world
    order += order[: total - len(order)]
    kept = (length // 256 * 256 if length >= 256 else length) // world
    for rank, mine in enumerate(drawn(RASampler, length, world, epoch)):
        expected = order[rank:total:world][:kept]
        assert [index for _, _, index in mine][: len(expected)] == expected and len(mine) == kept


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([ShuffleSampler, RASampler]), lengths, worlds, epochs, st.integers(0, 9))
def test_positions_key_the_global_order(kind, length, world, epoch, seed):
    """A (epoch, position) pair names the same image for any number of processes, and positions are used once."""
    (alone,) = drawn(kind, length, 1, epoch, seed)
    single = {position: index for _, position, index in alone}
    together = [item for share in drawn(kind, length, world, epoch, seed) for item in share]
    assert {e for e, _, _ in together} <= {epoch}
    assert len({position for _, position, _ in together}) == len(together)
    assert all(single.get(position, index) == index for _, position, index in together)


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 300), st.sampled_from([2, 4]), epochs)
def test_a_global_step_holds_the_same_images_for_any_number_of_processes(length, world, epoch):
    (alone,) = drawn(ShuffleSampler, length, 1, epoch)
    shares = drawn(ShuffleSampler, length, world, epoch)
    batch = 2  # of a process
    for step in range(length // (batch * world)):
        expected = sorted(alone[step * batch * world : (step + 1) * batch * world])
        assert sorted(item for share in shares for item in share[step * batch : (step + 1) * batch]) == expected


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([ShuffleSampler, RASampler, BalancedSampler]), st.integers(8, 700), epochs, st.integers(0, 20))
def test_a_run_may_shrink_and_grow(kind, length, epoch, done):
    """One global batch on 1, 2 and 4 processes, with and without accumulation, from any update on: as many updates,
    each of the same images with the same keys of their augmentation.
    """
    images = [number % 5 for number in range(length)] if kind is BalancedSampler else length

    def updates(world: int, batch: int) -> list[list]:
        """batch: of a process and update."""
        shares = []
        for rank in range(world):
            sampler = kind(images, rank=rank, world=world, pad=False)
            sampler.set_epoch(epoch, done * batch)
            shares.append(list(sampler))
        steps = min(map(len, shares)) // batch
        parts = ([item for share in shares for item in share[i * batch : (i + 1) * batch]] for i in range(steps))
        return [sorted(part) for part in parts]

    alone = updates(1, 8)
    assert updates(2, 4) == alone and updates(4, 2) == alone
    kept = RASampler(length).total() if kind is RASampler else length
    assert len(alone) == max(kept // 8 - done, 0)


@settings(max_examples=60, deadline=None)
@given(lengths, worlds)
def test_evaluation_takes_every_image_once(length, world):
    shares = [eval_indices(length, rank=rank, world=world) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(length))


def test_orders_change_with_epoch_and_seed():
    orders = [tuple(drawn(ShuffleSampler, 100, 1, epoch, seed)[0]) for epoch, seed in ((0, 0), (1, 0), (0, 5))]
    assert len({tuple(index for _, _, index in order) for order in orders}) == 3
