"""What surrounds a run: options, checkpoints, the run's folder and its processes."""
