"""COCO 2017, boxes and masks."""

_base_ = "./coco_detection.py"
from dense.models import detection_eval_pipeline, single_scale_pipeline

train_dataloader = dict(dataset=dict(pipeline=single_scale_pipeline((1333, 800), with_mask=True)))
test_pipeline = detection_eval_pipeline((1333, 800), with_mask=True)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = val_evaluator
