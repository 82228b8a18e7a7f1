"""Mask R-CNN on SVT-B, COCO, 36 epochs.

bash dist_train.sh configs/mask_rcnn_alt_gvt_b_fpn_3x_coco_swin_setting.py 8    # 8 GPUs x 2 images
Published: box AP 48.0, mask AP 43.0.
"""

_base_ = "./_base_/mask_rcnn_3x_swin.py"
from dense.models import with_fpn

model = with_fpn("alt_gvt_base")
