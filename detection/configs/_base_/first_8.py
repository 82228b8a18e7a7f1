"""The first 8 training pictures of a small part of COCO, short side 192, learnt by heart from fresh weights: does a
detector learn?

Scores are those of the same pictures. Data: data/coco-mini, in COCO's layout.
"""

_base_ = ["./datasets/coco_instance.py", "./runtime.py"]
from dense.models import for_scores, one_size

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
    dataset=dict(**first_8, pipeline=one_size(scale, with_mask=True, flip=0.0)),
)
# Scores against the annotations of the 8 pictures alone, not of the whole file.
val_dataloader = dict(
    num_workers=1, dataset=dict(**first_8, pipeline=for_scores(scale, with_mask=True, more=("instances",)))
)
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
