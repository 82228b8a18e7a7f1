"""What segmentation and detection share: the backbone, the parts of a config that depend on it, and the commands."""
