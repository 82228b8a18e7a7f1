"""What people's label images and annotations are: the right score, or a line that names what is wrong before the
run.
"""

import copy
import json
import pickle
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import numpy as np
import torch
import toys
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image
from toys import ade_toy

from dense import checks, data_checks, libraries
from training.errors import UserError

libraries.load("mmseg")
libraries.load("mmdet")

from dense import coco, coco_files, label_files
from dense.data_checks import Meaning, label_findings, report
from dense.transforms import classes_of_values

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def lines(monkeypatch):
    """What is logged."""
    logged = []
    for module in (data_checks, label_files):
        monkeypatch.setattr(module, "print_log", lambda line, **_: logged.append(line))
    return logged


def error_of(start, *args, **options):
    with pytest.raises(UserError) as caught:
        start(*args, **options)
    line = str(caught.value)
    assert "\n" not in line and 20 < len(line) < 500 and "Error" not in line
    return line


# ---------------------------------------------------------------- label images


def meaning(number, *, reduced=False, ignored=255):
    names = ("ant", "bee", "cat", "dog")[:number]
    return Meaning(names, classes_of_values(None, reduce_zero_label=reduced), ignored, reduced)


def noticed(values, about, *, total=None, **options):
    """The findings of label files, each given by its values, ten pixels of each."""
    pixels = np.array([10 * np.bincount(each, minlength=256) for each in values])
    return list(label_findings(pixels, about, "data/labels", total or len(values), **options))


def test_a_line_counts_values_and_pixels():
    (note,) = noticed([[0, 0, 1, 255], [2, 2, 2, 1]], meaning(3), total=40)
    assert note.kind == "note"
    assert note.line == (
        "labels (data/labels): 2 of 40 files, values 0 to 2, 255; "
        "pixels: ant 25.0%, bee 25.0%, cat 37.5%, no class 12.5%"
    )


