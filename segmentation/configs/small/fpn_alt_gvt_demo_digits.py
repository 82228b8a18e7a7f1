"""Semantic FPN on alt_gvt_demo: digits on photographs, from the weights of `make demo`. `make demo-dense` runs it in
two to three minutes.

python train.py configs/small/fpn_alt_gvt_demo_digits.py
"""

_base_ = ["../_base_/models/fpn.py", "../_base_/runtime.py"]
from dense.models import eval_loader, poly_schedule, train_loader, with_fpn

part = with_fpn("alt_gvt_demo", pretrained="../output/demo/checkpoint_best.pth", drop_path_rate=0.0)
part["neck"]["out_channels"] = 64  # a quarter of the usual, for speed
head = dict(
    in_channels=[64, 64, 64, 64],
    channels=64,
    num_classes=11,
    # Nine pixels of ten are background, which would be a good guess everywhere.
    loss_decode=dict(class_weight=[0.1] + [1.0] * 10),
)
model = dict(**part, decode_head=head, data_preprocessor=dict(size=(128, 128)))
palette = [[40 * k % 256, 85 * k % 256, 150 * k % 256] for k in range(11)]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
scenes = dict(
    type="BaseSegDataset",
    metainfo=dict(classes=("background", *"0123456789"), palette=palette),
    data_root="data/digits",
    img_suffix=".png",
    seg_map_suffix=".png",
    reduce_zero_label=True,
    pipeline=test_pipeline,
)
train_dataloader = train_loader(
    8, 1, **scenes, data_prefix=dict(img_path="images/training", seg_map_path="annotations/training")
)
val_dataloader = eval_loader(
    1, **scenes, data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation")
)
test_dataloader = val_dataloader
val_evaluator = dict(type="TwinsIoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.01))
param_scheduler = poly_schedule(iterations=600, power=0.9, warmup=40)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=600, val_interval=600)
default_hooks = dict(checkpoint=dict(interval=600), logger=dict(interval=20))
