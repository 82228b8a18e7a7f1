"""Mask R-CNN on SVT-L, COCO, 12 epochs.

bash dist_train.sh configs/mask_rcnn_alt_gvt_l_fpn_1x_coco_pvt_setting.py 8    # 8 GPUs x 2 images
Published: box AP 45.9, mask AP 41.6.
"""

_base_ = "./_base_/mask_rcnn_1x_pvt.py"
from dense.models import with_fpn

model = with_fpn("alt_gvt_large")