@pytest.mark.parametrize(
    ("values", "about", "says"),
    [
        ([[0, 255], [0], [255]], meaning(2), "masks of 0 and 255 (data/labels): 255 means no class, 2 classes have values 0 to 1; " "write class indices in place of 255"),
        ([[0, 255]], meaning(2, reduced=True), "masks of 0 and 255 (data/labels): 255 means no class, 2 classes have values 1 to 2;"),
        ([[0, 1], [1, 0]], meaning(2, reduced=True), "reduce_zero_label=True removes a class (data/labels): values 0 to 1 are as many as the " "classes, value 2 of 'bee' is missing; set reduce_zero_label=False"),
        ([[0], [0]], meaning(2, reduced=True), "no pixel of any class (data/labels): values 0 mean none"),
        ([[255]], meaning(3), "no pixel of any class (data/labels): values 255 mean none, 3 classes have values 0 to 2"),
        ([[0, 1], [0, 7, 128], [9]], meaning(3), "labels of no class (data/labels): values 7, 9, 128 in 2 of 3 files, but 3 classes have " "values 0 to 2"),
        ([[0, 1], [2, 3]], meaning(3), "labels of no class (data/labels): values 3 in 1 of 2 files, but 3 classes have values 0 " "to 2; set reduce_zero_label=True if"),
        ([[0, 1], [4]], meaning(3, reduced=True), "labels of no class (data/labels): values 4 in 1 of 2 files, but 3 classes have values 1 " "to 3"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_what_the_config_says(values, about, says, lines):
    assert error_of(report, noticed(values, about)).startswith(says)
    assert lines[0].startswith("labels (data/labels): ")


def test_labels_that_are_right():
    for values, about in (
        ([[0, 1]], meaning(2)),
        ([[0, 1, 255]], meaning(2)),
        ([[0, 1, 2]], meaning(2, reduced=True)),
        ([[1, 2]], meaning(2, reduced=True)),
        ([[0, 9]], meaning(1, ignored=9)),
    ):
        assert [each.kind for each in noticed(values, about)] == ["note"]


def test_a_class_that_is_merely_absent_is_a_warning():
    _, warning = noticed([[0, 2]], meaning(4), total=300)
    assert warning.kind == "warning"
    assert warning.line.startswith("classes without a pixel (data/labels, 1 of 300 files): 2 of 4, bee, dog; ")
    # The training labels have shown that reduce_zero_label is right: the last class is absent in validation.
    found = noticed([[0, 1]], meaning(2, reduced=True), known_good=True)
    assert [each.kind for each in found] == ["note", "warning", "warning"]


def test_which_files_are_looked_at():
    looked = data_checks.spread(range(2001))
    assert len(looked) == len(set(looked)) == 200 and (looked[0], looked[-1]) == (0, 2000)
    assert set(np.diff(looked)) == {10, 11} and data_checks.spread(range(7)) == [*range(7)]


def ade(folder, *, part="training", scope="mmseg", **options):
    """The toy's data set, as a command builds it."""
    from dense.runner import TwinsRunner

    facts = dict(
        type="BaseSegDataset",
        data_root=str(folder),
        metainfo=dict(classes=("ant", "bee", "cat"), palette=[[1, 2, 3]] * 3),
        reduce_zero_label=True,
        serialize_data=False,
        data_prefix=dict(img_path=f"images/{part}", seg_map_path=f"annotations/{part}"),
        pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
    )
    loader = dict(
        batch_size=1,
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=False),
        dataset=facts | options,
    )
    with DefaultScope.overwrite_default_scope(scope):
        return TwinsRunner.build_dataloader(loader, seed=0).dataset


def label_of(dataset, index):
    return dataset[index]["data_samples"].gt_sem_seg.data.numpy()


def test_the_labels_of_a_data_set_are_looked_at(tmp_path, lines):
    dataset = ade(ade_toy(tmp_path / "data"))
    data_checks.check_labels(dataset)
    (line,) = lines
    counts = [np.bincount(label_of(dataset, index).reshape(-1), minlength=256) for index in range(9)]
    shares = np.sum(counts, 0) / np.sum(counts)
    assert f"9 of 9 files, values 0 to 3; pixels: ant {shares[0]:.1%}, bee {shares[1]:.1%}, cat {shares[2]:.1%}" in line


def test_masks_of_0_and_255_end_the_run_before_it_starts(tmp_path, lines):
    """Today it ends with mIoU: 100.0. In training and in a test."""
    data = ade_toy(tmp_path / "data")
    for path in (data / "annotations").glob("*/*.png"):
        with Image.open(path) as file:
            labels = np.array(file)
        Image.fromarray(np.where(labels > 0, 255, 0).astype(np.uint8)).save(path)
    dataset = ade(data, reduce_zero_label=False, metainfo=dict(classes=("rest", "thing"), palette=[[1, 2, 3]] * 2))
    runner = SimpleNamespace(
        max_iters=0,
        param_schedulers=[],
        model=torch.nn.Identity(),
        train_dataloader=SimpleNamespace(dataset=dataset),
        test_dataloader=SimpleNamespace(dataset=dataset),
        test_evaluator=SimpleNamespace(metrics=[]),
        val_loop=None,
    )
    for start in (checks.StartChecks().before_train, checks.StartChecks().before_test):
        assert error_of(start, runner).startswith(f"masks of 0 and 255 ({data}/annotations/training): ")


def test_images_without_labels_and_labels_without_images(tmp_path, lines):
    data = ade_toy(tmp_path / "data")
    alone = data / "annotations" / "training"
    (data / "images" / "training" / "training_3.jpg").unlink()
    data_checks.check_labels(ade(data))
    assert f"label files without images ({alone}): 1 of 9, as {alone}/training_3.png; they are not used" in lines
    for number in (0, 5):
        (alone / f"training_{number}.png").unlink()
    says = f"images without label files ({alone}): 2 of 8, as {alone}/training_0.png, {alone}/training_5.png; add"
    assert error_of(data_checks.check_labels, ade(data)).startswith(says)


def test_suffixes_in_any_case_and_names_in_any_normalization(tmp_path, lines):
    """Each image has its own labels; none is left out."""
    data = ade_toy(tmp_path / "data")
    before = [label_of(ade(data), index) for index in range(9)]
    images, labels = data / "images" / "training", data / "annotations" / "training"
    for number in (0, 2, 4):
        (images / f"training_{number}.jpg").rename(images / f"training_{number}.{('JPG', 'Jpg')[number == 2]}")
    for number in (1, 2, 3):
        (labels / f"training_{number}.png").rename(labels / f"training_{number}.PNG")
    (images / "training_8.jpg").rename(images / unicodedata.normalize("NFD", "training_8\u00e4.jpg"))
    (labels / "training_8.png").rename(labels / unicodedata.normalize("NFC", "training_8\u00e4.png"))
    dataset = ade(data)
    assert [Path(dataset.get_data_info(index)["img_path"]).name[9] for index in range(9)] == [*"012345678"]
    assert all(np.array_equal(label_of(dataset, index), before[index]) for index in range(9))
    assert any(
        ": 4 files are used, as training_1.PNG, training_2.PNG, training_3.PNG and 1 more" in each for each in lines
    )
    lines.clear()
    data_checks.check_labels(pickle.loads(pickle.dumps(dataset)))  # as a process that loads data gets it
    assert len(lines) == 1


def test_files_that_are_not_read_are_counted_by_suffix(tmp_path, lines):
    data = ade_toy(tmp_path / "data")
    folder = data / "images" / "training"
    for number, suffix in ((1, "gif"), (2, "gif"), (3, "txt")):
        (folder / f"training_{number}.jpg").rename(folder / f"training_{number}.{suffix}")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "training_0-checkpoint.jpg").write_bytes(b"")
    (folder / "._training_0.jpg").write_bytes(b"")
    assert len(ade(data)) == 6
    (line,) = lines
    assert line == f"files that are not read ({folder}): 2 .gif, 1 .txt"


@pytest.mark.parametrize("suffix", ["", ".jpg"])
def test_a_list_of_names(suffix, tmp_path, lines):
    data = ade_toy(tmp_path / "data")
    (data / "images" / "training" / "training_4.jpg").rename(data / "images" / "training" / "training_4.JPG")
    (data / "list.txt").write_text("training_4\ntraining_1\n")
    dataset = ade(data, ann_file="list.txt")
    names = [Path(dataset.get_data_info(index)["img_path"]).name for index in range(2)]
    assert names == ["training_4.JPG", "training_1.jpg"]
    data_checks.check_labels(dataset)
    assert not any("without images" in each for each in lines)


# ---------------------------------------------------------------- the commands


@pytest.mark.slow
def test_a_training_run_ends_with_2_before_it_starts(tmp_path):
    data = ade_toy(tmp_path / "ade")
    for path in (data / "annotations").glob("*/*.png"):
        Image.fromarray(np.full((8, 8), 255, np.uint8)).save(path)
    segmentor = toys.write(tmp_path / "segmentor.py", toys.SEGMENTOR, data=data)
    data = toys.coco_toy(tmp_path / "coco")
    for part in ("train2017", "val2017"):
        with toys.annotations(data, part) as content:
            for each in content["annotations"]:
                each["bbox"] = as_corners(*each["bbox"])
    detector = toys.write(tmp_path / "detector.py", toys.DETECTOR, data=data, setting="retinanet_1x_pvt", masks=False)
    for task, config, says in (
        ("segmentation", segmentor, "no pixel of any class ("),
        ("detection", detector, "corners x1, y1, x2, y2 in place of x, y, width, height in pixels?"),
    ):
        result = toys.run([sys.executable, toys.ROOT / task / "train.py", config, "--work-dir", "run"], tmp_path)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-2000:]
        assert says in result.stderr.splitlines()[-1]


