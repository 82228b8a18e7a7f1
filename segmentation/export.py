"""Export a whole segmentor: python export.py CONFIG CHECKPOINT --to FORMAT --output FILE."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.export_dense import export

export("mmseg")
