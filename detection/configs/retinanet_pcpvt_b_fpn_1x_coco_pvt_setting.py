"""RetinaNet on PCPVT-B, COCO, 12 epochs.

bash dist_train.sh configs/retinanet_pcpvt_b_fpn_1x_coco_pvt_setting.py 8    # 8 GPUs x 2 images
Published: box AP 44.3.
"""

_base_ = "./_base_/retinanet_1x_pvt.py"
from dense.models import with_fpn

model = with_fpn("pcpvt_base")
