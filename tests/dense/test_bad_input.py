"""Whatever people have for images, labels, annotations and checkpoints: a result, or one line that says what to do, and
nothing is lost.
"""

import copy
import functools
import hashlib
import importlib
import io
import re
import shutil
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import numpy as np
import timm
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DefaultScope
from PIL import Image
from toys import DETECTOR, ROOT, SEGMENTOR, STRANGE, ade_toy, annotations, coco_toy, give_image, noise, run, write

from dense import cli, libraries
from dense.transforms import with_checks
from training import checkpoint
from training.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of mmdetection's masks
    pytest.mark.filterwarnings(
        "ignore:.*instance named of:UserWarning"
    ),  # of mmengine, where one process makes two runs
]
DATA = {"mmseg": ade_toy, "mmdet": coco_toy}


@pytest.fixture(scope="module", params=libraries.TASKS)
def library(request):
    """Each library with its scope, as a command sets it."""
    with within(request.param):
        yield request.param


def within(name):
    libraries.load(name)
    return DefaultScope.overwrite_default_scope(name)


def toy(folder, library, *, setting="mask_rcnn_3x_swin"):
    """The config of a toy, and its data."""
    data = DATA[library](folder / "data")
    if library == "mmseg":
        return write(folder / "segmentor.py", SEGMENTOR, data=data), data
    return write(folder / "detector.py", DETECTOR, data=data, setting=setting, masks=setting.startswith("mask")), data


@functools.cache
def parsed(name):
    """A toy's config, wherever its data is: reading one takes longer than most tests."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "segmentor.py":
            return Config.fromfile(write(Path(folder, name), SEGMENTOR, data=""))
        return Config.fromfile(write(Path(folder, name), DETECTOR, data="", setting="mask_rcnn_3x_swin", masks=True))


def dataset_of(config, part, **options):
    """The data set of a command's loader."""
    from dense.runner import TwinsRunner, adapt_to_machine

    cfg = copy.deepcopy(parsed(config.name))
    adapt_to_machine(cfg)
    loader = cfg[f"{part}_dataloader"]
    loader.dataset.data_root = f"{config.parent / 'data'}/"
    loader.dataset.update(serialize_data=False, **options)  # which takes a whole garbage collection
    if part == "train":
        loader.dataset.pop("filter_cfg", None)  # of COCO's: it leaves small images out
    return TwinsRunner.build_dataloader(loader, seed=0).dataset


def error_of(start, *args):
    """The one line of a call that must fail."""
    with pytest.raises(UserError) as caught:
        start(*args)
    line = str(caught.value)
    assert "\n" not in line and 20 < len(line) < 500
    return line


def use_all(config, part, **options):
    with libraries.quiet():
        for data in (
            each
            for dataset in [dataset_of(config, part, **options)]
            for each in (dataset[i] for i in range(len(dataset)))
        ):
            assert data is not None


def command(library, program, *words):
    return run([cli.sys.executable, ROOT / libraries.TASKS[library] / f"{program}.py", *words], words[0].parent)


# ---------------------------------------------------------------- images


def test_images_of_every_kind(library, tmp_path):
    """They come out of the training's and the test's pipelines with labels and boxes of their own size, and a model
    takes the smallest.
    """
    config, data = toy(tmp_path, library)
    found = {}
    model = build(parsed(config.name))
    for name, make in STRANGE.items():
        image = make()
        give_image(data, 0, image)
        indices = dict(indices=[0] if library == "mmseg" else [-1])
        for part in ("train", "val"):
            sample = dataset_of(config, part, **indices)[0]
            facts = sample["data_samples"].metainfo
            assert facts["ori_shape"] == image.size[::-1], name
            if library == "mmseg":
                expected = sample["inputs"].shape[1:] if part == "train" else image.size[::-1]
                assert sample["data_samples"].gt_sem_seg.data.shape == (1, *expected), name
            else:
                assert len(sample["data_samples"].gt_instances) == 1, name
        if min(image.size) > 1:
            continue
        with torch.inference_mode():
            (result,) = model.test_step({key: [value] for key, value in sample.items()})
        found[name] = (
            result.pred_sem_seg.data.shape[1:] if library == "mmseg" else result.pred_instances.masks.shape[1:]
        )
    assert found == {"one pixel": (1, 1), "one row": (1, 4000), "one column": (4000, 1)}


