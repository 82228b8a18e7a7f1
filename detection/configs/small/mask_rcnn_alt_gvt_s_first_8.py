"""Mask R-CNN on SVT-S, overfit to the first 8 images of a small part of COCO: a quarter of an hour on one core.

python train.py configs/small/mask_rcnn_alt_gvt_s_first_8.py
"""

_base_ = ["../_base_/models/mask_rcnn_fpn.py", "../_base_/first_8.py"]
from dense.models import poly_schedule, with_fpn

part = with_fpn("alt_gvt_small", pretrained=None, drop_path_rate=0.0)
# Regions cost most of a step on a CPU: a quarter of the usual ones are proposed and sampled.
train_regions = dict(rpn_proposal=dict(nms_pre=500, max_per_img=250), rcnn=dict(sampler=dict(num=128)))
model = dict(**part, train_cfg=train_regions, test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=250)))
param_scheduler = poly_schedule(iterations=300, warmup=20)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=300, val_interval=100)
