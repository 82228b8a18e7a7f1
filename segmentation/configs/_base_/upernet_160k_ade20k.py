"""UPerNet on ADE20K, 160k iterations, as Swin trains it: 8 GPUs x 2 images.

Drop path is 0.2 and, for SVT-L, 0.3, as in the official backbones. The official configs of PCPVT-B and PCPVT-L set 0.3,
which no backbone read; --cfg-options model.backbone.drop_path_rate=0.3 does what they say.
"""

_base_ = ["./models/upernet.py", "./datasets/ade20k.py", "./runtime.py"]
from dense.models import poly_schedule

train_dataloader = dict(batch_size=2)
# GPUs x images of the recipe; a run with another number starts with a warning.
auto_scale_lr = dict(enable=False, base_batch_size=16)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    # Every name with "norm" or "pos_block" in it. Biases, and the norms of the heads (called bn), do decay.
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0), "pos_block": dict(decay_mult=0.0)}),
)
param_scheduler = poly_schedule(iterations=160000, warmup=1500)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=160000, val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))