def build(cfg):
    from mmengine.model import revert_sync_batchnorm

    torch.manual_seed(0)
    with libraries.quiet():
        model = importlib.import_module(f"{cfg.default_scope}.registry").MODELS.build(cfg.model)
    if cfg.default_scope == "mmdet":
        model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=2)
        model.rpn_head.test_cfg.update(nms_pre=20, max_per_img=20)
    return revert_sync_batchnorm(model).eval()


def jpeg():
    file = io.BytesIO()
    Image.fromarray(noise(48, 80)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [jpeg()[:-200], jpeg()[:300], b"", b"not an image", None],
    ids=["nearly whole", "cut", "empty", "text", "missing"],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_image_that_cannot_be_read(library, part, content, tmp_path):
    config, data = toy(tmp_path, library)
    path = (
        data / "images" / dict(train="training", val="validation")[part] if library == "mmseg" else data / f"{part}2017"
    )
    path = sorted(path.iterdir())[0]
    if content is None and library == "mmseg":
        pytest.skip("the folder is the list")
    path.unlink() if content is None else path.write_bytes(content)
    assert re.match(rf"cannot read an image \({path}\): .*(replace|download)", error_of(use_all, config, part))


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.ones((50, 80)), r"of another size than their image \(.*_0.png\): 50 x 80, the image is 48 x 80"),
        (np.ones((80, 48)), "of another size"),
        (np.ones((1, 1)), "of another size"),
        (noise(48, 80), r"with several channels \(.*_0.png, RGB\)"),
        (noise(48, 80, 4), r"with several channels \(.*_0.png, RGBA\)"),
        (np.full((48, 80), 4), r"a label of no class \(.*_0.png\): 4; the data set has 3 classes, labels 1 to 3"),
        (np.full((48, 80), 254), "a label of no class"),
        (np.full((48, 80), 256, np.uint16), r"a label above 255 \(.*_0.png\): 256"),
        (b"not an image", r"cannot read the labels \(.*_0.png\): replace or remove it \[cannot identify image"),
        (None, r"cannot read the labels \(.*_0.png\): .*No such file"),
    ],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_labels_that_cannot_be_used(part, labels, says, tmp_path):
    with within("mmseg"):
        config, data = toy(tmp_path, "mmseg")
        folder = dict(train="training", val="validation")[part]
        path = data / "annotations" / folder / f"{folder}_0.png"
        path.unlink()
        if isinstance(labels, bytes):
            path.write_bytes(labels)
        elif labels is not None:
            Image.fromarray(labels.astype(np.uint16 if labels.dtype == np.uint16 else np.uint8)).save(path)
        assert re.search(says, error_of(use_all, config, part))


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
def test_labels_of_every_kind_of_file(mode, tmp_path):
    """0 is unlabeled, 255 as well, and k is class k - 1."""
    with within("mmseg"):
        config, data = toy(tmp_path, "mmseg")
        known = np.arange(48 * 80).reshape(48, 80) % (2 if mode == "1" else 4)
        if mode != "1":
            known[0] = 255
        image = Image.fromarray(known.astype(np.uint16)) if mode == "I;16" else Image.fromarray(known.astype(np.uint8))
        if mode == "P":
            image.putpalette(list(range(256)) * 3)
        image = Image.fromarray(known.astype(bool)) if mode == "1" else image
        image.save(data / "annotations" / "validation" / "validation_0.png")
        with Image.open(data / "annotations" / "validation" / "validation_0.png") as written:
            assert written.mode == mode
        labels = dataset_of(config, "val")[0]["data_samples"].gt_sem_seg.data[0].numpy()
        assert np.array_equal(labels, np.where((known == 0) | (known == 255), 255, known - 1))


