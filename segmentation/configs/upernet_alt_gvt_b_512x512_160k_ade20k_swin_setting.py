"""UPerNet on SVT-B, ADE20K, 160k iterations.

bash dist_train.sh configs/upernet_alt_gvt_b_512x512_160k_ade20k_swin_setting.py 8    # 8 GPUs x 2 images
Published: 47.7 mIoU; 48.9 with --aug-test.
Its published README says 47.4.
"""

_base_ = "./_base_/upernet_160k_ade20k.py"
from dense.models import upernet

model = upernet("alt_gvt_base")
