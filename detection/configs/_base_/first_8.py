"""A smoke test: overfit the first 8 training images of a small part of COCO from scratch, shorter side 192.

Scores are those of the same images. Data: data/coco-mini, in COCO's layout.
"""

_base_ = ["./datasets/coco_instance.py", "./runtime.py"]
from dense.models import detection_eval_pipeline, single_scale_pipeline

scale = (320, 192)
first_8 = dict(
    data_root="data/coco-mini/",
    ann_file="annotations/instances_train2017.json",
    data_prefix=dict(img="train2017/"),
    indices=8,
)
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(**first_8, pipeline=single_scale_pipeline(scale, with_mask=True, flip=0.0)),
)
# Scores against the annotations of the 8 images alone, not of the whole file.
test_pipeline = detection_eval_pipeline(scale, with_mask=True, meta_keys=("instances",))
val_dataloader = dict(num_workers=1, dataset=dict(**first_8, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=None)
test_evaluator = val_evaluator
auto_scale_lr = dict(base_batch_size=2)
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-4, weight_decay=0.0), clip_grad=dict(max_norm=10.0)
)
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=1000), logger=dict(interval=10, log_metric_by_epoch=False)
)
log_processor = dict(by_epoch=False)
