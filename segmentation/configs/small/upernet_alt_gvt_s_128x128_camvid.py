"""UPerNet on SVT-S, CamVid from scratch: half an hour on one core.

python train.py configs/small/upernet_alt_gvt_s_128x128_camvid.py
"""

_base_ = ["../_base_/models/upernet.py", "../_base_/camvid_scratch.py"]
from dense.models import poly_schedule, upernet

part = upernet("alt_gvt_small", num_classes=11, pretrained=None, drop_path_rate=0.0)
model = dict(**part, data_preprocessor=dict(size=(128, 128)))
param_scheduler = poly_schedule(iterations=800, power=0.9, warmup=100)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=800, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
