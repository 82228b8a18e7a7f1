"""Semantic FPN on alt_gvt_demo: digits on photographs, from what `make demo` learnt. `make demo-dense` runs it in two
to three minutes.

python train.py configs/small/fpn_alt_gvt_demo_digits.py
"""

_base_ = ["../_base_/models/fpn.py", "../_base_/runtime.py"]
from dense.models import endless, one_by_one, poly, with_fpn

part = with_fpn("alt_gvt_demo", pretrained="../output/demo/checkpoint_best.pth", drop_path_rate=0.0)
part["neck"]["out_channels"] = 64  # a quarter of the usual, for speed
head = dict(
    in_channels=[64, 64, 64, 64],
    channels=64,
    num_classes=11,
    loss_decode=dict(
        class_weight=[0.1] + [1.0] * 10
    ),  # nine pixels of ten are background, which would be a good guess everywhere
)
model = dict(**part, decode_head=head, data_preprocessor=dict(size=(128, 128)))
colours = [[40 * k % 256, 85 * k % 256, 150 * k % 256] for k in range(11)]
scenes = dict(
    type="BaseSegDataset",
    metainfo=dict(classes=("background", *"0123456789"), palette=colours),
    data_root="data/digits",
    img_suffix=".png",
    seg_map_suffix=".png",
    reduce_zero_label=True,
    pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
)
train_dataloader = endless(
    8, 1, **scenes, data_prefix=dict(img_path="images/training", seg_map_path="annotations/training")
)
val_dataloader = one_by_one(
    1, **scenes, data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation")
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.01))
param_scheduler = poly(iterations=600, power=0.9, warmup=40)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=600, val_interval=600)
default_hooks = dict(checkpoint=dict(interval=600), logger=dict(interval=20))
