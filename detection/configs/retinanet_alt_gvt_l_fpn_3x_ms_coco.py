"""RetinaNet on SVT-L, COCO, 36 epochs.

bash dist_train.sh configs/retinanet_alt_gvt_l_fpn_3x_ms_coco.py 8    # 8 GPUs x 2 images
Published: no figure.
"""

_base_ = "./_base_/retinanet_3x_ms.py"
from dense.models import with_fpn

model = with_fpn("alt_gvt_large")
