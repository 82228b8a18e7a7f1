"""Data sets, image transforms and loaders.

A data set's items are (image, class index); its `classes` are the class names in the order of their indices.
"""

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, auto_augment, create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100

from gvt_ops.loading import normalization
from gvt_ops.transforms import SMALL, FitSquare, eval_transform, sides
from samplers import BalancedSampler, RASampler, ShuffleSampler, eval_indices
from training import archives, sources
from training.archives import Members
from training.bad_images import BadImages
from training.batches import SeededDataset, Uint8Transform, build_loader
from training.errors import UserError
from training.files import BAD_IMAGES
from training.folders import check_levels
from training.images import ImageReader
from training.options import Options
from training.sources import Images
from utils import get_rank, get_world_size, log, warn

# ---------------------------------------------------------------- transforms


def posterize_or_black(image: Image.Image, bits: int, **_) -> Image.Image:
    """Posterize, also to 0 bits, which is black: timm's increasing strength asks for it, Pillow 13 refuses it."""
    return ImageOps.posterize(image, bits) if bits > 0 else image.point(lambda value: 0)


def build_transform(is_train: bool, args: Options):
    """Return image -> (channels, height, width), normalized, as transforms.Compose.

    Training: crop, flip, RandAugment, gray if asked for, erasing; evaluation: resize and center crop.
    """
    try:
        mean, std = normalization(vars(args), "--in-chans, --mean, --std")
    except ValueError as error:
        raise UserError(f"{error}: change it") from None
    if is_train:
        return train_transform(args, mean, std)
    return eval_transform(args.input_size, args.eval_crop_ratio, mean, std)


def train_transform(args: Options, mean, std) -> transforms.Compose:
    try:
        transform = create_transform(
            sides(args.input_size),
            is_training=True,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa or None,
            interpolation=args.train_interpolation,
            mean=mean * 3 if len(mean) == 1 else mean,  # RandAugment fills with it, in colors
            std=std * 3 if len(std) == 1 else std,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        advice = f"use a policy of timm, such as rand-m9-mstd0.5-inc1 ({error!r})"
        raise UserError(f"no such augmentation (--aa {args.aa}): {advice}") from error
    if len(mean) == 1:
        at = next(i for i, step in enumerate(transform.transforms) if isinstance(step, transforms.ToTensor))
        transform.transforms[at : at + 2] = eval_transform(args.input_size, 1.0, mean, std).transforms[-3:]
    if max(sides(args.input_size)) <= SMALL:
        transform.transforms[:1] = [
            FitSquare(args.input_size),
            transforms.RandomCrop(sides(args.input_size), padding=4),
        ]
    for step in transform.transforms:
        policies = [operation for policy in getattr(step, "policy", []) for operation in policy]
        for operation in [*getattr(step, "ops", []), *policies]:
            if getattr(operation, "aug_fn", None) is auto_augment.posterize:
                operation.aug_fn = posterize_or_black
    return transform


# ---------------------------------------------------------------- data sets


class ImageFiles(Dataset):
    """Image files with their class indices: `samples` has (path, index), `classes` the names."""

    samples: list[tuple[str, int]]
    classes: list[str]
    members: Members | None = None  # where the bytes of each are, if they are in archives

    def __init__(self, transform: Callable, reader: ImageReader):
        self.transform, self.reader = transform, reader

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        data = archives.read(self.members[index], path) if self.members else None
        return self.transform(self.reader(path, data)), label


class Folder(ImageFiles):
    """Images of a class each. With `classes`, their order gives the indices, and a class of another name is refused."""

    def __init__(self, images: Images, transform: Callable, reader: ImageReader, classes: list[str] | None = None):
        super().__init__(transform, reader)
        self.members = images.members
        self.classes = classes if classes is not None else images.names or images.classes
        index = {name: number for number, name in enumerate(self.classes)}
        for name in images.classes:
            if name not in index:
                advice = f"remove it, or add it to {'train' if classes else 'the class map'}"
                advice += ", or name the numbers with --class-map" if name.isdecimal() and not images.names else ""
                raise UserError(f"a class that training does not know ({images.at(name)}): {advice}")
        self.samples = [(path, index[name]) for path, name in images.samples]
        if not self.samples:
            advice = f"expected {Path(images.where).name}/CLASS/* with images in JPEG, PNG, WebP, TIFF"
            raise UserError(f"no images ({images.where}): {advice} or another format of Pillow")


class INat(ImageFiles):
    """iNaturalist 2018 or 2019 from its JSON files; classes are the values of one category over the training images."""

    def __init__(self, root: Path, split: str, transform: Callable, reader: ImageReader, *, year: int, category: str):
        super().__init__(transform, reader)
        files = f"train{year}.json", f"{split}{year}.json", "categories.json"
        train, part, categories = (read_json(root / name) for name in files)
        try:
            names = {entry["id"]: str(entry[category]) for entry in categories}
            self.classes = list(dict.fromkeys(names[a["category_id"]] for a in train["annotations"]))
            index = {name: i for i, name in enumerate(self.classes)}
            labels = {a["image_id"]: index[names[a["category_id"]]] for a in part["annotations"]}
            self.samples = [(self.locate(root, image["file_name"]), labels[image["id"]]) for image in part["images"]]
        except (KeyError, TypeError) as error:
            where = f"{root}, {split}{year}.json, --inat-category {category}"
            raise UserError(f"files that do not belong together ({where}): {error} is in one of them only") from None

    @staticmethod
    def locate(root: Path, name: str) -> str:
        """Return the file that the JSON names, or without the super-category's folder, as the official code does."""
        parts = Path(name).parts
        flat = root.joinpath(parts[0], *parts[2:])
        return str(flat if len(parts) > 3 and not (root / name).exists() else root / name)


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"a file of the data set is missing ({path}): see --data-set and --data-path") from None
    except ValueError as error:
        raise UserError(f"not JSON ({path}): {error}") from None