# ---------------------------------------------------------------- one class


def test_classes_as_text(tmp_path):
    cfg = Config(dict(train_dataloader=dict(dataset=dict(metainfo=dict(classes=("water"))))))
    line = error_of(checks.check_data, cfg, "train")
    key = "train_dataloader.dataset.metainfo.classes"
    assert line == f'classes is text, not a tuple of names ({key}="water"): write ("water",)'


@pytest.mark.parametrize("sigmoid", [False, True])
def test_one_class_of_a_softmax(sigmoid):
    """Its loss is 0 forever."""
    from mmseg.models import FCNHead

    loss = dict(type="CrossEntropyLoss", use_sigmoid=sigmoid)
    with DefaultScope.overwrite_default_scope("mmseg"), libraries.quiet():
        head = FCNHead(in_channels=4, channels=4, num_convs=1, num_classes=1, threshold=0.3, loss_decode=loss)
    model = torch.nn.ModuleDict(dict(decode_head=head))
    dataset = SimpleNamespace(metainfo=dict(classes=("water",)))
    if sigmoid:
        checks.check_classes(model, dataset)
        return
    line = error_of(checks.check_classes, model, dataset)
    assert line.startswith("one class with softmax, which has nothing to tell it from (decode_head.num_classes=1): ")
    assert 'classes=("background", "NAME") with num_classes=2' in line and "use_sigmoid=True" in line


