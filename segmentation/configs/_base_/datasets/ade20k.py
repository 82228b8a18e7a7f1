"""ADE20K: 150 classes, crops of 512 x 512 from pictures of a random size, whole pictures with a short side of 512 for
scores.
"""

_base_ = []  # without it, mmengine takes a file with imports for a config of its other kind
from dense.models import crops, endless, one_by_one, whole

scale = (2048, 512)  # the longer side at most 2048, the shorter at most 512
ade20k = dict(type="ADE20KDataset", data_root="data/ade/ADEChallengeData2016", reduce_zero_label=True)
train_dataloader = endless(
    4,
    4,
    **ade20k,
    data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
    pipeline=crops(scale, ratio_range=(0.5, 2.0), side=512),
)
val_dataloader = one_by_one(
    4,
    **ade20k,
    data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
    pipeline=whole(scale),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

# --aug-test: six sizes of the picture, each as it is and mirrored.
tta_model = dict(type="TwinsTTAModel")
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale=(int(2048 * ratio), int(512 * ratio)), keep_ratio=True)
                for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [
                dict(type="RandomFlip", prob=0.0, direction="horizontal"),
                dict(type="RandomFlip", prob=1.0, direction="horizontal"),
            ],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
