"""Mask R-CNN on alt_gvt_demo: digits on photographs, from the weights of `make demo`. `make demo-dense` runs it in
about three minutes.

python train.py configs/small/mask_rcnn_alt_gvt_demo_digits.py
"""

_base_ = ["../_base_/models/mask_rcnn_fpn.py", "../_base_/datasets/coco_instance.py", "../_base_/runtime.py"]
from dense.models import detection_eval_pipeline, poly_schedule, single_scale_pipeline, with_fpn

part = with_fpn("alt_gvt_demo", pretrained="../output/demo/checkpoint_best.pth", drop_path_rate=0.0)
part["neck"]["out_channels"] = 64  # a quarter of the usual, for speed
regions = dict(out_channels=64)
# Regions cost most of a step on a CPU, and an image has eight digits at most.
few = dict(nms_pre=250, max_per_img=50)
model = dict(
    **part,
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=regions,
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=regions,
        mask_head=dict(in_channels=64, conv_out_channels=64, num_classes=10),
    ),
    train_cfg=dict(rpn=dict(sampler=dict(num=64)), rpn_proposal=few, rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=few),
)
scale = (128, 128)
scenes = dict(data_root="data/digits/", metainfo=dict(classes=tuple("0123456789")))
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(**scenes, pipeline=single_scale_pipeline(scale, with_mask=True, flip=0.0)),
)
test_pipeline = detection_eval_pipeline(scale, with_mask=True)
val_dataloader = dict(num_workers=1, dataset=dict(**scenes, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="data/digits/annotations/instances_val2017.json")
test_evaluator = val_evaluator
auto_scale_lr = dict(base_batch_size=8)
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01), clip_grad=dict(max_norm=10.0)
)
param_scheduler = poly_schedule(iterations=300, warmup=20)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=300, val_interval=300)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=300), logger=dict(interval=20, log_metric_by_epoch=False))
log_processor = dict(by_epoch=False)