# ---------------------------------------------------------------- annotations

NAMES = ("ant", "bee", "cat")


def entry(number, image, category, bbox, **options):
    x, y, width, height = bbox
    outline = [x, y, x + width, y, x + width, y + height, x, y + height]
    about = dict(bbox=bbox, area=width * height, iscrowd=0, segmentation=[outline])
    return dict(id=number, image_id=image, category_id=category) | about | options


def toy_content():
    """Six images of 200 x 100, three objects each."""
    images = [dict(id=key, file_name=f"{key}.jpg", width=200, height=100) for key in range(1, 7)]
    annotations = []
    for image in range(1, 7):
        for category, x in ((1, 10), (2, 80), (3, 150)):
            bbox = [x + image, 40 + 5 * image, 30, 20]
            annotations.append(entry(len(annotations) + 1, image, category, bbox))
    return dict(images=images, annotations=annotations, categories=[dict(id=k, name=n) for k, n in enumerate(NAMES, 1)])


def found_in(content, classes=NAMES, **options):
    return list(coco.findings(content, "a.json", classes, **dict(masks=True) | options))


def only(content, **options):
    """The one finding."""
    (finding,) = found_in(content, **options)
    return finding


def test_right_annotations_have_no_findings():
    assert found_in(toy_content()) == [] == found_in(toy_content(), None, scored=True)


def write(folder, content, *, mark=False):
    path = folder / "a.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig" if mark else "utf-8")
    return str(path)


def dataset_of(path, classes=NAMES, *, masks=True, **options):
    steps = [dict(type="LoadImageFromFile"), dict(type="TwinsLoadAnnotations", with_bbox=True, with_mask=masks)]
    metainfo = dict(classes=classes, palette=[(1, 2, 3)] * len(classes))
    with DefaultScope.overwrite_default_scope("mmdet"):
        return coco_files.TwinsCocoDataset(
            ann_file=path,
            metainfo=metainfo,
            data_prefix=dict(img="images"),
            pipeline=steps,
            serialize_data=False,
            **options,
        )


def scores(path, classes=NAMES, *, truth=None, names=("bbox", "segm")):
    """The metric of predictions: all ants as they are, bees beside their box, cats of even images only."""
    metric = coco_files.TwinsCocoMetric(path, metric=list(names), classwise=True)
    metric.dataset_meta = dict(classes=classes)
    content = truth or toy_content()
    for image in content["images"]:
        boxes, labels = [], []
        for each in content["annotations"]:
            name = NAMES[each["category_id"] - 1]
            if each["image_id"] != image["id"] or (name == "cat" and image["id"] % 2):
                continue
            x, y, width, height = each["bbox"]
            x += 60 * (name == "bee")
            boxes.append([x, y, x + width, y + height])
            labels.append(classes.index(name))
        masks = np.zeros((len(boxes), 100, 200), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes):
            mask[y1:y2, x1:x2] = True
        found = dict(bboxes=torch.tensor(boxes).float(), scores=torch.linspace(0.9, 0.8, len(boxes)))
        found |= dict(labels=torch.tensor(labels), masks=torch.from_numpy(masks))
        metric.process({}, [dict(img_id=image["id"], ori_shape=(100, 200), pred_instances=found)])
    return dict(metric.compute_metrics(metric.results))


