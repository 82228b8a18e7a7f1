"""Semantic FPN on PCPVT-L, ADE20K, 80k iterations.

bash dist_train.sh configs/fpn_pcpvt_l_512x512_80k_ade20k.py 8    # 8 GPUs x 4 images
Published: 46.4 mIoU.
"""

_base_ = "./_base_/fpn_80k_ade20k.py"
from dense.models import with_fpn

model = with_fpn("pcpvt_large")
