"""EXIF orientation in segmentation and detection: eight objects with all eight orientations lie on their objects under
every reading, results return to where the labels are, and what does not fit is one line.
"""

import json

import pytest

pytest.importorskip("mmcv", reason="segmentation and detection need their libraries: make dense")

import numpy as np
import torch
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.structures import PixelData
from PIL import Image

from dense import libraries
from dense.transforms import TwinsLoadImage, set_reading, turn_boxes, with_checks
from training.errors import UserError
from training.images import inverse, turn

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of mmdetection's masks
SHOWN, BOX = (48, 64), (10, 6, 30, 18)  # of the object, x1 y1 x2 y2, on the shown image
READINGS = [
    dict(exif="apply"),
    dict(exif="apply", labels="stored"),
    dict(exif="ignore"),
    dict(color_type="color_ignore_orientation"),
]


def mask():
    x1, y1, x2, y2 = BOX
    found = np.zeros(SHOWN, np.uint8)
    found[y1:y2, x1:x2] = 1
    return found


def photograph(folder, orientation):
    """Save an image with a white object, as a camera held this way stores it; return the mask of the stored pixels."""
    stored = np.ascontiguousarray(turn(mask(), inverse(orientation)))
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored * 255).convert("RGB").save(folder / "x.png", exif=exif)
    return stored


def labels_of(reading, stored):
    """Return the mask of the labels that go with a reading: the shown image's, or the stored pixels'."""
    return mask() if reading == dict(exif="apply") else stored


def load(library, folder, reading, **info):
    libraries.load(library)
    with DefaultScope.overwrite_default_scope(library):
        step = dict(type="LoadAnnotations", **(dict(with_bbox=True, with_mask=True) if library == "mmdet" else {}))
        steps = [dict(type="LoadImageFromFile", **reading), with_checks(step, library)]
        results = dict(img_path=str(folder / "x.png"), **info)
        for each in steps:
            results = TRANSFORMS.build(each).transform(results)
    return results


@pytest.mark.parametrize("reading", READINGS, ids=str)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_label_maps_lie_on_their_object(orientation, reading, tmp_path):
    labels = labels_of(reading, photograph(tmp_path, orientation))
    Image.fromarray(np.ascontiguousarray(labels)).save(tmp_path / "labels.png")
    info = dict(seg_map_path=str(tmp_path / "labels.png"), reduce_zero_label=False, seg_fields=[])
    results = load("mmseg", tmp_path, reading, **info)
    assert np.array_equal(results["img"][..., 0] == 255, results["gt_seg_map"] == 1)
    assert results["gt_seg_map"].sum() == mask().sum() and results["ori_shape"] == results["gt_seg_map"].shape


@pytest.mark.parametrize("polygons", [True, False], ids=["polygons", "bitmaps"])
@pytest.mark.parametrize("reading", READINGS, ids=str)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_and_masks_lie_on_their_object(orientation, reading, polygons, tmp_path):
    libraries.load("mmdet")
    labels = labels_of(reading, photograph(tmp_path, orientation))
    y, x = np.nonzero(labels)
    box = [float(value) for value in (x.min(), y.min(), x.max() + 1, y.max() + 1)]
    x1, y1, x2, y2 = box
    instance = dict(bbox=box, bbox_label=0, ignore_flag=0, mask=[[x1, y1, x2, y1, x2, y2, x1, y2]])
    if polygons:
        with DefaultScope.overwrite_default_scope("mmdet"):
            step = with_checks(dict(type="LoadAnnotations", with_mask=True, poly2mask=False), "mmdet")
            results = dict(img_path=str(tmp_path / "x.png"), instances=[instance])
            results = TRANSFORMS.build(dict(type="LoadImageFromFile", **reading)).transform(results)
            results = TRANSFORMS.build(step).transform(results)
    else:
        results = load("mmdet", tmp_path, reading, instances=[instance])
    y, x = np.nonzero(results["img"][..., 0])
    assert results["gt_bboxes"].tensor.tolist() == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]
    assert (results["gt_masks"].height, results["gt_masks"].width) == results["img"].shape[:2]
    found = results["gt_masks"].to_ndarray()[0]
    assert np.array_equal(found, results["img"][..., 0] // 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_return_to_the_stored_image(orientation):
    stored = turn(mask(), inverse(orientation))
    boxes = torch.tensor([BOX], dtype=torch.float32)
    back = turn_boxes(boxes, stored.shape, inverse(orientation))
    y, x = np.nonzero(stored)
    assert back.tolist() == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]
    assert torch.equal(turn_boxes(back, SHOWN, orientation), boxes)
    assert np.array_equal(turn_boxes(back.numpy(), SHOWN, orientation), boxes.numpy())


