"""ADE20K: 150 classes, crops of 512 x 512 from randomly resized images, whole images with a shorter side of 512 for
scores.
"""

_base_ = []  # without it, mmengine takes a file with imports for a config of its other kind
from dense.models import crop_pipeline, eval_loader, eval_pipeline, train_loader

scale = (2048, 512)  # the longer side at most 2048, the shorter at most 512
ade20k = dict(type="ADE20KDataset", data_root="data/ade/ADEChallengeData2016", reduce_zero_label=True)
train_dataloader = train_loader(
    4,
    4,
    **ade20k,
    data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
    pipeline=crop_pipeline(scale, ratio_range=(0.5, 2.0), crop_size=512),
)
test_pipeline = eval_pipeline(scale)
val_dataloader = eval_loader(
    4,
    **ade20k,
    data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
    pipeline=test_pipeline,
)
test_dataloader = val_dataloader
val_evaluator = dict(type="TwinsIoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

# --aug-test: six sizes of the image, each as it is and flipped.
tta_model = dict(type="TwinsTTAModel")
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="TwinsResize", scale=(int(2048 * ratio), int(512 * ratio)), keep_ratio=True)
                for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [
                dict(type="TwinsRandomFlip", prob=0.0, direction="horizontal"),
                dict(type="TwinsRandomFlip", prob=1.0, direction="horizontal"),
            ],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
