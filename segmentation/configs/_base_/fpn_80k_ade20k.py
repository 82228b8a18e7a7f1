"""Semantic FPN on ADE20K, 80k iterations, as PVT trains it: 8 GPUs x 4 images.

The paper says 16 images, weight decay 5e-4 and drop path 0.4 for the large models. The official configs and backbones
have 32 images on 8 GPUs, 1e-4 on every parameter, and drop path 0.2 (SVT-L: 0.3). To do what the paper says:
--cfg-options train_dataloader.batch_size=2 optim_wrapper.optimizer.weight_decay=5e-4 model.backbone.drop_path_rate=0.4
"""

_base_ = ["./models/fpn.py", "./datasets/ade20k.py", "./runtime.py"]
from dense.models import poly_schedule

# GPUs x images of the recipe; a run with another number starts with a warning.
auto_scale_lr = dict(enable=False, base_batch_size=32)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4))
param_scheduler = poly_schedule(iterations=80000, power=0.9, eta_min=1e-6)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