def test_labels_of_chosen_classes(tmp_path):
    """A part of ADE20K's classes: the others are unlabeled, and numbers follow the choice."""
    from mmseg.datasets import ADE20KDataset

    with within("mmseg"):
        config, data = toy(tmp_path, "mmseg")
        wall, sky = (ADE20KDataset.METAINFO["classes"].index(name) for name in ("wall", "sky"))
        pipeline = with_checks(parsed(config.name).val_dataloader.dataset.pipeline, "mmseg")
        Image.fromarray(noise(1, 4)).save(data / "images" / "validation" / "validation_0.jpg", "PNG")
        Image.fromarray(np.array([[0, wall + 1, sky + 1, 9]], np.uint8)).save(
            data / "annotations" / "validation" / "validation_0.png"
        )
        folders = dict(img_path="images/validation", seg_map_path="annotations/validation")
        dataset = ADE20KDataset(
            metainfo=dict(classes=("sky", "wall")),
            data_root=str(data),
            data_prefix=folders,
            reduce_zero_label=True,
            pipeline=pipeline,
        )
        assert dataset[0]["data_samples"].gt_sem_seg.data.tolist() == [[[255, 1, 0, 255]]]


@pytest.mark.parametrize("labels", [0, 255])
def test_an_image_without_a_label(labels, tmp_path):
    """It trains with a loss of 0, and does not count in a score."""
    with within("mmseg"):
        config, data = toy(tmp_path, "mmseg")
        for part in ("training", "validation"):
            Image.fromarray(np.full((48, 80), labels, np.uint8)).save(data / "annotations" / part / f"{part}_0.png")
        sample = dataset_of(config, "train")[0]
        assert (sample["data_samples"].gt_sem_seg.data == 255).all()
        model = build(parsed(config.name)).train()
        batch = model.data_preprocessor({key: [value, value] for key, value in sample.items()}, training=True)
        losses = model(**batch, mode="loss")
        assert losses["decode.loss_ce"].item() == 0
        losses["decode.loss_ce"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- annotations


def each(kind, **values):
    def change(content):
        for entry in content[kind]:
            entry.update(values)

    return change


def without(kind, name=None):
    def change(content):
        if name is None:
            del content[kind]
        for entry in content.get(kind, []):
            entry.pop(name, None)

    return change


WRONG_ANNOTATIONS = {
    "no images": (without("images"), "the list 'images' is missing"),
    "no categories": (without("categories"), "'categories' is missing"),
    "no file names": (without("images", "file_name"), "'file_name' is missing"),
    "no sizes": (without("images", "height"), "'height' is missing"),
    "no boxes": (without("annotations", "bbox"), "'bbox' is missing"),
    "no areas": (without("annotations", "area"), "'area' is missing"),
    "no category": (without("annotations", "category_id"), "'category_id' is missing"),
    "no image": (without("annotations", "image_id"), "'image_id' is missing"),
    "no names": (without("categories", "name"), "'name' is missing"),
    "no outlines": (
        without("annotations", "segmentation"),
        r"masks that cannot be used .*id \d+: 'segmentation' is missing",
    ),
    "boxes of text": (each("annotations", bbox="ab"), "bbox is not four numbers"),
    "ids twice": (each("annotations", id=1), "not unique"),
    "other sizes": (
        each("images", height=64, width=64),
        "annotations of another size than their image .* 64 x 64, the image is 48 x 64",
    ),
}


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("name", WRONG_ANNOTATIONS)
def test_wrong_annotations(name, part, tmp_path, capsys):
    change, says = WRONG_ANNOTATIONS[name]
    with within("mmdet"):
        config, data = toy(tmp_path, "mmdet")
        with annotations(data, f"{part}2017") as content:
            change(content)
        line = error_of(use_all, config, part)
        assert re.search(says, line)
        assert re.search(r"instances_(train|val)2017.json|/000000000000.jpg", line)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            each("annotations", segmentation=[[1, 2]]),
            r"masks that cannot be used \(.*instances_val2017.json\): 9, id 0: a polygon in 'segmentation' is not x, y of three",
        ),
        (
            lambda content: content.update(images=content["images"][1:]),
            r"scores for other images than the data set's \(.*instances_val2017.json\)",
        ),
    ],
)
def test_annotations_that_cannot_be_scored(change, says, tmp_path, capsys):
    """The error comes before the first image, not after the last."""
    from dense.checks import check_scores

    with within("mmdet"):
        config, data = toy(tmp_path, "mmdet")
        dataset = dataset_of(config, "val")
        file = str(data / "annotations" / "instances_val2017.json")
        scores = with_checks(dict(type="CocoMetric", ann_file=file, metric=["bbox", "segm"]), "mmdet")

        def check():
            check_scores(Evaluator(scores), dataset, must_score=True)

        check()
        with annotations(data, "val2017") as content:
            change(content)
        assert re.match(says, error_of(check))


