"""What surrounds a run: options, checkpoints, the run's folder and its processes."""

import os

# Before torch is imported. Its threads would otherwise spin while they wait for each other, and a forward pass took 1.6
# times as long beside one busy process on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
