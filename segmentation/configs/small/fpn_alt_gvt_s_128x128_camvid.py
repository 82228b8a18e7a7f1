"""Semantic FPN on SVT-S, CamVid from scratch: half an hour on one core.

python train.py configs/small/fpn_alt_gvt_s_128x128_camvid.py
"""

_base_ = ["../_base_/models/fpn.py", "../_base_/camvid_scratch.py"]
from dense.models import poly_schedule, with_fpn

part = with_fpn("alt_gvt_small", pretrained=None, drop_path_rate=0.0)
model = dict(**part, decode_head=dict(num_classes=11), data_preprocessor=dict(size=(128, 128)))
param_scheduler = poly_schedule(iterations=2400, power=0.9, warmup=100)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=2400, val_interval=800)
default_hooks = dict(checkpoint=dict(interval=800))