@pytest.mark.parametrize("text", ["", "{not json", "[1]", '"x"', "{}", "\x00\xff"])
def test_annotations_that_are_none(text, tmp_path, capsys):
    with within("mmdet"):
        config, data = toy(tmp_path, "mmdet")
        (data / "annotations" / "instances_val2017.json").write_text(text)
        assert re.match(
            r"cannot read the annotations \(.*instances_val2017.json.*\): ", error_of(dataset_of, config, "val")
        )


def test_no_image_has_a_box(tmp_path, capsys):
    """None of them is trained with, as in the official code."""
    from dense.runner import TwinsRunner

    with within("mmdet"):
        config, data = toy(tmp_path, "mmdet")
        with annotations(data, "train2017") as content:
            content["annotations"] = []
        cfg = Config.fromfile(config).train_dataloader | dict(persistent_workers=False)
        assert "no images with labels" in error_of(TwinsRunner.build_dataloader, cfg, 0)


@pytest.mark.slow
def test_images_without_boxes(tmp_path, capsys):
    """Where the config keeps them, each head learns that there is nothing."""
    with within("mmdet"):
        config, data = toy(tmp_path, "mmdet")
        with annotations(data, "train2017") as content:
            content["annotations"] = []
        dataset = dataset_of(config, "train")
        samples = [dataset[0], dataset[1]]
        assert not len(samples[0]["data_samples"].gt_instances)
        model = build(parsed(config.name)).train()
        batch = model.data_preprocessor({key: [sample[key] for sample in samples] for key in samples[0]}, training=True)
        losses = {
            key: sum(value) if isinstance(value, list) else value for key, value in model(**batch, mode="loss").items()
        }
        assert (
            all(value.isfinite() for value in losses.values())
            and losses["loss_bbox"] == losses["loss_rpn_bbox"] == 0 < losses["loss_rpn_cls"]
        )
        sum(value for key, value in losses.items() if "loss" in key).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def runners(library, tmp_path_factory):
    """A training run and a test of the toy, built and not begun, and a state dict of its model."""
    folder = tmp_path_factory.mktemp("runners")
    config, _ = toy(folder, library, setting="retinanet_1x_pvt")
    built = []
    for parser, parts in ((cli.train_parser(), ("val", "test")), (cli.test_parser(library), ("train", "val"))):
        words = [
            config,
            *(["x.pth"] if built else []),
            "--work-dir",
            folder / "run",
            "--cfg-options",
            f"experiment_name={library}_{len(built)}",
        ]
        args = parser.parse_args([str(word) for word in words])
        cfg = cli.configure(args, library)
        cfg.update(
            {
                f"{part}_{what}": None
                for part in parts
                for what in ("dataloader", "cfg", "evaluator")
                if f"{part}_{what}" in cfg
            }
        )
        if built:
            cfg.update(optim_wrapper=None, param_scheduler=None)
        built.append(cli.build_runner(args, cfg, {}))
    return (*built, {name: torch.full_like(value, 0.25) for name, value in built[0].model.state_dict().items()})


