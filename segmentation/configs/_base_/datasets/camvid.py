"""CamVid in ADE20K's layout: 367, 101 and 233 pictures of 480 x 360 from a car, 11 classes from 0, 255 is
unlabelled.
"""

_base_ = []  # without it, mmengine takes a file with imports for a config of its other kind
from dense.models import crops, endless, one_by_one, whole

scale = (320, 240)  # smaller than the pictures: a crop of 128 sees half of a street
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
train_dataloader = endless(
    4,
    1,
    **camvid,
    data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
    pipeline=crops(scale, ratio_range=(0.75, 1.5), side=128),
)
val_dataloader = one_by_one(
    1,
    **camvid,
    data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
    pipeline=whole(scale),
)
test_dataloader = one_by_one(
    1, **camvid, data_prefix=dict(img_path="images/test", seg_map_path="annotations/test"), pipeline=whole(scale)
)
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
