"""From a data set's items to batches on the device: uint8 images, seeded augmentation, and the loader.

An image in uint8 is a quarter of one in float32, for the memory that workers share and for the copy to the device.
What is left to do there (RandAugment if asked for, normalization, erasing) gives the same bits.
"""

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import contextlib
import functools
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torchvision import transforms

from training import augment
from training.bad_images import BadImages
from training.errors import UserError
from training.processes import loading_process, time_limit

ROWS_FIRST = int(PIL.__version__.split(".")[0]) >= 13  # Pillow resizes rows first where that is less work

# ---------------------------------------------------------------- one image


@dataclass
class Sample:
    """An image on its way to the device: uint8 (H, W, C), and what is left to do there, in this order.

    operations: RandAugment's, and the color it fills with, or None; normal: mean and std; erased: what erasing writes.
    """

    pixels: Tensor
    operations: tuple[list[augment.Operation], augment.Color] | None
    normal: tuple[tuple[float, ...], tuple[float, ...]]
    erased: list[tuple[slice, slice, Tensor]]


class RecordedErasing:
    """Stand in for the (C, H, W) image that timm's random erasing writes to, and record (rows, columns, values)."""

    dtype = torch.float32

    def __init__(self, height: int, width: int, channels: int):
        self.shape, self.written = torch.Size((channels, height, width)), []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, where: tuple[slice, slice, slice], values: Tensor) -> None:
        self.written.append((*where[1:], values))


class TorchCrop:
    """timm's random crop and bicubic resize by torch, a third of the time: image -> (3, H, W) uint8, nearly equal."""

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop

    def __call__(self, image: Image.Image) -> Tensor:
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        pixels = as_uint8(image.crop((left, top, left + width, top + height))).permute(2, 0, 1)
        # In Pillow's order but for some crops, which matters little: the image between the passes is rounded, and
        # clamped to 0 and 255.
        tall, wide = self.crop.size
        rows_first = ROWS_FIRST and height > tall and width < wide
        between = (tall, width) if rows_first else (height, wide)
        for size in (between, self.crop.size):
            pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
        return pixels


def as_uint8(image: Image.Image | Tensor) -> Tensor:
    """Return an image, or a tensor (3, H, W) of one, as (H, W, 3); a gray image as (H, W, 1)."""
    if isinstance(image, Tensor):
        return image.permute(1, 2, 0)
    pixels = torch.from_numpy(np.array(image))
    return pixels if pixels.ndim == 3 else pixels[..., None]


class Uint8Transform:
    """Run a pipeline of datasets.build_transform up to its first float: image -> Sample, with the same random numbers.

    ImageBatch.to does the rest and gives the same bits. fast_augment leaves RandAugment to the device too, and lets
    torch resize: both round differently.
    """

    def __init__(self, pipeline: transforms.Compose, *, fast_augment: bool = False):
        steps = pipeline.transforms
        at = next(i for i, step in enumerate(steps) if isinstance(step, transforms.ToTensor))
        self.steps, normalize, self.erasing = steps[:at], steps[at + 1], steps[at + 2 :]
        parts = torch.stack([torch.as_tensor(part, dtype=torch.float32) for part in (normalize.mean, normalize.std)])
        self.normal = tuple(map(tuple, parts.tolist()))
        self.recorded = augment.RecordedRandAugment(self.take_augment()) if fast_augment else None
        if fast_augment and isinstance(self.steps[0], RandomResizedCropAndInterpolation):
            self.steps[0] = TorchCrop(self.steps[0])

    def take_augment(self) -> auto_augment.RandAugment:
        last = self.steps.pop()
        is_rand_augment = isinstance(last, auto_augment.RandAugment)
        reason = augment.unsupported_reason(last) if is_rand_augment else "it does not end with RandAugment"
        if reason is not None:
            advice = "use rand-m9-mstd0.5-inc1, or omit --fast-augment"
            raise UserError(f"not possible on the device (--fast-augment, this --aa): {reason}; {advice}")
        return last

    def __call__(self, image: Image.Image) -> Sample:
        for step in self.steps:
            image = step(image)
        operations = (self.recorded(), self.recorded.fill) if self.recorded else None
        pixels = as_uint8(image)
        erased = RecordedErasing(*pixels.shape)
        for step in self.erasing:
            step(erased)
        return Sample(pixels, operations, self.normal, erased.written)


# ---------------------------------------------------------------- a batch