def build_dataset(
    split: str,
    args: Options,
    *,
    transform: Callable,
    classes: list[str] | None = None,
    head: int | None = None,
    images: Images | None = None,
) -> Dataset:
    """Return the "train" or "val" part of --data-set. classes: those of training, beyond which val must not go.

    head: the outputs of a classifier whose classes are those, or unknown. images: if they are found already.
    """
    root = Path(args.data_path)
    reader = ImageReader(split, alpha=args.alpha, exif=args.exif, max_pixels=args.max_pixels)
    if args.data_set == "IMNET":
        images = images or sources.images(split, args)
        if head is not None and classes is None and images.names and len(images.names) == head:
            classes = images.names  # in their order, which is that of the outputs
        elif head is not None:
            classes = match_classes(images.names or images.classes, classes, head)
        if classes is None and os.path.isdir(images.where):
            check_levels(Path(images.where))
        dataset = Folder(images, transform, reader, classes)
        counts = np.bincount([label for _, label in dataset.samples], minlength=len(dataset.classes))
        empty = [name for name, number in zip(dataset.classes, counts) if not number]
        if empty and classes is None:
            raise UserError(f"a class without images ({images.at(empty[0])}): remove it, or fill it")
        if len(dataset.classes) == 1:
            where = images.at(dataset.classes[0])
            raise UserError(f"only one class ({where}): expected a folder for each of two or more classes")
        dataset.missing = empty
        return dataset
    if args.data_set in ("CIFAR", "CIFAR10"):
        kind = CIFAR100 if args.data_set == "CIFAR" else CIFAR10
        try:
            dataset = kind(root, train=split == "train", transform=transform)
        except RuntimeError:
            where = root / kind.base_folder
            raise UserError(f"no {kind.__name__} ({where}): unpack {kind.url} there, or pass --data-path") from None
    else:
        year = 2018 if args.data_set == "INAT" else 2019
        dataset = INat(root, split, transform, reader, year=year, category=args.inat_category)
    if classes is not None and list(dataset.classes) != list(classes):
        counts = f"{len(dataset.classes)}, not {len(classes)}"
        raise UserError(f"other classes than those trained with ({args.data_set} in {root}): {counts}")
    return dataset


