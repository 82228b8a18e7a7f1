"""What gvt.py computes with: attention, what accelerates it, and a torchvision that can be imported."""

from gvt_ops import torchvision_cpu  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
from gvt_ops.compiling import compile, describe_compiled
from gvt_ops.modules import accelerate, describe

__all__ = ["accelerate", "compile", "describe", "describe_compiled"]