def official(state, width):
    """A file as the official code wrote it: the classifier and the final norm of the backbone, and text about the
    run.
    """
    unused = {
        "backbone.norm.weight": (width,),
        "backbone.norm.bias": (width,),
        "backbone.head.weight": (1000, width),
        "backbone.head.bias": (1000,),
    }
    meta = dict(
        env_info="sys.platform: linux\nPython: 3.7",
        mmseg_version="0.12.0",
        config="model = dict(\n)",
        CLASSES=("wall",),
        iter=160000,
        epoch=127,
    )
    optimizer = dict(state={0: dict(step=3, exp_avg=torch.zeros(2))}, param_groups=[dict(lr=6e-5, params=[0])])
    whole = {name: torch.ones(shape) for name, shape in unused.items()} | state
    return dict(meta=meta | dict(PALETTE=[[120, 120, 120]], hook_msgs={}), state_dict=whole, optimizer=optimizer)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("which", [0, 1], ids=["--load-from", "test"])
def test_official_checkpoints(runners, which, prefix, tmp_path, monkeypatch):
    """All weights of the model are loaded; head and norm are logged as not used."""
    runner, state = runners[which], runners[2]
    payload = official(state, 256)
    payload["state_dict"] = {prefix + name: value for name, value in payload["state_dict"].items()}
    checkpoint.save(tmp_path / "official.pth", payload)
    lines = []
    monkeypatch.setattr(runner.logger, "info", lines.append)
    for value in runner.model.state_dict().values():
        value.zero_()
    runner.load_checkpoint(str(tmp_path / "official.pth"))
    assert all(torch.equal(value, state[name]) for name, value in runner.model.state_dict().items())
    assert lines == [
        f"loaded {len(state)} of {len(state)} tensors from {tmp_path / 'official.pth'}",
        "in the file, not used: backbone.head.bias, backbone.head.weight, backbone.norm.bias, backbone.norm.weight",
    ]


# The tensors that have a row for each class
CLASSIFIER = {
    "mmseg": ["decode_head.conv_seg.weight", "decode_head.conv_seg.bias"],
    "mmdet": ["bbox_head.retina_cls.weight", "bbox_head.retina_cls.bias"],
}


@pytest.mark.parametrize("which", [0, 1], ids=["--load-from", "test"])
def test_a_checkpoint_of_other_classes(runners, library, which, tmp_path, monkeypatch):
    """As many, with other names or in another order: no score, and no classifier to start from. Case does not count."""
    runner, state = runners[which], runners[2]
    dataset = (runner.test_dataloader if which else runner.train_dataloader).dataset
    classes = list(dataset.metainfo["classes"])
    lines, path = [], str(tmp_path / "other.pth")
    monkeypatch.setattr(runner.logger, "info", lines.append)

    def load(names, official=False):
        """Return the tensors that hold the file's weights."""
        meta = dict(CLASSES=names) if official else dict(dataset_meta=dict(classes=names))
        checkpoint.save(path, dict(state_dict=state, meta=meta))
        lines.clear()
        for value in runner.model.state_dict().values():
            value.zero_()
        runner.load_checkpoint(path)
        return {name for name, value in runner.model.state_dict().items() if torch.equal(value, state[name])}

    other = ["dog", *classes[1:]]
    swapped = [classes[1], classes[0], *classes[2:]]
    reasons = {
        True: (other, f"class 0 is 'dog' there and {classes[0]!r} here, 1 of {len(classes)} differ"),
        False: (swapped, f"class 0 is {classes[1]!r} there and {classes[0]!r} here, the same names in another order"),
    }
    for official_file, (names, reason) in reasons.items():
        what = f"other classes than the checkpoint's ({path}): {reason}; "
        if which:
            assert error_of(load, names, official_file).startswith(f"{what}set metainfo.classes of the data set")
            runner.cfg.compare_classes = False
            assert load(names) == set(state)
            runner.cfg.compare_classes = True
        else:
            assert load(names, official_file) == set(state) - set(CLASSIFIER[library])
            assert lines[0] == f"{what}randomly initialized: {', '.join(CLASSIFIER[library])}"
    for names in (classes, [f" {name.upper()}" for name in classes], other[:-1], None):
        assert load(names) == set(state)


