"""Random numbers of a training run that depend on its seed and its progress, and on nothing else.

An image's augmentation is drawn from the seed, the process, the epoch and the image's position in the process's order;
a step's dropout and sampling from the seed, the process and the iteration. So a resumed run gives the same bits as an
uninterrupted one, for any number of workers, and whatever else drew random numbers in between.
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

IMAGES, STEPS = 0, 1  # two uses of a seed, with different random numbers


def seed_from(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python, NumPy and torch by `key`, and restore their states at the end."""
    before = get_random_state()
    seed_everything(seed_from(*key))
    try:
        yield
    finally:
        set_random_state(before)


class KeyedIndex(int):
    """The index of an image, with the key of its random numbers: process, epoch, position."""

    key: tuple[int, ...] = ()


@DATA_SAMPLERS.register_module()
class KeyedSampler(Sampler):
    """The order of another sampler (a config), as KeyedIndex."""

    def __init__(self, dataset, seed: int, *, sampler: dict):
        self.inner = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=seed))
        self.dataset, self.epoch, self.start = dataset, 0, 0
        if hasattr(self.inner, "skip"):  # an endless order, in which a resumed run starts further on
            self.skip = self._skip

    def __iter__(self) -> Iterator[KeyedIndex]:
        for position, index in zip(itertools.count(self.start), self.inner):
            keyed = KeyedIndex(index)
            keyed.key = get_rank(), self.epoch, position
            yield keyed

    def __len__(self) -> int:
        return len(self.inner)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.inner.set_epoch(epoch)

    def _skip(self, count: int) -> None:
        self.start = count
        self.inner.skip(count)


class SeededPrepareData:
    """A data set's prepare_data and _rand_another, seeded by the index's key and the attempt's number.

    mmengine uses another image if the pipeline rejects one.
    """

    def __init__(self, dataset, seed: int):
        self.prepare_data, self.rand_another, self.seed = dataset.prepare_data, dataset._rand_another, seed
        self.key, self.attempt = (), 0

    def prepare(self, index: int) -> object:
        self.key, self.attempt = (index.key, 0) if isinstance(index, KeyedIndex) else (self.key, self.attempt + 1)
        with seeded(self.seed, IMAGES, *self.key, self.attempt):
            return self.prepare_data(index)

    def another(self) -> int:
        with seeded(self.seed, IMAGES, *self.key, self.attempt, 0):
            return self.rand_another()


def seed_by_index(dataset, seed: int) -> None:
    """Change a data set, in place, to seed its random numbers for each KeyedIndex."""
    data = SeededPrepareData(dataset, seed)
    dataset.prepare_data, dataset._rand_another = data.prepare, data.another


class StepRandomness(Hook):
    """Seed each step by the seed, the process and the iteration."""

    priority = "LOWEST"  # after every other hook that runs before the step

    def before_train_iter(self, runner, batch_idx: int, data_batch: object = None) -> None:
        seed_everything(seed_from(runner.seed, STEPS, get_rank(), runner.iter))
