"""Draw what a detector finds in images: python image_demo.py IMAGES... CONFIG CHECKPOINT --out-dir FOLDER."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dense.demo import image_demo

image_demo("mmdet")
