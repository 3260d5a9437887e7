"""torchvision, imported in one place: `from minivlm._torchvision import functional` inside the function that needs it.

Two reasons. It costs over a second, so nothing may import it before the first picture is touched. And an installer
may pair the CPU build of torch with the CUDA build of torchvision: its compiled half (`torchvision/_C.so`) then does
not load, which torchvision passes over in silence, and a later line of its `__init__` stops with "operator
torchvision::nms does not exist", because it describes the shapes of two operators that were to come from there. The
transforms are written in Python and need neither. So where that happens, and only there, the two operators are
declared (a name and a signature; calling one is still an error) and the import is made again. With a matching pair
nothing is declared.
"""

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", _SIGNATURE)
    import torchvision

from torchvision.transforms import v2 as transforms_v2  # noqa: E402  torchvision has to be whole before its parts
from torchvision.transforms.v2 import functional  # noqa: E402

__all__ = ["functional", "torchvision", "transforms_v2"]
