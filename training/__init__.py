"""What surrounds a run: options, checkpoints, the run's folder and its processes."""

from training import threads

threads.set_policy()
