"""Mask R-CNN on PCPVT-L, COCO, 12 epochs.

bash dist_train.sh configs/mask_rcnn_pcpvt_l_fpn_1x_coco_pvt_setting.py 8    # 8 GPUs x 2 images
Published: box AP 45.4, mask AP 41.5.
"""

_base_ = "./_base_/mask_rcnn_1x_pvt.py"
from dense.models import with_fpn

model = with_fpn("pcpvt_large")
