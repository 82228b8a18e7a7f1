"""Which images a process sees, and in which order.

Training samplers yield (epoch, position, index): position counts through the whole order of all processes, and with the
epoch keys the random numbers of an image's augmentation. So a run's data do not depend on how many processes or
workers share the work.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

REPEATS = 3  # of each image under repeated augmentation
RA_MULTIPLE = 256  # repeated augmentation keeps a multiple of this many images


class ShuffleSampler(Sampler):
    """A new order each epoch, dealt out to `world` processes in turn; the same order as torch's DistributedSampler.

    Where the length is no multiple of world, the first images of the order are used twice, so that processes have
    equally many; with pad=False the last ones are left out, so that the number of updates does not depend on world.
    """

    repeats = 1

    def __init__(self, length: int, *, seed: int = 0, rank: int = 0, world: int = 1, pad: bool = True):
        self.length, self.seed, self.rank, self.world, self.pad = length, seed, rank, world, pad
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the next epoch, without this process's first `start` images, which an interrupted run has had."""
        self.epoch, self.start = epoch, start

    def order(self) -> torch.Tensor:
        """Return the order of all processes together, its length a multiple of world."""
        order = self.draw(torch.Generator().manual_seed(self.seed + self.epoch)).repeat_interleave(self.repeats)
        missing = -len(order) % self.world
        return torch.cat([order, order.repeat(math.ceil(missing / len(order)))[:missing]]) if missing else order

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """Return the images of an epoch in their order."""
        return torch.randperm(self.length, generator=generator)

    def total(self) -> int:
        """Return the number of a process's images in an epoch."""
        images = self.length * self.repeats
        return math.ceil(images / self.world) if self.pad else images // self.world

    def __len__(self) -> int:
        return max(self.total() - self.start, 0)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        epoch, mine = self.epoch, self.order()[self.rank :: self.world].tolist()
        for i in range(self.start, self.total()):
            yield epoch, self.rank + self.world * i, mine[i]


class RASampler(ShuffleSampler):
    """Repeated augmentation (arXiv:1902.05509): each image three times in a row, in different processes where there
    are several.

    An epoch keeps as many samples as there are images, rounded down to a multiple of 256 (official); below 256
    images, all of them.
    """

    repeats = REPEATS

    def total(self) -> int:
        kept = self.length // RA_MULTIPLE * RA_MULTIPLE or self.length
        return kept // self.world


class BalancedSampler(ShuffleSampler):
    """As many images an epoch as there are, each class equally often: of a large class another part each epoch, of a
    small one each image several times. labels: of each image; classes without images are left out.
    """

    def __init__(self, labels: Sequence[int], **kwargs):
        super().__init__(len(labels), **kwargs)
        labels = torch.as_tensor(labels)
        self.members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        each, more = divmod(self.length, len(self.members))  # the first `more` classes of this epoch get one more
        parts = []
        for place, number in enumerate(torch.randperm(len(self.members), generator=generator)):
            members, wanted = self.members[number], each + (place < more)
            rounds = max(1, math.ceil(wanted / len(members)))
            drawn = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
            parts.append(torch.cat(drawn)[:wanted])
        return torch.cat(parts)[torch.randperm(self.length, generator=generator)]


def eval_indices(length: int, *, rank: int = 0, world: int = 1) -> range:
    """Return the images that a process evaluates: each belongs to exactly one process, none is repeated."""
    return range(rank, length, world)
