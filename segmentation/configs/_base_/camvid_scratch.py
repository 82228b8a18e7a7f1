"""CamVid from scratch: crops of 128 x 128, whole images for scores."""

_base_ = ["./datasets/camvid.py", "./runtime.py"]
auto_scale_lr = dict(enable=False, base_batch_size=4)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=4e-4, weight_decay=0.01))
