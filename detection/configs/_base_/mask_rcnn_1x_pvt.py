"""Mask R-CNN on COCO, 12 epochs, as PVT trains it, with weight decay on every parameter."""

_base_ = ["./models/mask_rcnn_fpn.py", "./datasets/coco_instance.py", "./runtime.py"]
from dense.models import step_schedule

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-4, weight_decay=1e-4))
param_scheduler = step_schedule(epochs=12, milestones=[8, 11])
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
