"""What surrounds a run: options, checkpoints, the run's folder and its processes."""

import os

# Before torch is imported. Its threads would otherwise spin while they wait for each other, and one busy neighbor on the
# machine's cores made a forward pass take 1.6 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
