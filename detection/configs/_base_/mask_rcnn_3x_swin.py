"""Mask R-CNN on COCO, 36 epochs, as Swin trains it: sizes and crops of many kinds, float16 with a loss scale of 512."""

_base_ = ["./models/mask_rcnn_fpn.py", "./datasets/coco_instance.py", "./runtime.py"]
from dense.models import multiscale_pipeline, step_schedule

train_dataloader = dict(dataset=dict(pipeline=multiscale_pipeline(with_mask=True)))
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0), "pos_block": dict(decay_mult=0.0)}),
)
param_scheduler = step_schedule(epochs=36, milestones=[27, 33])
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=36, val_interval=1)
