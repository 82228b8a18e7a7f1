"""RetinaNet on SVT-B, COCO, 36 epochs.

bash dist_train.sh configs/retinanet_alt_gvt_b_fpn_3x_ms_coco.py 8    # 8 GPUs x 2 images
Published: box AP 46.9.
"""

_base_ = "./_base_/retinanet_3x_ms.py"
from dense.models import with_fpn

model = with_fpn("alt_gvt_base")