NO_BACKBONE = "not a segmentor or detector .* for classification weights, set model.backbone.pretrained"
OTHER_MODEL = "the weights do not fit the model .*TWINS_DEBUG=1 lists all"


def other_checkpoints(library, state):
    """Files of other things than the model, and the errors."""
    classifier = timm.create_model("alt_gvt_demo").state_dict()
    other = "mmdet" if library == "mmseg" else "mmseg"
    heads = {"mmseg": "decode_head.", "mmdet": "bbox_head."}
    wider = {
        name: value.repeat(2, *[1] * (value.dim() - 1)) if name.startswith("backbone.") and value.dim() else value
        for name, value in state.items()
    }
    foreign = {
        (name.replace(heads[library], heads[other]) if name.startswith(heads[library]) else name): value
        for name, value in state.items()
    }
    return {
        "classification weights": (dict(model=classifier), NO_BACKBONE),
        "classification weights in state_dict": (dict(state_dict=classifier), NO_BACKBONE),
        "optimizer only": (dict(optimizer=dict(state={}, param_groups=[])), NO_BACKBONE),
        "nothing": ({}, NO_BACKBONE),
        "state_dict is no dictionary": (dict(state_dict=[torch.zeros(1)]), NO_BACKBONE),
        "another variant": (dict(state_dict=wider), OTHER_MODEL),
        "a layer more": (
            dict(state_dict=state | {"backbone.blocks.9.0.norm1.weight": torch.zeros(8)}),
            "1 unknown .backbone.blocks.9.0.norm1.weight",
        ),
        "another part of a backbone": (
            dict(state_dict=state | {"backbone.heads.weight": torch.zeros(8)}),
            "1 unknown .backbone.heads.weight",
        ),
        "a layer less": (
            dict(state_dict={k: v for k, v in state.items() if k != "backbone.blocks.0.0.norm1.weight"}),
            "1 missing",
        ),
        "the other library's": (dict(state_dict=foreign), OTHER_MODEL),
        "not finite": (
            dict(state_dict=state | {"backbone.blocks.0.0.norm1.weight": torch.full((32,), float("nan"))}),
            "1 not finite",
        ),
    }


@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["--load-from", "test"])
def test_checkpoints_of_something_else(runners, library, which, tmp_path):
    """None is loaded in part: the model stays as it was."""
    runner, state = runners[which], runners[2]
    for name, (payload, says) in other_checkpoints(library, state).items():
        for value in runner.model.state_dict().values():
            value.zero_()
        checkpoint.save(tmp_path / "other.pth", payload)
        assert re.search(says, error_of(runner.load_checkpoint, str(tmp_path / "other.pth"))), name
        assert not any(value.any() for value in runner.model.state_dict().values())


