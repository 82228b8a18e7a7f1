"""Data sets: the published augmentation, classes that are never scored wrong, random numbers by position, errors that
name the file.
"""

import json
import random

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image
from timm.data import ImageNetInfo, auto_augment
from torchvision import transforms

import datasets
from samplers import RASampler, ShuffleSampler
from training import batches, options
from training.errors import UserError


def arguments(*words):
    return options.parse_args([str(word) for word in words])


def names(pipeline):
    return [type(step).__name__ for step in pipeline.transforms]


# ---------------------------------------------------------------- transforms


def test_the_published_training_pipeline():
    crop, flip, augment, tensor, normalize, erase = datasets.build_transform(True, arguments()).transforms
    assert type(crop).__name__ == "RandomResizedCropAndInterpolation"
    assert (crop.size, tuple(crop.scale), tuple(crop.ratio)) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    assert isinstance(flip, transforms.RandomHorizontalFlip) and flip.p == 0.5
    assert augment.num_layers == 2 and augment.choice_weights is None
    assert [op.name for op in augment.ops] == [
        "AutoContrast",
        "Equalize",
        "Invert",
        "Rotate",
        "PosterizeIncreasing",
        "SolarizeIncreasing",
        "SolarizeAdd",
        "ColorIncreasing",
        "ContrastIncreasing",
        "BrightnessIncreasing",
        "SharpnessIncreasing",
        "ShearX",
        "ShearY",
        "TranslateXRel",
        "TranslateYRel",
    ]
    for op in augment.ops:
        assert (op.prob, op.magnitude, op.magnitude_std, op.magnitude_max) == (0.5, 9, 0.5, None)
        assert op.kwargs == {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BICUBIC}
    assert type(tensor).__name__ in ("ToTensor", "MaybeToTensor")
    assert normalize.mean.tolist() == pytest.approx([0.485, 0.456, 0.406]) and normalize.std.tolist() == pytest.approx(
        [0.229, 0.224, 0.225]
    )
    assert (erase.probability, erase.min_area, erase.max_area, erase.rand_color, erase.per_pixel) == (
        0.25,
        0.02,
        1 / 3,
        False,
        True,
    )
    assert (erase.min_count, erase.max_count) == (1, 1)


def test_ranges_of_the_strengths():
    """As the published timm had them at strengths 0 and 10: what each operation is given."""
    ops = {op.name: op for op in datasets.build_transform(True, arguments()).transforms[2].ops}
    expected = {
        "Rotate": (0.0, 30.0),
        "PosterizeIncreasing": (4, 0),
        "SolarizeIncreasing": (256, 0),
        "SolarizeAdd": (0, 110),
        "ColorIncreasing": (1.0, 1.9),
        "ShearX": (0.0, 0.3),
        "TranslateXRel": (0.0, 0.45),
    }
    for name, (weakest, strongest) in expected.items():
        random.seed(0)
        for strength, value in ((0.0, weakest), (10.0, strongest)):
            found = {abs(ops[name].level_fn(strength, ops[name].hparams)[0]) for _ in range(50)}
            allowed = {value} if not name.startswith("Color") else {value, round(2 - value, 10)}
            assert {round(v, 10) for v in found} <= allowed, name


@pytest.mark.parametrize("size", [32, 48, 96, 224, 256, 384])
def test_the_evaluation_pipeline(size):
    pipeline = datasets.build_transform(False, arguments("--input-size", size))
    if size <= 32:
        assert names(pipeline) == ["FitSquare", "ToTensor", "Normalize"]
    else:
        resize, crop, _, _ = pipeline.transforms
        assert resize.size == int(256 / 224 * size) and resize.interpolation == transforms.InterpolationMode.BICUBIC
        assert tuple(crop.size) == (size, size)
    assert pipeline(Image.new("RGB", (90, 60))).shape == (3, size, size)


def test_the_crop_ratio_can_be_timms():
    assert datasets.build_transform(False, arguments("--eval-crop-ratio", 0.9)).transforms[0].size == 248


def test_small_images_are_shifted_as_published():
    pipeline = datasets.build_transform(True, arguments("--input-size", 32, "--hflip", 0))
    assert names(pipeline)[:2] == ["FitSquare", "RandomCrop"] and pipeline.transforms[1].padding == 4
    image = Image.new("RGB", (32, 32))
    assert pipeline.transforms[0](image) is image  # an image of that size is left alone
    assert pipeline(Image.new("RGB", (8, 100))).shape == (3, 32, 32)


