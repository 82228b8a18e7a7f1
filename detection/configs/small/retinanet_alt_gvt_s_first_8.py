"""RetinaNet on SVT-S, overfit to the first 8 images of a small part of COCO: ten minutes on one core.

python train.py configs/small/retinanet_alt_gvt_s_first_8.py
"""

_base_ = ["../_base_/models/retinanet_fpn.py", "../_base_/first_8.py"]
from dense.models import poly_schedule, with_fpn

model = with_fpn("alt_gvt_small", pretrained=None, drop_path_rate=0.0)
val_evaluator = dict(metric=["bbox"])
test_evaluator = val_evaluator
param_scheduler = poly_schedule(iterations=480, warmup=20)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=480, val_interval=120)
