"""Semantic FPN on SVT-L, ADE20K, 80k iterations.

bash dist_train.sh configs/fpn_alt_gvt_l_512x512_80k_ade20k.py 8    # 8 GPUs x 4 images
Published: 46.7 mIoU.
"""

_base_ = "./_base_/fpn_80k_ade20k.py"
from dense.models import with_fpn

model = with_fpn("alt_gvt_large", drop_path_rate=0.3)
