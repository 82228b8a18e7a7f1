"""COCO 2017, boxes and masks."""

_base_ = "./coco_detection.py"
from dense.models import for_scores, one_size

train_dataloader = dict(dataset=dict(pipeline=one_size((1333, 800), with_mask=True)))
val_dataloader = dict(dataset=dict(pipeline=for_scores((1333, 800), with_mask=True)))
test_dataloader = val_dataloader
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = val_evaluator
