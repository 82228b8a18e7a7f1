"""UPerNet on SVT-L, ADE20K, 160k iterations.

bash dist_train.sh configs/upernet_alt_gvt_l_512x512_160k_ade20k_swin_setting.py 8    # 8 GPUs x 2 images
Published: 48.8 mIoU; 50.2 with --aug-test.
"""

_base_ = "./_base_/upernet_160k_ade20k.py"
from dense.models import upernet

model = upernet("alt_gvt_large", drop_path_rate=0.3)