def test_a_checkpoint_that_is_not_there(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _ = toy(tmp_path, library)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "epoch_12.pth").touch()
    for option in ("--resume-from", "--load-from", None):
        parser, start = (cli.train_parser(), cli.run_training) if option else (cli.test_parser(library), cli.run_test)
        words = [str(config), *([option] if option else []), "run/epoch_13.pth"]
        assert (
            error_of(start, parser.parse_args(words), library)
            == "no such file (run/epoch_13.pth): did you mean epoch_12.pth?"
        )
    assert not (tmp_path / "work_dirs").exists()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("val", ["val_evaluator.ann_file=none.json"]),
        ("val", ["val_dataloader.dataset.data_prefix.img=none"]),
        ("train", ["train_dataloader.dataset.data_root=none"]),
    ],
)
def test_missing_data_of_a_detector(part, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _ = toy(tmp_path, "mmdet")
    line = error_of(cli.run_training, cli.train_parser().parse_args([str(config), "--cfg-options", *words]), "mmdet")
    assert "none" in line and f"set {part}_" in line
    assert not (tmp_path / "work_dirs").exists()


# ---------------------------------------------------------------- through the commands


def contents(folder):
    """Every file with what it holds, but for what each start writes into a folder of its own."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not re.match(r"\d{8}_\d{6}", path.relative_to(folder).parts[0])
    ]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def command_error(library, program, *words):
    """The one line of a command that ends with 2."""
    result = command(library, program, *words)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-2000:]
    *_, line = result.stderr.splitlines()
    assert line.startswith(f"{program}.py: error: ")
    return line


@pytest.mark.slow
def test_an_error_leaves_everything(library, tmp_path):
    """An earlier run's folder and an earlier test's labels or results stay, whatever goes wrong and whenever:
    before a run, or in it.
    """
    config, data = toy(tmp_path, library)
    train, score = (
        ["--work-dir", "run"],
        [
            "--work-dir",
            "run",
            *(["--eval", "mIoU", "--out", "run/labels"] if library == "mmseg" else ["--out", "run/x.pkl"]),
        ],
    )
    length = ["train_cfg.max_iters=2"] if library == "mmseg" else ["train_cfg.max_epochs=1"]
    good = command(library, "train", config, *train, "--no-validate", "--cfg-options", *length)
    assert good.returncode == 0, good.stderr[-2000:]
    file = tmp_path / "run" / ("iter_2.pth" if library == "mmseg" else "epoch_1.pth")
    assert command(library, "test", config, file, *score).returncode == 0
    before = contents(tmp_path / "run")
    assert {"segmentor.py", "detector.py"} & set(before) and file.name in before and len(before) > 3
    head = "decode_head" if library == "mmseg" else "roi_head.bbox_head"
    assert "the folder holds a run" in command_error(library, "train", config, *train)
    train += ["--overwrite"]
    assert "another number of classes" in command_error(
        library, "train", config, *train, "--cfg-options", f"model.{head}.num_classes=7"
    )
    assert "do not fit" in command_error(
        library, "test", config, file, *score, "--cfg-options", f"model.{head}.num_classes=7"
    )
    last = sorted((data / "images" / "validation" if library == "mmseg" else data / "val2017").iterdir())[-1]
    last.write_bytes(jpeg()[:500])
    for workers in (0, 1):
        words = [*score, "--cfg-options", f"test_dataloader.num_workers={workers}"]
        assert f"cannot read an image ({last})" in command_error(library, "test", config, file, *words)
    shutil.rmtree(last.parent)
    assert "no image folder" in command_error(library, "test", config, file, *score)
    assert "no image folder" in command_error(library, "train", config, *train)
    assert contents(tmp_path / "run") == before
    assert not [path for path in (tmp_path / "run").iterdir() if "unfinished" in path.name]


@pytest.mark.slow
def test_training_and_scoring_on_images_of_every_kind(library, tmp_path):
    """With 4000 x 3000 pixels among them, and at the toy's sizes without distortion of any."""
    config, data = toy(tmp_path, library)
    kinds = [*(make() for make in STRANGE.values()), Image.fromarray(noise(3000, 4000))]
    for number, image in enumerate(kinds):
        give_image(data, number, image)
    options = (
        ["train_cfg.max_iters=10"]
        if library == "mmseg"
        else ["train_cfg.max_epochs=1", "train_dataloader.dataset.filter_cfg.min_size=0"]
    )
    trained = command(library, "train", config, "--work-dir", "run", "--no-validate", "--cfg-options", *options)
    assert trained.returncode == 0, trained.stderr[-2000:]
    file = tmp_path / "run" / ("iter_10.pth" if library == "mmseg" else "epoch_1.pth")
    words = (
        ["--out", "labels"]
        if library == "mmseg"
        else ["--cfg-options", "model.test_cfg.rcnn.score_thr=0.0", "model.test_cfg.rcnn.max_per_img=3"]
    )
    scored = command(library, "test", config, file, *words)
    assert scored.returncode == 0, scored.stderr[-2000:]
    if library == "mmdet":
        assert re.search(r"coco/segm_mAP: \d", scored.stdout + scored.stderr)
        return
    assert re.search(r"mIoU: \d", scored.stdout + scored.stderr)
    for number, image in enumerate(kinds):
        with Image.open(tmp_path / "labels" / f"validation_{number}.png") as found:
            assert found.size == image.size and 1 <= np.array(found).min() <= np.array(found).max() <= 3
    again = command(library, "test", config, file, "--aug-test")
    assert again.returncode == 0 and re.search(r"mIoU: \d", again.stdout + again.stderr), again.stderr[-2000:]


# Each damages a checkpoint in one place.
STATES = {
    "no text about it": lambda payload: payload.update(meta="x"),
    "no count": lambda payload: payload["meta"].update(iter="a"),
    "a count below 0": lambda payload: payload["meta"].update(iter=-1),
    "no history": lambda payload: payload.pop("message_hub"),
    "a wrong history": lambda payload: payload["message_hub"].update(log_scalars={"loss": 3}),
    "a wrong seed": lambda payload: payload["meta"].update(seed="x"),
    "wrong schedules": lambda payload: payload.update(param_schedulers=[1]),
    "no optimizer": lambda payload: payload.pop("optimizer"),
    "another optimizer": lambda payload: payload["optimizer"].update(
        param_groups=payload["optimizer"]["param_groups"][:1] * 3
    ),
}


@pytest.mark.slow
def test_states_that_cannot_be_resumed(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _ = toy(tmp_path, library)
    length = ["train_cfg.max_iters=2"] if library == "mmseg" else ["train_cfg.max_epochs=1"]
    good = command(library, "train", config, "--work-dir", "run", "--no-validate", "--cfg-options", *length)
    assert good.returncode == 0, good.stderr[-2000:]
    file = tmp_path / "run" / ("iter_2.pth" if library == "mmseg" else "epoch_1.pth")
    for name, damage in STATES.items():
        payload = checkpoint.load(file)
        damage(payload)
        checkpoint.save(tmp_path / "state.pth", payload)
        words = [
            str(config),
            "--work-dir",
            "again",
            "--no-validate",
            "--resume-from",
            "state.pth",
            "--cfg-options",
            *length,
        ]
        line = error_of(cli.run_training, cli.train_parser().parse_args(words), library)
        assert line.startswith("cannot resume (state.pth): ") and line.endswith(
            "; --load-from starts a new training run from its weights"
        ), name
        assert not [path for path in (tmp_path / "again").glob("*") if path.is_file()], name


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", "--shm-size"),
        ("DataLoader worker (pid 7) exited unexpectedly", "data loading failed"),
    ],
)
def test_what_ends_loading_is_one_line(reason, says, capsys):
    def fail(argv):
        raise RuntimeError(reason)

    assert cli.run(fail, []) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "--num_workers" not in error
    with pytest.raises(RuntimeError, match="of ours"):
        cli.run(lambda argv: (_ for _ in ()).throw(RuntimeError("of ours")), [])