def test_the_order_of_categories_does_not_matter(tmp_path):
    """Neither in the file nor in the config, nor that of the ids: labels, totals and the scores of each name."""
    right = scores(write(tmp_path, toy_content()))
    per_name = {name: right[f"{name}_precision"] for name in NAMES}
    assert per_name["ant"] == 1 and per_name["bee"] == 0 and 0.4 < per_name["cat"] < 0.6
    assert right["bbox_mAP"] == pytest.approx(sum(per_name.values()) / 3, abs=1e-3) == right["segm_mAP"]
    shuffled = toy_content()
    shuffled["categories"] = [shuffled["categories"][index] for index in (2, 0, 1)]
    renamed = toy_content()
    for each in (*renamed["categories"], *renamed["annotations"]):
        key = "category_id" if "category_id" in each else "id"
        each[key] = {1: 30, 2: 7, 3: 12}[each[key]]
    for content in (toy_content(), shuffled, renamed):
        path = write(tmp_path, content)
        for classes in (NAMES, ("cat", "ant", "bee"), ("bee", "cat", "ant")):
            assert scores(path, classes, truth=toy_content()) == right
            instances = dataset_of(path, classes).get_data_info(0)["instances"]
            assert [classes[each["bbox_label"]] for each in instances] == [*NAMES]


def test_result_files_have_the_ids_of_the_annotations(tmp_path):
    metric = coco_files.TwinsCocoMetric(
        write(tmp_path, toy_content()), format_only=True, outfile_prefix=str(tmp_path / "out")
    )
    metric.dataset_meta = dict(classes=("cat", "ant", "bee"))
    found = dict(bboxes=torch.ones(3, 4), scores=torch.ones(3), labels=torch.tensor([0, 1, 2]))
    metric.process({}, [dict(img_id=1, ori_shape=(100, 200), pred_instances=found)])
    metric.compute_metrics(metric.results)
    written = json.loads((tmp_path / "out.bbox.json").read_text())
    assert [each["category_id"] for each in written] == [3, 1, 2]


def test_annotation_ids_from_0_are_renumbered(tmp_path):
    """pycocotools takes an object with id 0 for one that nothing has found."""
    right = scores(write(tmp_path, toy_content()))
    content = toy_content()
    for each in content["annotations"]:
        each["id"] -= 1
    assert scores(write(tmp_path, content)) == right
    note = only(content)
    assert note.kind == "note" and "all 18 are numbered from 1" in note.line
    for each in content["annotations"]:
        each["id"] = f"a{each['id']}"
    assert scores(write(tmp_path, content)) == right


def test_a_file_that_begins_with_a_mark(tmp_path):
    path = write(tmp_path, toy_content(), mark=True)
    assert Path(path).read_bytes().startswith(b"\xef\xbb\xbf")
    assert len(dataset_of(path)) == 6 and scores(path)["ant_precision"] == 1


def test_iscrowd_may_be_missing(tmp_path):
    right, content = scores(write(tmp_path, toy_content())), toy_content()
    for each in content["annotations"][:5]:
        del each["iscrowd"]
    assert only(content).line == "annotations without iscrowd (a.json): 5 of 18 count as 0"
    path = write(tmp_path, content)
    assert scores(path) == right
    assert [each["ignore_flag"] for each in dataset_of(path).get_data_info(0)["instances"]] == [0, 0, 0]


# What is done to the annotations, and the one finding.
def change(kind, key, value, *which):
    def apply(content):
        for index in which or range(len(content[kind])):
            old = content[kind][index].get(key)
            content[kind][index][key] = value(old) if callable(value) else value

    return apply


def remove(key, *which):
    def apply(content):
        for index in which:
            del content["annotations"][index][key]

    return apply


