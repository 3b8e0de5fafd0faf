"""Import hook for an environment with a CPU torch and a CUDA build of torchvision.

There torchvision's C++ library does not load, so its operators are never declared, and ``import torchvision``
dies with "operator torchvision::nms does not exist" although the Python part (the image transforms, all that
transformers and vLLM use) would work. This hook declares the two operators that the import asks for, only
where the library does not load. ``torchvision.ops.nms`` stays unusable.

`repair_env.py` copies this file into site-packages with a ``.pth`` that imports it at interpreter start, also
in the processes that vLLM and Ray start. Therefore it imports torch only when torchvision is imported.
"""

import contextlib
import sys

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = ("nms", "qnms")

_declared = None  # the torch.library.Library: the declarations vanish with it


def declare_missing_operators() -> None:
    """Declare torchvision's operators if its C++ library cannot do so itself."""
    global _declared
    import importlib.machinery
    from pathlib import Path

    import torch

    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    if _declared is not None or torch.version.cuda is not None or spec is None or spec.origin is None:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
            return  # sound: torchvision declares its operators
    except OSError:
        pass
    library = torch.library.Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(name + SCHEMA)
    _declared = library


class TorchvisionFinder:
    """Finds nothing; acts once, just before torchvision is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            with contextlib.suppress(ImportError):  # no torch: torchvision itself will say so
                declare_missing_operators()
        return None


if not any(type(finder).__name__ == TorchvisionFinder.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, TorchvisionFinder())