@dataclass
class ImageBatch:
    """Samples: uint8 (B, H, W, C); where erasing writes, (number, rows, columns, shape); its values in one row."""

    pixels: Tensor
    plan: augment.Plan | None
    normal: tuple[tuple[float, ...], tuple[float, ...]]
    erased: list[tuple[int, slice, slice, torch.Size]]
    values: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "ImageBatch":
        written = [(number, *each) for number, sample in enumerate(samples) for each in sample.erased]
        values = torch.cat([values.flatten() for *_, values in written]) if written else torch.empty(0)
        places = [(*place, values.shape) for *place, values in written]
        pixels, plan = default_collate([sample.pixels for sample in samples]), None
        if samples[0].operations is not None:
            recorded, fills = zip(*(sample.operations for sample in samples))
            plan = augment.Plan.of(recorded, fills[0], *pixels.shape[1:3])
        return cls(pixels, plan, samples[0].normal, places, values)

    def __len__(self) -> int:
        return len(self.pixels)

    def pin_memory(self) -> "ImageBatch":
        """Pin the tensors, as DataLoader asks for."""
        plan = self.plan and self.plan.pin_memory()
        return replace(self, pixels=self.pixels.pin_memory(), plan=plan, values=self.values.pin_memory())

    def to(self, device: torch.device, *, non_blocking=False, memory_format=torch.contiguous_format) -> Tensor:
        """Return (B, C, H, W) in float32 on the device, augmented where that is left, normalized and erased."""
        pixels = self.pixels.to(device, non_blocking=non_blocking).permute(0, 3, 1, 2)
        if self.plan is not None:
            pixels = pixels.contiguous()
            self.plan.apply(pixels, non_blocking=non_blocking)
        white, mean, std = constants(self.normal, device)
        images = pixels.to(torch.float32, memory_format=memory_format).div_(white).sub_(mean).div_(std)
        if self.erased:
            values = self.values.to(device, non_blocking=non_blocking).split([size.numel() for *_, size in self.erased])
            for (number, rows, columns, shape), part in zip(self.erased, values):
                images[number, :, rows, columns] = part.view(shape)
        return images


@functools.cache
def constants(normal: tuple[tuple[float, ...], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return 255, mean and std on the device.

    White is a tensor too: CUDA divides by a number by multiplying with its rounded reciprocal.
    """
    mean, std = (torch.tensor(part, device=device).view(-1, 1, 1) for part in normal)
    return torch.full_like(mean, 255.0), mean, std


def collate(items: Sequence) -> list:
    """Make a batch of a data set's items; samples become an ImageBatch."""
    if not (isinstance(items[0], tuple) and isinstance(items[0][0], Sample)):
        return default_collate(items)
    samples, labels = zip(*items)
    return [ImageBatch.of(samples), default_collate(labels)]


# ---------------------------------------------------------------- seeded items and the loader


def seed_by(key: Sequence[int]) -> None:
    words = np.random.SeedSequence([part % 2**64 for part in key]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1:3])
    torch.default_generator.manual_seed(int(words[3]))


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python, numpy and torch by `key`; in the training process, restore their states afterwards."""
    states = None
    if get_worker_info() is None:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_by(key)
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class SeededDataset(Dataset):
    """A training set indexed by (epoch, position, index): augmentation depends on (seed, epoch, position) alone.

    Not on the index, for repeated augmentation shows an image more than once; not on workers, processes or restarts.
    bad: what replaces images that cannot be read; without it they are errors.
    """

    def __init__(self, dataset: Dataset, seed: int, bad: BadImages | None = None):
        self.dataset, self.seed, self.bad = dataset, seed, bad

    def name(self, index: int) -> str:
        """Return an image's file, or its number in a data set that is one file."""
        return self.dataset.samples[index][0] if hasattr(self.dataset, "samples") else f"number {index}"

    def __getitem__(self, key: tuple[int, int, int]):
        epoch, position, index = key
        with seeded(self.seed, epoch, position):
            return self.bad.read(self.dataset, epoch, index) if self.bad else self.dataset[index]


class TimedLoader(DataLoader):
    """A DataLoader that raises RuntimeError if its workers do not start, or deliver no batch within `seconds` (0: no
    limit).

    DataLoader's own timeout ends at the first sign of a batch: it waits for ever for a worker that stops while it
    hands over its memory.
    """

    def __init__(self, *args, seconds: float, **settings):
        super().__init__(*args, **settings)
        self.seconds = seconds if self.num_workers else 0

    def __iter__(self) -> Iterator:
        end, late = object(), RuntimeError(f"DataLoader timed out after {self.seconds:g} seconds")
        reader = getattr(getattr(self.dataset, "dataset", self.dataset), "reader", None)
        bad = getattr(self.dataset, "bad", None)
        try:
            with time_limit(self.seconds, late):  # persistent workers are waited for here already
                batches = super().__iter__()
        except OSError as error:  # their locks and queues need shared memory and open files
            raise RuntimeError(f"DataLoader cannot start its workers: {error}") from error
        for number in itertools.count(1):
            with time_limit(self.seconds, late):
                batch = next(batches, end)
            if batch is end:
                return
            if reader is not None:
                reader.report(final=number == len(self))
            if bad is not None:
                bad.report(final=number == len(self))
            yield batch


def build_loader(dataset: Dataset, sampler: Iterable, *, workers: int, timeout: float = 0, **settings) -> DataLoader:
    """Return a loader of (images (B, C, H, W) or ImageBatch, labels (B,)), which leaves the random states alone.

    timeout: seconds to wait for a batch of the workers before raising RuntimeError, 0 for ever. settings: DataLoader's
    batch_size, pin_memory and drop_last.
    """
    settings |= dict(num_workers=workers, persistent_workers=workers > 0, worker_init_fn=loading_process)
    settings |= dict(collate_fn=collate, generator=torch.Generator())
    return TimedLoader(dataset, sampler=sampler, seconds=timeout, **settings)
