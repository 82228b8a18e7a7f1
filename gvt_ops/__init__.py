"""What gvt.py computes with: window attention, a CPU's linear layers, and a torchvision that can be imported."""

from gvt_ops import torchvision_cpu  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch
