"""Data sets, pictures and their transforms, and the loader.

A data set's items are (picture, class index); its `classes` are the names of the classes in the order of their indices.
"""

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import contextlib
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo, auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from training import augment
from training.errors import UserError
from training.processes import loading_process, time_limit

SMALL = 32  # pixels: up to this size, pictures are shifted instead of cropped and resized, as published for CIFAR


# ---------------------------------------------------------------- transforms


def posterize_or_black(picture: Image.Image, bits: int, **_) -> Image.Image:
    """Posterize. timm's increasing strength asks for 0 bits now and then, which is black, and which Pillow refuses from
    13 on.
    """
    return ImageOps.posterize(picture, bits) if bits > 0 else picture.point(lambda value: 0)


class FitSquare:
    """Resize and crop to a square; a picture that has this size already stays as it is."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        square = (self.size, self.size)
        return picture if picture.size == square else ImageOps.fit(picture, square, Image.Resampling.BICUBIC)


def build_transform(
    is_train: bool, args, *, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD
) -> transforms.Compose:
    """A picture -> (3, input_size, input_size), normalized. Training: crop, flip, RandAugment, erasing; else resize and
    centre crop.
    """
    size = args.input_size
    if is_train:
        try:
            transform = create_transform(
                size,
                is_training=True,
                scale=args.scale,
                ratio=args.ratio,
                hflip=args.hflip,
                color_jitter=args.color_jitter,
                auto_augment=args.aa or None,
                interpolation=args.train_interpolation,
                mean=mean,
                std=std,
                re_prob=args.reprob,
                re_mode=args.remode,
                re_count=args.recount,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(
                f"no such augmentation (--aa {args.aa}): write one as timm's rand-m9-mstd0.5-inc1 ({error!r})"
            ) from error
        if size <= SMALL:
            transform.transforms[:1] = [FitSquare(size), transforms.RandomCrop(size, padding=4)]
        for step in transform.transforms:
            for operation in [
                *getattr(step, "ops", []),
                *(op for policy in getattr(step, "policy", []) for op in policy),
            ]:
                if getattr(operation, "aug_fn", None) is auto_augment.posterize:
                    operation.aug_fn = posterize_or_black
        return transform
    bicubic = transforms.InterpolationMode.BICUBIC
    resize = [transforms.Resize(int(size / args.eval_crop_ratio), interpolation=bicubic), transforms.CenterCrop(size)]
    return transforms.Compose(
        [*([FitSquare(size)] if size <= SMALL else resize), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )


# ---------------------------------------------------------------- bytes until the device


class Erasing:
    """Stands in for the (3, H, W) picture that timm's random erasing writes on: keeps what it writes, (rows, columns,
    values).
    """

    dtype = torch.float32

    def __init__(self, height: int, width: int):
        self.shape, self.written = torch.Size((3, height, width)), []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, where: tuple[slice, slice, slice], values: Tensor) -> None:
        self.written.append((*where[1:], values))


@dataclass
class Sample:
    """A picture on its way to the device: bytes (H, W, 3), and what is left to do there, in this order.

    operations: RandAugment's, and the colour it fills with, where they are left; normal: mean and std; erased: what
    erasing writes.
    """

    pixels: Tensor
    operations: tuple[list[augment.Operation], augment.Colour] | None
    normal: tuple[tuple[float, ...], tuple[float, ...]]
    erased: list[tuple[slice, slice, Tensor]]


class TorchCrop:
    """timm's random crop and bicubic resize, done by torch in a third of the time: a picture -> (3, H, W) bytes, nearly
    all the same.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop

    def __call__(self, picture: Image.Image) -> Tensor:
        top, left, height, width = self.crop.get_params(picture, self.crop.scale, self.crop.ratio)
        pixels = as_bytes(picture.crop((left, top, left + width, top + height))).permute(2, 0, 1)
        # In Pillow's order but for some crops, which matters little: the picture between the passes is rounded, and cut
        # off at 0 and 255.
        tall, wide = self.crop.size
        between = (tall, width) if height > tall and width < wide else (height, wide)
        for size in (between, self.crop.size):
            pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
        return pixels


def as_bytes(picture: Image.Image | Tensor) -> Tensor:
    """A picture, or a tensor (3, H, W) of one -> (H, W, 3)."""
    return picture.permute(1, 2, 0) if isinstance(picture, Tensor) else torch.from_numpy(np.array(picture))


class InBytes:
    """A pipeline of build_transform up to its first float: a picture -> Sample, with the same random numbers.

    A picture in bytes is a quarter of one in float32, for the memory that loading processes share and for the copy to
    the device. What is left to do there is Pictures.to's, and gives the same bits. fast_augment leaves RandAugment too,
    and lets torch resize: both round otherwise.
    """

    def __init__(self, pipeline: transforms.Compose, *, fast_augment: bool = False):
        steps = pipeline.transforms
        at = next(i for i, step in enumerate(steps) if isinstance(step, transforms.ToTensor))
        self.drawing, normalize, self.erasing = steps[:at], steps[at + 1], steps[at + 2 :]
        self.normal = tuple(
            tuple(torch.as_tensor(part, dtype=torch.float32).tolist()) for part in (normalize.mean, normalize.std)
        )
        self.drawn = augment.Drawn(self.take_augment()) if fast_augment else None
        if fast_augment and isinstance(self.drawing[0], RandomResizedCropAndInterpolation):
            self.drawing[0] = TorchCrop(self.drawing[0])

    def take_augment(self) -> auto_augment.RandAugment:
        last = self.drawing.pop()
        reason = (
            augment.why_not(last) if isinstance(last, auto_augment.RandAugment) else "it does not end with RandAugment"
        )
        if reason:
            raise UserError(
                f"not on the device (--fast-augment, this --aa): {reason}; write rand-m9-mstd0.5-inc1, or leave "
                "--fast-augment away"
            )
        return last

    def __call__(self, picture: Image.Image) -> Sample:
        for step in self.drawing:
            picture = step(picture)
        operations = (self.drawn(), self.drawn.fill) if self.drawn else None
        pixels = as_bytes(picture)
        erased = Erasing(*pixels.shape[:2])
        for step in self.erasing:
            step(erased)
        return Sample(pixels, operations, self.normal, erased.written)