def test_posterize_to_nothing_is_black():
    """timm asks for 0 bits about once in 600 images; Pillow 13 refuses, the published Pillow gave black."""
    op = next(
        op for op in datasets.build_transform(True, arguments()).transforms[2].ops if op.name == "PosterizeIncreasing"
    )
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    assert op.level_fn(10.0, op.hparams) == (0,)
    assert not np.asarray(op.aug_fn(image, 0, **op.kwargs)).any()
    assert np.array_equal(np.asarray(op.aug_fn(image, 3, **op.kwargs)), np.asarray(auto_augment.posterize(image, 3)))


@pytest.mark.parametrize(
    "policy",
    ["rand-m9-mstd0.5-inc1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v0-mstd0.5", "original"))],
)
def test_augmentation_of_many_images_never_fails(policy):
    pipeline = datasets.build_transform(True, arguments("--input-size", 48, "--aa", policy))
    noise = Image.effect_noise((60, 60), 80).convert("RGB")
    for position in range(1500):
        with batches.seeded(0, 0, position):
            assert pipeline(noise).isfinite().all()


def test_options_reach_the_pipeline():
    words = ["--hflip", 0, "--scale", 0.5, 0.9, "--ratio", 1, 1, "--aa", "", "--reprob", 0, "--color-jitter", 0.2]
    pipeline = datasets.build_transform(True, arguments(*words))
    assert names(pipeline)[:2] == ["RandomResizedCropAndInterpolation", "ColorJitter"] and "RandomErasing" not in names(
        pipeline
    )
    assert tuple(pipeline.transforms[0].scale) == (0.5, 0.9) and tuple(pipeline.transforms[0].ratio) == (1, 1)
    with pytest.raises(UserError, match="no such augmentation"):
        datasets.build_transform(True, arguments("--aa", "rand-x9"))


# ---------------------------------------------------------------- bytes until the device


def batches_of(args, is_train, late, *, workers=0, repeated=False):
    """Two epochs' batches, with the images in bytes until the device or in float32 from the start; what they become
    on it.
    """
    pipeline = datasets.build_transform(is_train, args)
    dataset = datasets.build_dataset("train", args, transform=batches.Uint8Transform(pipeline) if late else pipeline)
    sampler = (RASampler if repeated else ShuffleSampler)(len(dataset), seed=1)
    loader = batches.build_loader(
        batches.SeededDataset(dataset, 1), sampler, batch_size=8, workers=workers, pin_memory=False, drop_last=False
    )
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            assert len(images) == len(labels) and isinstance(images, batches.ImageBatch) == late
            yield images.to(torch.device("cpu"), memory_format=torch.contiguous_format), labels


PIPELINES = {
    "published": [],
    "several_places": ["--reprob", 0.9, "--recount", 3],
    "one_color": ["--reprob", 0.9, "--remode", "rand"],
    "black": ["--reprob", 0.9, "--remode", "const"],
    "no_erasing": ["--reprob", 0, "--aa", "", "--train-interpolation", "random"],
    "shifted": ["--input-size", 32],
}


@pytest.mark.parametrize("is_train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("words", PIPELINES.values(), ids=PIPELINES)
def test_bytes_until_the_device_end_as_the_same_bits(words, is_train, toy):
    args = arguments("--data-path", toy, "--input-size", 40, *words)
    pairs = list(zip(batches_of(args, is_train, False), batches_of(args, is_train, True), strict=True))
    assert len(pairs) == 12 and len({tuple(labels.tolist()) for (_, labels), _ in pairs}) > 6
    for (expected, labels), (found, same_labels) in pairs:
        assert (
            found.dtype == torch.float32
            and found.is_contiguous()
            and found.shape == (8, 3, args.input_size, args.input_size)
        )
        assert torch.equal(found, expected) and torch.equal(labels, same_labels)


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_workers(workers, toy):
    args = arguments("--data-path", toy, "--input-size", 40, "--reprob", 0.5)
    pairs = zip(
        batches_of(args, True, False, repeated=True),
        batches_of(args, True, True, workers=workers, repeated=True),
        strict=True,
    )
    for (expected, _), (found, _) in pairs:
        assert torch.equal(found, expected)


def test_a_batch_in_bytes_is_small_and_keeps_its_layout(toy):
    args = arguments("--data-path", toy, "--input-size", 40, "--reprob", 1)
    dataset = datasets.build_dataset(
        "train", args, transform=batches.Uint8Transform(datasets.build_transform(True, args))
    )
    batch, _ = batches.collate([dataset[i] for i in range(8)])
    assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape == (8, 40, 40, 3)
    assert (
        len(batch.erased) == 8
        and len(batch.values) == sum(shape.numel() for *_, shape in batch.erased) < batch.pixels.numel()
    )
    plain, last = (
        batch.to(torch.device("cpu"), memory_format=layout) for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(plain, last)
    assert torch.equal(batch.to(torch.device("cpu")), plain)  # the bytes are left as they were


# ---------------------------------------------------------------- random numbers


class Draws(torch.utils.data.Dataset):
    """What the three generators give, instead of images."""

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item(), index])

    def __len__(self):
        return 12


def draws(workers, *, kind=ShuffleSampler, rank=0, world=1, epoch=3, seed=0):
    sampler = kind(12, seed=0, rank=rank, world=world)
    sampler.set_epoch(epoch)
    options = dict(batch_size=3, workers=workers, pin_memory=False, drop_last=True)
    loader = batches.build_loader(batches.SeededDataset(Draws(), seed), sampler, **options)
    return torch.cat(list(loader))


def test_random_numbers_do_not_depend_on_workers_or_processes():
    alone = draws(0)
    assert torch.equal(alone, draws(2))
    shares = [draws(0, rank=rank, world=2) for rank in range(2)]
    together = torch.stack(shares, 1).flatten(0, 1)  # positions 0 1 2 ... of the global order
    assert torch.equal(together, alone)


def test_random_numbers_follow_position_epoch_and_seed_not_the_index():
    repeated = draws(0, kind=RASampler)
    assert len(set(repeated[:, 3].tolist())) < len(repeated) == len({tuple(row) for row in repeated[:, :3].tolist()})
    assert not torch.equal(draws(0)[:, :3], draws(0, epoch=4)[:, :3]) and not torch.equal(
        draws(0)[:, :3], draws(0, seed=1)[:, :3]
    )
    assert torch.equal(draws(0, seed=-1), draws(0, seed=-1))


def test_the_process_keeps_its_own_random_states():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [random.random(), np.random.rand(), torch.rand(3).tolist()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draws(0)
    assert [random.random(), np.random.rand(), torch.rand(3).tolist()] == expected


# ---------------------------------------------------------------- classes


def test_val_is_scored_with_trainings_indices(tmp_path):
    make_images(tmp_path / "train", classes=("ant", "bee", "cat"), each=2)
    make_images(tmp_path / "val", classes=("bee", "cat"), each=2)
    args = arguments("--data-path", tmp_path)
    train = datasets.build_dataset("train", args, transform=None)
    val = datasets.build_dataset("val", args, transform=None, classes=train.classes)
    assert val.missing == ["ant"] and sorted({label for _, label in val.samples}) == [1, 2]
    make_images(tmp_path / "val", classes=("dog",), each=1)
    with pytest.raises(UserError, match="a class that training does not know .*dog"):
        datasets.build_dataset("val", args, transform=None, classes=train.classes)


def test_classes_of_weights():
    match, imagenet = datasets.match_classes, ImageNetInfo().label_names()
    assert match(["b", "a"], None, 2) == ["a", "b"]
    assert match(["a"], ["a", "b"], 2) == ["a", "b"]
    assert match(imagenet[500:510], None, 1000) == imagenet
    for found, head in ((["a"], 2), (["a", "b", "c"], 2), (["cat"], 1000)):
        with pytest.raises(UserError, match=f"val has {len(found)} classes, the weights {head}"):
            match(found, None, head)


def test_imagenets_names_are_in_sorted_order():
    """So that a whole ImageNet folder and a part of one give the same indices."""
    assert ImageNetInfo().label_names() == sorted(ImageNetInfo().label_names())


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda root: None, "no such data folder"),
        (lambda root: (root / "train").mkdir(), "expected a folder for each class"),
        (lambda root: (root / "train" / "ant").mkdir(parents=True), "no images"),
        (
            lambda root: (make_images(root / "train", classes=("ant",), each=1), (root / "train" / "bee").mkdir()),
            "a class without images",
        ),
    ],
)
def test_bad_folders_are_named(tmp_path, build, says):
    build(tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        datasets.build_dataset("train", arguments("--data-path", tmp_path), transform=None)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_hidden_folders_are_no_classes(tmp_path):
    make_images(tmp_path / "train", classes=("ant", "bee", ".cache", "__MACOSX"), each=1)
    assert datasets.build_dataset("train", arguments("--data-path", tmp_path), transform=None).classes == ["ant", "bee"]


BROKEN = [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)]


@pytest.mark.parametrize(
    ("content", "workers"), [*((content, 0) for content in BROKEN), pytest.param(BROKEN[1], 1, marks=pytest.mark.slow)]
)
def test_an_unreadable_image_is_named_and_never_replaced(tmp_path, content, workers):
    make_images(tmp_path / "val", classes=("ant", "bee"), each=2)
    (tmp_path / "val" / "bee" / "broken.png").write_bytes(content)
    args = arguments("--data-path", tmp_path, "--input-size", 32)
    dataset = datasets.build_dataset("val", args, transform=datasets.build_transform(False, args))
    loader = batches.build_loader(
        dataset, range(len(dataset)), batch_size=2, workers=workers, pin_memory=False, drop_last=False
    )
    from training.errors import short_reason

    with pytest.raises(UserError) as caught:
        list(loader)
    assert short_reason(caught.value).startswith(f"cannot read an image ({tmp_path / 'val' / 'bee' / 'broken.png'}): ")


# ---------------------------------------------------------------- other data sets


def test_cifar(tmp_path):
    import hashlib
    import pickle

    args = arguments("--data-path", tmp_path, "--data-set", "CIFAR10")
    with pytest.raises(UserError, match="no CIFAR10 .*cifar-10-batches-py"):
        datasets.build_dataset("train", args, transform=None)

    class Tiny(datasets.CIFAR10):  # the same files with two images each, and their own checksums
        pass

    folder = tmp_path / Tiny.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [3, 9]}
    Tiny.train_list = [[name, write(name, batch)] for name, _ in Tiny.train_list]
    Tiny.test_list = [[name, write(name, batch)] for name, _ in Tiny.test_list]
    labels = {"label_names": [f"class{i}" for i in range(10)]}
    Tiny.meta = Tiny.meta | {"md5": write(Tiny.meta["filename"], labels)}
    original, datasets.CIFAR10 = datasets.CIFAR10, Tiny
    try:
        train = datasets.build_dataset(
            "train", args, transform=datasets.build_transform(True, arguments("--input-size", 32))
        )
        val = datasets.build_dataset("val", args, transform=None, classes=train.classes)
    finally:
        datasets.CIFAR10 = original
    assert (
        (len(train), len(val), len(train.classes)) == (10, 2, 10)
        and train[0][0].shape == (3, 32, 32)
        and train[0][1] == 3
    )


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("kind", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist(tmp_path, kind, year, flat):
    """Labels come from the annotations, classes from a category; both folder layouts are found."""
    categories = [
        {"id": 4, "genus": "Apis", "name": "Apis mellifera"},
        {"id": 9, "genus": "Apis", "name": "Apis cerana"},
    ]
    categories.append({"id": 2, "genus": "Felis", "name": "Felis catus"})
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    for split, ids in (("train", [4, 2, 9]), ("val", [9, 2])):
        images, annotations = [], []
        for number, category in enumerate(ids):
            name = f"train_val{year}/Animals/{category}/{split}{number}.png"
            path = tmp_path / (name.replace("Animals/", "") if flat else name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40)).save(path)
            images.append({"id": number, "file_name": name})
            annotations.append({"image_id": number, "category_id": category})
        (tmp_path / f"{split}{year}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    to_tensor = transforms.ToTensor()
    for category, classes, labels in (("name", 3, [2, 1]), ("genus", 2, [0, 1])):
        args = arguments("--data-path", tmp_path, "--data-set", kind, "--inat-category", category)
        train = datasets.build_dataset("train", args, transform=to_tensor)
        val = datasets.build_dataset("val", args, transform=to_tensor, classes=train.classes)
        assert (
            len(train.classes) == classes and [val[i][1] for i in range(2)] == labels and val[0][0].shape == (3, 40, 40)
        )
    (tmp_path / "categories.json").write_text(json.dumps(categories[:1]))
    with pytest.raises(UserError, match="files that do not belong together"):
        datasets.build_dataset("train", args, transform=None)
    (tmp_path / "categories.json").unlink()
    with pytest.raises(UserError, match="categories.json"):
        datasets.build_dataset("train", args, transform=None)


@pytest.mark.parametrize(("words", "updates"), [((), (12, 12, 13)), (("--global-batch", "8"), (12, 12, 12))])
def test_updates_an_epoch_of_any_number_of_processes(words, updates, tmp_path, monkeypatch):
    """101 images: by default the last ones are filled up as in the official code, one global batch drops them."""
    for part, each in (("train", 101), ("val", 1)):
        make_images(tmp_path / part, classes=("ant",), each=each)
    (tmp_path / "val" / "bee").mkdir()
    (tmp_path / "train" / "bee").mkdir()
    (tmp_path / "train" / "ant" / "100.png").rename(tmp_path / "train" / "bee" / "100.png")
    for world, expected in zip((1, 2, 4), updates):
        monkeypatch.setattr(datasets, "get_world_size", lambda world=world: world)
        options_here = ["--data-path", str(tmp_path), "--batch-size", str(8 // world), "--num_workers", "0", *words]
        args = options.parse_args(options_here)
        train_set, _ = datasets.build_datasets(args)
        assert len(datasets.build_train_loader(args, train_set, torch.device("cpu"))) == expected
