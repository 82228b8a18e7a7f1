"""UPerNet on PCPVT-S, ADE20K, 160k iterations.

bash dist_train.sh configs/upernet_pcpvt_s_512x512_160k_ade20k_swin_setting.py 8    # 8 GPUs x 4 images
Published: 46.2 mIoU; 47.5 with --aug-test.
The only one of six with 32 images: its config did not say 2 a GPU, and its log has the epochs of 32.
"""

_base_ = "./_base_/upernet_160k_ade20k.py"
from dense.models import upernet

train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(base_batch_size=32)
model = upernet("pcpvt_small")
