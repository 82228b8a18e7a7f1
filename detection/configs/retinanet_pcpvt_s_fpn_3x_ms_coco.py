"""RetinaNet on PCPVT-S, COCO, 36 epochs.

bash dist_train.sh configs/retinanet_pcpvt_s_fpn_3x_ms_coco.py 8    # 8 GPUs x 2 images
Published: box AP 45.2.
"""

_base_ = "./_base_/retinanet_3x_ms.py"
from dense.models import with_fpn

model = with_fpn("pcpvt_small")
