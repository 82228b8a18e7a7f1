"""Mask R-CNN on PCPVT-S, COCO, 36 epochs.

bash dist_train.sh configs/mask_rcnn_pcpvt_s_fpn_3x_coco_swin_setting.py 8    # 8 GPUs x 2 images
Published: box AP 46.8, mask AP 42.6.
"""

_base_ = "./_base_/mask_rcnn_3x_swin.py"
from dense.models import with_fpn

model = with_fpn("pcpvt_small")