def fingerprint(*parts: Dataset, root: str) -> str:
    """Hash which images with which labels these data sets hold, wherever `root` is: 16 hexadecimal digits."""
    digest, start = hashlib.sha256(), str(Path(root))  # as the data sets write it, however it was spelled
    for part in parts:
        items = part.samples if hasattr(part, "samples") else part.targets
        for item in items:
            path, label = item if isinstance(item, tuple) else ("", item)
            digest.update(f"{path.removeprefix(start)} {label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def labels(dataset: Dataset) -> list[int]:
    """Return the class index of each image."""
    return [label for _, label in dataset.samples] if hasattr(dataset, "samples") else list(dataset.targets)


def match_classes(found: list[str], stored: list[str] | None, head: int) -> list[str]:
    """Return the class names of a classifier of `head` outputs, for val folders `found`.

    stored: the names that its checkpoint holds, if any. Without them, exactly as many folders as outputs are taken in
    sorted order, that of numbers if they count from 0 or 1, and fewer only if they are ImageNet's WordNet ids; else
    raises UserError.
    """
    if stored is not None:
        return stored
    if len(found) == head:
        for first in (0, 1):
            counted = [str(number) for number in range(first, first + head)]
            if set(found) == set(counted):
                log(f"val folders are named {first} to {counted[-1]}: taken as class indices, in the order of numbers")
                return counted
        return sorted(found)
    imagenet = ImageNetInfo().label_names()
    if head == len(imagenet) and set(found) <= set(imagenet):
        return imagenet
    known = "more than the classifier has" if len(found) > head else "and the weights do not say which"
    advice = f"give val all {head} folders, or weights trained here"
    raise UserError(f"val has {len(found)} classes, the weights {head} ({known}): {advice}")


# ---------------------------------------------------------------- what a run uses


def build_val_set(args: Options, classes: list[str] | None = None, **settings) -> Dataset:
    """Return the validation set. settings: see build_dataset."""
    pipeline = build_transform(False, args)
    return build_dataset("val", args, transform=Uint8Transform(pipeline), classes=classes, **settings)


def build_datasets(args: Options) -> tuple[Dataset, Dataset]:
    """Return the training and validation sets of --data-path, with the classes of the former."""
    pipeline = build_transform(True, args)
    transform = Uint8Transform(pipeline, fast_augment=args.fast_augment)
    divided = args.data_set == "IMNET" and args.val_fraction
    train_images, val_images = sources.held_out(args) if divided else (None, None)
    train_set = build_dataset("train", args, transform=transform, images=train_images)
    return train_set, build_val_set(args, list(train_set.classes), images=val_images)


def check_sizes(train_set: Dataset, val_set: Dataset) -> None:
    if len(val_set) > len(train_set):
        warn(f"val has more images than train ({len(val_set)}, {len(train_set)}): are the two swapped?")


def records(args: Options, train_set: Dataset, val_set: Dataset) -> dict[str, str]:
    """Return what a run's folder keeps about its images, by file name: those that --val-fraction held out."""
    if args.data_set != "IMNET" or not args.val_fraction:
        return {}
    return {sources.SPLIT: sources.split_text(args.data_path, train=train_set.samples, val=val_set.samples)}


def loader_kwargs(args: Options, device: torch.device) -> dict:
    pin_memory = args.pin_mem and device.type == "cuda"
    return dict(workers=args.workers, pin_memory=pin_memory, timeout=args.loader_timeout)


def build_val_loader(args: Options, val_set: Dataset, device: torch.device) -> DataLoader:
    shares = dict(rank=get_rank(), world=get_world_size()) if args.dist_eval else {}
    indices = eval_indices(len(val_set), **shares)
    if missing := getattr(val_set, "missing", []):
        absent = f"{len(missing)} of {len(val_set.classes)} classes ({', '.join(missing[:3])})"
        log(f"val has no images of {absent}: scored with the class indices of training")
    settings = dict(batch_size=args.eval_batch_size, drop_last=False) | loader_kwargs(args, device)
    return build_loader(val_set, indices, **settings)


def build_train_loader(args: Options, train_set: Dataset, device: torch.device) -> DataLoader:
    """Return the loader of a training set; raise UserError if an epoch would have no update."""
    world, kind = get_world_size(), RASampler if args.repeated_aug else ShuffleSampler
    images = len(train_set)
    if args.balanced_sampling:
        kind, images = BalancedSampler, labels(train_set)
    sampler = kind(images, seed=args.seed, rank=get_rank(), world=world, pad=not args.global_batch)
    settings = dict(batch_size=args.batch_size, drop_last=True) | loader_kwargs(args, device)
    bad = None
    if args.bad_images == "skip" and hasattr(train_set, "samples"):
        file = None if args.dry_run else Path(args.run_folder) / BAD_IMAGES
        bad = BadImages(labels(train_set), seed=args.seed, file=file, most=args.max_bad)
    loader = build_loader(SeededDataset(train_set, args.seed, bad), sampler, **settings)
    if len(loader) < args.grad_accum_steps:
        shares = f"--batch-size {args.batch_size} x {world} processes x --grad-accum-steps {args.grad_accum_steps}"
        raise UserError(f"global batch larger than the data set ({shares}, {len(train_set)} images): make it smaller")
    return loader
