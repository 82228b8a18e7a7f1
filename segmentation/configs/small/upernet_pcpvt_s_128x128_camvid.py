"""UPerNet on PCPVT-S, CamVid from scratch: ten minutes on one core.

python train.py configs/small/upernet_pcpvt_s_128x128_camvid.py
"""

_base_ = ["../_base_/models/upernet.py", "../_base_/camvid_scratch.py"]
from dense.models import poly_schedule, upernet

part = upernet("pcpvt_small", num_classes=11, pretrained=None, drop_path_rate=0.0)
model = dict(**part, data_preprocessor=dict(size=(128, 128)))
param_scheduler = poly_schedule(iterations=240, power=0.9, warmup=100)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=240, val_interval=120)
default_hooks = dict(checkpoint=dict(interval=120))
