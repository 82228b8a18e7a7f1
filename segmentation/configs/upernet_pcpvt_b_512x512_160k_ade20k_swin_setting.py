"""UPerNet on PCPVT-B, ADE20K, 160k iterations.

bash dist_train.sh configs/upernet_pcpvt_b_512x512_160k_ade20k_swin_setting.py 8    # 8 GPUs x 2 images
Published: 47.1 mIoU; 48.4 with --aug-test.
Its published log ends at 47.8.
The published config says drop path 0.3, which its backbone never read.
"""

_base_ = "./_base_/upernet_160k_ade20k.py"
from dense.models import upernet

model = upernet("pcpvt_base")
