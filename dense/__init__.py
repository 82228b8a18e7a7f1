"""What segmentation and detection share: the backbone, the parts of configs, and the commands."""

import training  # noqa: F401  before torch: how its threads wait
