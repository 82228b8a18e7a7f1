"""Random numbers of a training that depend on its seed and on where it is, and on nothing else.

A picture's augmentation is drawn from the seed, the process, the epoch and the picture's position in the process's
order; a step's dropout and sampling from the seed, the process and the iteration. So a training that was resumed gives
the same bits as one that was not, for any number of workers, and whatever drew random numbers in between.
"""

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from utils import get_random_state, seed_everything, set_random_state

PICTURES, STEPS = 0, 1  # two uses of a seed that must not meet


def seed_from(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def drawn_from(*parts: int) -> Iterator[None]:
    """Python's, numpy's and torch's random numbers by `parts`; the states around are left as they were."""
    before = get_random_state()
    seed_everything(seed_from(*parts))
    try:
        yield
    finally:
        set_random_state(before)


class Place(int):
    """A picture's index that knows where in a training it stands."""

    key: tuple[int, ...]

    def __new__(cls, index: int, key: tuple[int, ...]):
        place = super().__new__(cls, index)
        place.key = key
        return place

    def __reduce__(self):
        return Place, (int(self), self.key)


@DATA_SAMPLERS.register_module()
class PlacedSampler(Sampler):
    """The order of another sampler (a config), each index with its process, epoch and position."""

    def __init__(self, dataset, seed: int, *, sampler: dict):
        self.inner = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=seed))
        self.dataset, self.epoch, self.start = dataset, 0, 0
        if hasattr(self.inner, "skip"):  # an endless order, in which a resumed training starts further on
            self.skip = self._skip

    def __iter__(self) -> Iterator[Place]:
        for position, index in zip(itertools.count(self.start), self.inner):
            yield Place(index, (get_rank(), self.epoch, position))

    def __len__(self) -> int:
        return len(self.inner)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.inner.set_epoch(epoch)

    def _skip(self, count: int) -> None:
        self.start = count
        self.inner.skip(count)


class PlacedPictures:
    """What stands for a data set's `prepare_data` and `_rand_another`: the same, with random numbers drawn from the
    place and the try.
    """

    def __init__(self, dataset, seed: int):
        self.prepare_data, self.rand_another, self.seed = dataset.prepare_data, dataset._rand_another, seed
        self.key, self.tries = (), 0

    def prepare(self, index: int) -> object:
        self.key, self.tries = (index.key, 0) if isinstance(index, Place) else (self.key, self.tries + 1)
        with drawn_from(self.seed, PICTURES, *self.key, self.tries):
            return self.prepare_data(index)

    def another(self) -> int:
        """Another picture's index, where the pipeline could not use one."""
        with drawn_from(self.seed, PICTURES, *self.key, self.tries, 0):
            return self.rand_another()


def place_pictures(dataset, seed: int) -> None:
    placed = PlacedPictures(dataset, seed)
    dataset.prepare_data, dataset._rand_another = placed.prepare, placed.another


class StepRandomness(Hook):
    """Each step draws from the seed, the process and the iteration."""

    priority = "LOWEST"  # after every other hook that runs before the step

    def before_train_iter(self, runner, batch_idx: int, data_batch: object = None) -> None:
        seed_everything(seed_from(runner.seed, STEPS, get_rank(), runner.iter))
