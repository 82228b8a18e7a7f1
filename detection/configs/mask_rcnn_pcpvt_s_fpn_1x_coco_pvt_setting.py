"""Mask R-CNN on PCPVT-S, COCO, 12 epochs.

bash dist_train.sh configs/mask_rcnn_pcpvt_s_fpn_1x_coco_pvt_setting.py 8    # 8 GPUs x 2 images
Published: box AP 42.9, mask AP 40.0.
"""

_base_ = "./_base_/mask_rcnn_1x_pvt.py"
from dense.models import with_fpn

model = with_fpn("pcpvt_small")
