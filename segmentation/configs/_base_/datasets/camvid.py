"""CamVid in ADE20K's layout: 367, 101 and 233 images of 480 x 360 from a car, 11 classes from 0, 255 is unlabeled."""

_base_ = []  # without it, mmengine takes a file with imports for a config of its other kind
from dense.models import crop_pipeline, eval_loader, eval_pipeline, train_loader

scale = (320, 240)  # smaller than the images: a crop of 128 sees half of a street
camvid = dict(
    type="BaseSegDataset",
    metainfo=dict(
        classes=(
            *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence"),
            *("car", "pedestrian", "bicyclist"),
        ),
        palette=[
            [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0],
            [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192],
        ],
    ),
    data_root="data/camvid",
    img_suffix=".jpg",
    seg_map_suffix=".png",
)  # fmt: skip
train_dataloader = train_loader(
    4,
    1,
    **camvid,
    data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
    pipeline=crop_pipeline(scale, ratio_range=(0.75, 1.5), crop_size=128),
)
test_pipeline = eval_pipeline(scale)
val_dataloader = eval_loader(
    1,
    **camvid,
    data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
    pipeline=test_pipeline,
)
test_dataloader = eval_loader(
    1,
    **camvid,
    data_prefix=dict(img_path="images/test", seg_map_path="annotations/test"),
    pipeline=test_pipeline,
)
val_evaluator = dict(type="TwinsIoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
