"""Train a detector: python train.py CONFIG [--work-dir FOLDER]. With several processes: dist_train.sh."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.errors import end_at_interrupt

end_at_interrupt("train.py")

from dense.cli import train  # noqa: E402

train("mmdet")
