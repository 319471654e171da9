"""mmfn: multimodal language models as pure functions over parameter pytrees.

The names below are the public surface. They are imported on first use, so that `import mmfn` does no work.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfn.grad import value_and_grad
    from mmfn.interop.hf import init, load_hf, save_hf, to_hf
    from mmfn.interop.inputs import batch_from_hf
    from mmfn.model import Model, logits
    from mmfn.train.generate import generate
    from mmfn.train.objective import loss

__version__ = "0.1.0"

_MODULES = {
    "Model": "mmfn.model",
    "batch_from_hf": "mmfn.interop.inputs",
    "generate": "mmfn.train.generate",
    "init": "mmfn.interop.hf",
    "load_hf": "mmfn.interop.hf",
    "logits": "mmfn.model",
    "loss": "mmfn.train.objective",
    "save_hf": "mmfn.interop.hf",
    "to_hf": "mmfn.interop.hf",
    "value_and_grad": "mmfn.grad",
}

__all__ = [
    "Model",
    "batch_from_hf",
    "generate",
    "init",
    "load_hf",
    "logits",
    "loss",
    "save_hf",
    "to_hf",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mmfn' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