@pytest.mark.parametrize("orientation", [1, 6])
def test_written_labels_are_where_the_data_sets_are(orientation, tmp_path):
    libraries.load("mmseg")
    from dense.segmentor import TwinsIoUMetric

    metric = TwinsIoUMetric(output_dir=str(tmp_path), format_only=True)
    metric.dataset_meta = dict(classes=("a", "b"))
    predicted = dict(data=torch.from_numpy(mask().astype(np.int64))[None])
    metric.process({}, [dict(pred_sem_seg=predicted, img_path="x.jpg", label_orientation=orientation)])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), turn(mask(), inverse(orientation)))
    assert isinstance(PixelData(**predicted), PixelData)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_detections_are_scored_where_the_annotations_are(orientation, tmp_path):
    """A right detection on the shown image scores 1.0 against annotations of the stored pixels, boxes and masks."""
    libraries.load("mmdet")
    from dense.coco_files import TwinsCocoMetric

    stored = np.ascontiguousarray(turn(mask(), inverse(orientation)))
    y, x = np.nonzero(stored)
    x1, y1, x2, y2 = (int(value) for value in (x.min(), y.min(), x.max() + 1, y.max() + 1))
    bbox, outline = [x1, y1, x2 - x1, y2 - y1], [x1, y1, x2, y1, x2, y2, x1, y2]
    size = dict(height=stored.shape[0], width=stored.shape[1])
    about = dict(bbox=bbox, segmentation=[outline], area=int(stored.sum()), iscrowd=0)
    content = dict(
        images=[dict(id=1, file_name="x.png", **size)],
        annotations=[dict(id=1, image_id=1, category_id=1, **about)],
        categories=[dict(id=1, name="thing")],
    )
    (tmp_path / "x.json").write_text(json.dumps(content))
    metric = TwinsCocoMetric(str(tmp_path / "x.json"), metric=["bbox", "segm"])
    metric.dataset_meta = dict(classes=("thing",))
    found = dict(bboxes=torch.tensor([BOX]).float(), scores=torch.ones(1), labels=torch.zeros(1).long())
    found["masks"] = torch.from_numpy(mask().astype(bool))[None]
    sample = dict(img_id=1, ori_shape=SHOWN, pred_instances=found, label_orientation=orientation)
    metric.process({}, [sample])
    scores = metric.evaluate(1)
    assert scores["coco/bbox_mAP"] == scores["coco/segm_mAP"] == 1.0
    assert sample["pred_instances"]["bboxes"].tolist() == [list(map(float, BOX))]  # what is drawn stays


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("reading", "labels", "says"),
    [
        (
            {},
            (64, 48),
            "the EXIF orientation is 6, and the labels are those of the stored pixels: set reading.labels=stored",
        ),
        (dict(labels="stored"), (48, 64), "those of the shown image: set reading.labels=shown"),
        ({}, (20, 20), "crop or resize one of them"),
    ],
)
def test_a_size_that_contradicts_the_reading_names_exif(reading, labels, says, tmp_path):
    photograph(tmp_path, 6)
    Image.fromarray(np.zeros(labels, np.uint8)).save(tmp_path / "labels.png")
    info = dict(seg_map_path=str(tmp_path / "labels.png"), reduce_zero_label=False, seg_fields=[])
    with pytest.raises(UserError, match=says):
        load("mmseg", tmp_path, reading, **info)


@pytest.mark.parametrize(
    ("reading", "says"),
    [
        (dict(exif="ignore", labels="shown"), "set reading.exif=apply or reading.labels=stored"),
        (dict(exif="maybe"), r"no such setting \(reading.exif=maybe\): use apply or ignore"),
        (dict(labels="both"), "reading.labels=both"),
        (dict(alpha="red"), "reading.alpha=red"),
        (dict(max_pixels="many"), "reading.max_pixels=many"),
    ],
)
def test_wrong_settings_are_one_line(reading, says):
    with pytest.raises(UserError, match=says):
        TwinsLoadImage(**reading)


def test_settings_reach_all_pipelines():
    load = dict(type="LoadImageFromFile")
    cfg = dict(
        train=dict(pipeline=[dict(load)]),
        tta_pipeline=[dict(load), dict(type="TestTimeAug", transforms=[[dict(load)]])],
    )
    set_reading(cfg, dict(exif="ignore"))
    assert str(cfg).count("'exif': 'ignore'") == 3


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
@pytest.mark.parametrize("exif", ["apply", "ignore"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_shape_is_known_without_decoding(orientation, exif, name, tmp_path):
    tag = Image.Exif()
    tag[274] = orientation
    Image.fromarray(np.zeros(SHOWN, np.uint8)).save(tmp_path / name, exif=tag)
    load = TwinsLoadImage(exif=exif)
    image = load.transform(dict(img_path=str(tmp_path / name)))["img"]
    assert load.shape(str(tmp_path / name)) == image.shape[:2]


# ---------------------------------------------------------------- one reader


@pytest.mark.parametrize("library", libraries.TASKS)
def test_the_name_in_configs_is_our_reader(library):
    """The Inferencers look for this name."""
    libraries.load(library)
    with DefaultScope.overwrite_default_scope(library):
        assert type(TRANSFORMS.build(dict(type="LoadImageFromFile"))) is TwinsLoadImage


def test_values_are_classifications(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (9, 7)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    found = load("mmdet", tmp_path, {}, instances=[])["img"]
    assert np.array_equal(found, np.stack([values >> 8] * 3, -1))
    Image.new("RGBA", (9, 7), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert (load("mmdet", tmp_path, {}, instances=[])["img"] == 255).all()
    assert (load("mmdet", tmp_path, dict(alpha="drop"), instances=[])["img"] == 0).all()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)).save(tmp_path / "x.png")
    found = load("mmdet", tmp_path, dict(to_float32=True), instances=[])["img"]
    assert found.dtype == np.float32 and np.array_equal(found[..., ::-1], np.asarray(Image.open(tmp_path / "x.png")))