@dataclass
class Pictures:
    """A batch of samples: bytes (B, H, W, 3); the places that erasing writes on, (number, rows, columns, shape); its
    values in one row.
    """

    pixels: Tensor
    plan: augment.Plan | None
    normal: tuple[tuple[float, ...], tuple[float, ...]]
    erased: list[tuple[int, slice, slice, torch.Size]]
    values: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Pictures":
        found = [(number, *written) for number, sample in enumerate(samples) for written in sample.erased]
        values = torch.cat([values.flatten() for *_, values in found]) if found else torch.empty(0)
        places = [(*place, values.shape) for *place, values in found]
        pixels, plan = default_collate([sample.pixels for sample in samples]), None
        if samples[0].operations is not None:
            drawn, fills = zip(*(sample.operations for sample in samples))
            plan = augment.Plan.of(drawn, fills[0], *pixels.shape[1:3])
        return cls(pixels, plan, samples[0].normal, places, values)

    def __len__(self) -> int:
        return len(self.pixels)

    def pin_memory(self) -> "Pictures":
        """What a loader asks for."""
        plan = self.plan and self.plan.pin_memory()
        return replace(self, pixels=self.pixels.pin_memory(), plan=plan, values=self.values.pin_memory())

    def to(
        self,
        device: torch.device,
        *,
        non_blocking: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """-> (B, 3, H, W) in float32 there, augmented where that is left, normalized and erased."""
        pixels = self.pixels.to(device, non_blocking=non_blocking).permute(0, 3, 1, 2)
        if self.plan is not None:
            pixels = pixels.contiguous()
            self.plan.apply(pixels, non_blocking=non_blocking)
        white, mean, std = constants(self.normal, device)
        pictures = pixels.to(torch.float32, memory_format=memory_format).div_(white).sub_(mean).div_(std)
        if self.erased:
            values = self.values.to(device, non_blocking=non_blocking).split(
                [shape.numel() for *_, shape in self.erased]
            )
            for (number, rows, columns, shape), part in zip(self.erased, values):
                pictures[number, :, rows, columns] = part.view(shape)
        return pictures


@functools.cache
def constants(normal: tuple[tuple[float, ...], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255, mean and std on the device. White is a tensor too, for CUDA divides by a number as it multiplies by its
    rounded reciprocal.
    """
    mean, std = (torch.tensor(part, device=device).view(-1, 1, 1) for part in normal)
    return torch.full_like(mean, 255.0), mean, std


def collate(items: Sequence) -> list:
    """Items of a data set -> a batch of them; samples become Pictures."""
    if not (isinstance(items[0], tuple) and isinstance(items[0][0], Sample)):
        return default_collate(items)
    samples, labels = zip(*items)
    return [Pictures.of(samples), default_collate(labels)]


# ---------------------------------------------------------------- data sets


def read_picture(path: str) -> Image.Image:
    """A picture in RGB. One that cannot be read is an error with its path, never replaced by another."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"cannot read a picture ({path}): replace or remove it [{str(error).splitlines()[0]}]"
        ) from error


class Folder(ImageFolder):
    """root/CLASS/picture. With `classes`, their order gives the indices, and a folder of another name is refused."""

    def __init__(self, root: Path, transform: Callable, classes: list[str] | None = None):
        self.wanted = classes
        super().__init__(str(root), transform=transform, loader=read_picture, allow_empty=True)
        if not self.samples:
            raise UserError(f"no pictures ({root}): expected {root.name}/CLASS/* with pictures in PNG, JPEG or WebP")

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        found = class_folders(Path(directory))
        if self.wanted is None:
            return found, {name: index for index, name in enumerate(found)}
        extra = sorted(set(found) - set(self.wanted))
        if extra:
            raise UserError(
                f"a class that training does not know ({Path(directory) / extra[0]}): remove it, or add it to train"
            )
        return self.wanted, {name: index for index, name in enumerate(self.wanted)}


class INat(Dataset):
    """iNaturalist 2018 or 2019 from its JSON files; classes are the values of one category over the training
    pictures.
    """

    def __init__(self, root: Path, split: str, transform: Callable, *, year: int, category: str):
        self.transform = transform
        train, part, categories = (
            read_json(root / name) for name in (f"train{year}.json", f"{split}{year}.json", "categories.json")
        )
        try:
            names = {entry["id"]: str(entry[category]) for entry in categories}
            self.classes = list(dict.fromkeys(names[a["category_id"]] for a in train["annotations"]))
            index = {name: i for i, name in enumerate(self.classes)}
            labels = {a["image_id"]: index[names[a["category_id"]]] for a in part["annotations"]}
            self.samples = [
                (str(self.locate(root, image["file_name"])), labels[image["id"]]) for image in part["images"]
            ]
        except (KeyError, TypeError) as error:
            where = f"{root}, {split}{year}.json, --inat-category {category}"
            raise UserError(f"files that do not belong together ({where}): {error} is in one of them only") from None

    @staticmethod
    def locate(root: Path, name: str) -> Path:
        """The file as the JSON names it, or without the folder of the super-category, as the published code looked for
        it.
        """
        parts = Path(name).parts
        flat = root.joinpath(parts[0], *parts[2:])
        return flat if len(parts) > 3 and not (root / name).exists() else root / name

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return self.transform(read_picture(path)), label


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"a file of the data set is missing ({path}): see --data-set and --data-path") from None
    except ValueError as error:
        raise UserError(f"not JSON ({path}): {error}") from None


def class_folders(root: Path) -> list[str]:
    """The names of the class folders in root, sorted."""
    if not root.is_dir():
        raise UserError(
            f"no such data folder ({root}): expected ImageNet's layout, train/CLASS/* and val/CLASS/*, in --data-path"
        )
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise UserError(f"no pictures ({root}): expected a folder for each class in it")
    return found


def build_dataset(split: str, args, *, transform: Callable, classes: list[str] | None = None) -> Dataset:
    """The "train" or "val" part of --data-set. classes: those of the training, which val must not go beyond."""
    root = Path(args.data_path)
    if args.data_set == "IMNET":
        dataset = Folder(root / split, transform, classes)
        counts = np.bincount([label for _, label in dataset.samples], minlength=len(dataset.classes))
        empty = [name for name, number in zip(dataset.classes, counts) if not number]
        if empty and classes is None:
            raise UserError(f"a class without pictures ({root / split / empty[0]}): remove the folder, or fill it")
        dataset.missing = empty
        return dataset
    if args.data_set in ("CIFAR", "CIFAR10"):
        kind = CIFAR100 if args.data_set == "CIFAR" else CIFAR10
        try:
            dataset = kind(root, train=split == "train", transform=transform)
        except RuntimeError:
            name = kind.base_folder
            raise UserError(
                f"no {kind.__name__} ({root / name}): unpack {kind.url} there, or write --data-path"
            ) from None
    else:
        year = 2018 if args.data_set == "INAT" else 2019
        dataset = INat(root, split, transform, year=year, category=args.inat_category)
    if classes is not None and list(dataset.classes) != list(classes):
        raise UserError(
            f"other classes than those trained with ({args.data_set} in {root}): {len(dataset.classes)}, not "
            f"{len(classes)}"
        )
    return dataset


def fingerprint(*parts: Dataset, root: str) -> str:
    """A short name for which pictures with which labels these data sets hold, wherever `root` is: 16 hexadecimal
    digits.
    """
    digest, start = hashlib.sha256(), str(Path(root))  # as the data sets write it, however it was spelled
    for part in parts:
        items = part.samples if hasattr(part, "samples") else part.targets
        for item in items:
            path, label = item if isinstance(item, tuple) else ("", item)
            digest.update(f"{path.removeprefix(start)} {label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def match_classes(found: list[str], stored: list[str] | None, head: int) -> list[str]:
    """The class names of a classifier of `head` outputs, for val folders `found`; `stored`: the names its checkpoint
    gives, if any.

    Without names, exactly as many folders as outputs are taken in sorted order, and fewer only where they are
    ImageNet's WordNet ids.
    """
    if stored is not None:
        return stored
    if len(found) == head:
        return sorted(found)
    imagenet = ImageNetInfo().label_names()
    if head == len(imagenet) and set(found) <= set(imagenet):
        return imagenet
    known = "more than the classifier has" if len(found) > head else "and the weights do not say which"
    raise UserError(
        f"val has {len(found)} classes, the weights {head} ({known}): give val all {head} folders, or weights trained "
        "here"
    )


# ---------------------------------------------------------------- random numbers and the loader


def seed_by(key: Sequence[int]) -> None:
    words = np.random.SeedSequence([part % 2**64 for part in key]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1:3])
    torch.default_generator.manual_seed(int(words[3]))


@contextlib.contextmanager
def random_numbers(*key: int) -> Iterator[None]:
    """Random numbers of python, numpy and torch as a function of `key`; in the training process, its own states are put
    back.
    """
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


class Keyed(Dataset):
    """A training set whose items are asked for as (epoch, position, index): augmentation depends on (seed, epoch,
    position) alone.

    Not on the index, for repeated augmentation shows a picture more than once; not on workers, processes or restarts.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def name(self, index: int) -> str:
        """A picture's file, or its number in a set that is one file."""
        return self.dataset.samples[index][0] if hasattr(self.dataset, "samples") else f"number {index}"

    def __getitem__(self, key: tuple[int, int, int]):
        epoch, position, index = key
        with random_numbers(self.seed, epoch, position):
            return self.dataset[index]


class TimedLoader(DataLoader):
    """A loader whose batches must come within `seconds` where other processes make them.

    DataLoader's own timeout ends at the first sign of a batch: one of a process that stops while it hands over its
    memory is waited for without end.
    """

    def __init__(self, *args, seconds: float, **settings):
        super().__init__(*args, **settings)
        self.seconds = seconds if self.num_workers else 0

    def __iter__(self) -> Iterator:
        end, late = object(), RuntimeError(f"DataLoader timed out after {self.seconds:g} seconds")
        with time_limit(self.seconds, late):  # processes that were there before are waited for already here
            batches = super().__iter__()
        while True:
            with time_limit(self.seconds, late):
                batch = next(batches, end)
            if batch is end:
                return
            yield batch


def build_loader(
    dataset: Dataset,
    sampler: Iterable,
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    drop_last: bool,
    timeout: float = 0,
) -> DataLoader:
    """Batches of (pictures (B, 3, H, W) or Pictures, labels (B,)). Drawing them leaves the process's own random states
    alone.

    timeout: seconds without a batch of the workers after which it is an error, 0 for none.
    """
    return TimedLoader(
        dataset,
        sampler=sampler,
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=pin_memory,
        drop_last=drop_last,
        persistent_workers=workers > 0,
        seconds=timeout,
        collate_fn=collate,
        worker_init_fn=loading_process,
        generator=torch.Generator(),
    )
