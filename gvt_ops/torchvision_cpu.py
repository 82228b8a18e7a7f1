"""Let torchvision be imported beside a CPU build of torch. Import this file before timm or torchvision.

PyPI's torchvision is a CUDA build. Beside a CPU build of torch its compiled library cannot be loaded, and `import
torchvision` (so also `import timm`) ends in "operator torchvision::nms does not exist". Declaring the two operators
that torchvision refers to while it is imported is enough for transforms, data sets and timm. They stay without a body:
calling them is still an error. Beside a CUDA build of torch, or where torchvision's own library loads, nothing is done.
"""

import importlib.machinery
import importlib.util
from pathlib import Path

import torch

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def library_loads() -> bool:
    """Return True if torchvision's compiled operators can be loaded, without importing torchvision."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # no torchvision: nothing to fix, its import gives the right error
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(spec.origin).with_name(f"_C{suffix}")
        if path.is_file():
            try:
                torch.ops.load_library(path)
            except OSError:
                return False
            return True
    return False


def declare_operators() -> torch.library.Library | None:
    """Declare torchvision's `nms` and `qnms` if this torch is a CPU build that cannot load them; return None if it need
    not.
    """
    if torch.version.cuda is not None or torch.version.hip is not None or library_loads():
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + NMS)
    return library


LIBRARY = declare_operators()  # the declarations live as long as this object
