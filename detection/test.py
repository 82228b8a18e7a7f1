"""Evaluate a detector: python test.py CONFIG CHECKPOINT [--eval NAME]. With several processes: dist_test.sh."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.errors import end_at_interrupt

end_at_interrupt("test.py")

from dense.cli import test  # noqa: E402

test("mmdet")