FINDINGS = {
    "image ids twice": (
        lambda content: [change(*each, lambda key: min(key, 5))(content) for each in (("images", "id"), ("annotations", "image_id"))],
        "error",
        "image ids are not unique (a.json): 1 are used more than once, as 5; give each image its own id",
    ),
    "image ids off by one": (
        change("annotations", "image_id", lambda key: key - 1),
        "error",
        "annotations of no image (a.json): 3 of 18, image_id 0; image_id is off by one: +1 makes " "each that of a listed image",
    ),
    "few of no image": (
        change("annotations", "image_id", 77, 0, 4),
        "warning",
        "annotations of no image (a.json): 2 of 18, image_id 77; they are not used",
    ),
    "most of no image": (
        change("annotations", "image_id", lambda key: key + 100, *range(10)),
        "error",
        "annotations of no image (a.json): 10 of 18, image_id 101, 102, 103 and 1 more; fix image_id",
    ),
    "a category that is not listed": (
        change("annotations", "category_id", 9, 3),
        "warning",
        "annotations of no category (a.json): 1 of 18, category_id 9; they are not used",
    ),
    "category ids from 0": (
        change("annotations", "category_id", lambda key: key - 1),
        "error",
        "annotations of no category (a.json): 6 of 18, category_id 0; category_id is off by one: +1",
    ),
    "capitals": (
        change("categories", "name", str.title),
        "error",
        "classes missing in the annotations (a.json): 3 of 3, 'ant' is 'Ant' there, 'bee' is " "'Bee' there, 'cat' is 'Cat' there; set",
    ),
    "spaces": (
        change("categories", "name", " bee ", 1),
        "error",
        "classes missing in the annotations (a.json): 1 of 3, 'bee' is ' bee ' there; set metainfo.classes",
    ),
    "another name": (
        change("categories", "name", "owl", 1),
        "error",
        "classes missing in the annotations (a.json): 1 of 3, 'bee'; the file has 'ant', 'owl', 'cat'; set",
    ),
    "a name twice": (
        lambda content: content["categories"].append(dict(id=4, name="bee")),
        "error",
        "categories of one name (a.json): 'bee'; give them one id",
    ),
    "not a number": (
        change("annotations", "bbox", [float("nan"), 1, 2, 3], 4),
        "error",
        "bbox is not four numbers (a.json): 1 of 18, ids 5: [nan, 1, 2, 3]; write x, y, width, height in pixels",
    ),
    "text": (
        change("annotations", "bbox", ["1", "2", "3", "4"], 4, 5),
        "error",
        "bbox is not four numbers (a.json): 2 of 18, ids 5, 6: ['1', '2', '3', '4']; write",
    ),
    "three numbers": (
        change("annotations", "bbox", [1, 2, 3], 17),
        "error",
        "bbox is not four numbers (a.json): 1 of 18, ids 18: [1, 2, 3]; write",
    ),
    "a negative width": (
        change("annotations", "bbox", [50, 20, -10, 5], 0),
        "error",
        "bbox with a negative width or height (a.json): 1 of 18, ids 1; write",
    ),
    "no outline": (
        change("annotations", "segmentation", [], 6, 7),
        "error",
        "masks that cannot be used (a.json): 2, id 7: 'segmentation' is empty; fix or remove the annotation",
    ),
    "outline missing": (
        remove("segmentation", 6),
        "error",
        "masks that cannot be used (a.json): 1, id 7: 'segmentation' is missing; fix",
    ),
    "two points": (
        change("annotations", "segmentation", [[1, 2, 3, 4]], 2),
        "warning",
        "masks that cannot be used (a.json): 1, id 3: a polygon in 'segmentation' is not x, y of three points or more",
    ),
    "another size": (
        change("annotations", "segmentation", dict(size=[50, 50], counts=[2500]), 2),
        "warning",
        "masks that cannot be used (a.json): 1, id 3: the size of its RLE is [50, 50], the image's is [100, 200]",
    ),
    "wrong counts": (
        change("annotations", "segmentation", dict(size=[100, 200], counts=[25]), 2),
        "warning",
        "masks that cannot be used (a.json): 1, id 3: the counts of its RLE cannot be decoded",
    ),
    "few masks elsewhere": (
        change("annotations", "segmentation", [[1, 1, 5, 1, 5, 9]], 2, 3),
        "warning",
        "masks that do not fit their boxes (a.json): 2 of 18, ids 3, 4; check which of them is on the object",
    ),
    "most masks elsewhere": (
        change("annotations", "segmentation", lambda old: [[value / 2 for value in old[0]]]),
        "error",
        "masks that do not fit their boxes (a.json): 18 of 18, ids 1, 2, 3 and 15 more",
    ),
    "crowds": (
        change("annotations", "iscrowd", 1),
        "warning",
        "images with crowds only, iscrowd=1 (a.json): 6 of 6 count as images without objects",
    ),
    "a few crowds": (
        change("annotations", "iscrowd", 1, 0, 1, 2, 3),
        "note",
        "images with crowds only, iscrowd=1 (a.json): 1 of 6 count as images without objects",
    ),
    "no area": (
        change("annotations", "area", 0, 4),
        "warning",
        "boxes (a.json): of 18, 0 leave their image by more than 1 pixel, 0 are smaller than a " "pixel, 1 have no area, ids 5;",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FINDINGS)
def test_annotations(name):
    apply, kind, says = FINDINGS[name]
    content = toy_content()
    apply(content)
    finding = only(content)
    assert (finding.kind, finding.where) == (kind, "a.json") and finding.line.startswith(says), finding.line


def test_classes_that_the_config_does_not_list(tmp_path):
    finding = only(toy_content(), classes=("cat",))
    assert finding.kind == "note"
    says = "annotations of classes that the data set does not list (a.json): 12 of 18, 'ant', 'bee'; they are not used"
    assert finding.line == says
    info = dataset_of(write(tmp_path, toy_content()), ("cat",)).get_data_info(0)
    assert [each["bbox"][0] for each in info["instances"]] == [151]


def test_masks_are_looked_at_where_they_are_needed(tmp_path, lines):
    content = toy_content()
    for each in content["annotations"]:
        each["segmentation"] = []
    path = write(tmp_path, content)
    dataset_of(path, masks=False)
    assert "'segmentation' is empty" in error_of(dataset_of, path)
    assert "'segmentation' is empty" in error_of(coco_files.TwinsCocoMetric, path, metric=["bbox", "segm"])
    coco_files.TwinsCocoMetric(path, metric=["bbox"])


# ---------------------------------------------------------------- boxes


def as_corners(x, y, width, height):
    return [x, y, x + width, y + height]


def as_center(x, y, width, height):
    return [x + width / 2, y + height / 2, width, height]


def normalized(x, y, width, height):
    return [x / 200, y / 100, width / 200, height / 100]


def turned(x, y, width, height):
    return [y, x, height, width]


def large_boxes():
    """Boxes at all places of their images, of all sizes."""
    random, content = np.random.default_rng(0), toy_content()
    for each in content["annotations"]:
        width, height = (int(value) for value in random.integers((20, 10), (120, 60)))
        x, y = int(random.integers(0, 200 - width)), int(random.integers(0, 100 - height))
        each.update(bbox=[x, y, width, height], area=width * height)
    return content


@pytest.mark.parametrize(
    ("convert", "says"),
    [
        (as_corners, "corners x1, y1, x2, y2 in place of x, y, width, height in pixels?"),
        (as_center, "center x, center y, width, height in place of x, y, width, height in pixels?"),
        (normalized, "values from 0 to 1 in place of x, y, width, height in pixels?"),
        (turned, "y, x, height, width in place of x, y, width, height in pixels?"),
    ],
)
def test_boxes_in_another_format(convert, says, tmp_path, lines):
    content = large_boxes()
    assert found_in(content, masks=False) == []
    for each in content["annotations"]:
        each["bbox"] = convert(*each["bbox"])
    finding = only(content, masks=False)
    assert finding.kind == "error" and says in finding.line and "boxes_outside=True" in finding.line
    path = write(tmp_path, content)
    assert says in error_of(dataset_of, path, masks=False)
    assert len(dataset_of(path, masks=False, boxes_outside=True)) == 6
    assert lines[0].startswith(f"boxes ({path}): of 18, ")


def test_few_boxes_outside_are_a_warning_with_counts_and_ids():
    content = toy_content()
    for number in range(3):  # 54 boxes, 4 of them wrong
        more = copy.deepcopy(toy_content()["annotations"])
        content["annotations"] += [dict(each, id=100 * (number + 1) + each["id"]) for each in more]
    for index, bbox in ((0, [190, 10, 30, 20]), (1, [10, 10, 0.5, 20]), (2, [10, 10, 0, 20]), (3, [-5, -5, 10, 10])):
        content["annotations"][index].update(bbox=bbox)
    content["annotations"][4]["bbox"] = [171, 0, 30, 101]  # by one pixel, as many programs write
    finding = only(content, masks=False)
    counts = (
        "2 leave their image by more than 1 pixel, 1 are smaller than a pixel, 1 have no area, ids 1, 2, 3 and 1 more"
    )
    assert finding.kind == "warning" and finding.line.startswith(f"boxes (a.json): of 72, {counts}")


# ---------------------------------------------------------------- images without objects


def test_images_without_objects_are_counted(tmp_path, lines):
    content = toy_content()
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] > 2]
    for each in content["annotations"][:3]:
        each["iscrowd"] = 1
    content["images"][5].update(height=20, width=20)
    content["annotations"] = content["annotations"][:9]
    path = write(tmp_path, content)
    assert len(dataset_of(path, filter_cfg=dict(filter_empty_gt=True, min_size=32))) == 2
    keep = "filter_cfg.filter_empty_gt=False and filter_cfg.min_size=0 keep them"
    assert f"images left out ({path}): 3 of 6 without objects, 1 smaller than 32 pixels; {keep}" in lines
    lines.clear()
    assert len(dataset_of(path, filter_cfg=dict(filter_empty_gt=False))) == 6
    assert len(dataset_of(path, test_mode=True)) == 6
    assert not any("left out" in each for each in lines)


