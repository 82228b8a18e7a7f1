"""Semantic FPN on PCPVT-S, ADE20K, 80k iterations.

bash dist_train.sh configs/fpn_pcpvt_s_512x512_80k_ade20k.py 8    # 8 GPUs x 4 images
Published: 44.3 mIoU.
"""

_base_ = "./_base_/fpn_80k_ade20k.py"
from dense.models import with_fpn

model = with_fpn("pcpvt_small")
