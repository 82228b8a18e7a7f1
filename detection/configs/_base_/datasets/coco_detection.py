"""COCO 2017, boxes: images of at most 1333 x 800, two per GPU; wide and tall ones are not mixed in a batch."""

_base_ = []  # without it, mmengine takes a file with imports for a config of its other kind
from dense.models import detection_eval_pipeline, single_scale_pipeline

data_root = "data/coco/"
scale = (1333, 800)
train_dataloader = dict(
    batch_size=2,
    num_workers=6,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="AspectRatioBatchSampler"),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=single_scale_pipeline(scale),
    ),
)
test_pipeline = detection_eval_pipeline(scale)
val_dataloader = dict(
    batch_size=1,
    num_workers=6,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file=data_root + "annotations/instances_val2017.json", metric=["bbox"], format_only=False
)
test_evaluator = val_evaluator
