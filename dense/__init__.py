"""What segmentation and detection share: the backbone, the parts of configs, and the commands."""