@pytest.mark.parametrize("crowds", [False, True])
def test_validation_without_objects(crowds, tmp_path, lines):
    """mAP would be -1: a test ends before it starts, a training run logs it."""
    content = toy_content()
    for each in content["annotations"]:
        each["iscrowd"] = 1
    content["annotations"] = content["annotations"] if crowds else []
    path = write(tmp_path, content)
    dataset, metric = dataset_of(path, test_mode=True), coco_files.TwinsCocoMetric(path)
    evaluator = SimpleNamespace(metrics=[metric])
    checks.check_scores(evaluator, dataset, must_score=False)
    says = f"no objects to score against ({path}): mAP would be -1"
    assert lines[-1].startswith(says)
    assert error_of(checks.check_scores, evaluator, dataset, must_score=True).startswith(says)
    converted = coco_files.TwinsCocoMetric()  # scores against the data set's own annotations
    assert says in error_of(
        checks.check_scores,
        SimpleNamespace(metrics=[converted]),
        dataset,
        must_score=True,
    )
    writes = coco_files.TwinsCocoMetric(path, format_only=True, outfile_prefix="x")
    checks.check_scores(SimpleNamespace(metrics=[writes]), dataset, must_score=True)


def test_image_files_in_another_form_of_their_names(tmp_path, lines):
    content, names = toy_content(), ("a.jpg", "b\u00e4.JPG")
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "a.JPG", "b\u00e4.jpg"
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (names[0], unicodedata.normalize("NFD", names[1])):
        (folder / name).write_bytes(b"")
    dataset = dataset_of(write(tmp_path, content), data_root=str(tmp_path))
    paths = [Path(dataset.get_data_info(index)["img_path"]) for index in range(3)]
    assert [path.is_file() for path in paths] == [True, True, False]
    assert sum("2 files are used" in line for line in lines) == 1
