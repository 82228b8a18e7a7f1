"""UPerNet on PCPVT-L, ADE20K, 160k iterations.

bash dist_train.sh configs/upernet_pcpvt_l_512x512_160k_ade20k_swin_setting.py 8    # 8 GPUs x 2 images
Published: 48.6 mIoU; 49.8 with --aug-test.
The published config says drop path 0.3, which its backbone never read.
"""

_base_ = "./_base_/upernet_160k_ade20k.py"
from dense.models import upernet

model = upernet("pcpvt_large")
