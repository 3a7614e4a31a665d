"""Label dialogues for safety, with rules of thumb (Kim et al. 2022, "ProsocialDialog").

In Python: `Canary.load("/tmp/canary").chirp("...")` (see `canary.module`); the paper's prompts for
another language model are in `canary.prompts`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from canary import prompts
    from canary.module import Canary, Chirp

__all__ = ["Canary", "Chirp", "prompts"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line's help pages do without JAX.
    if name == "prompts":
        return importlib.import_module("canary.prompts")
    if name in __all__:
        return getattr(importlib.import_module("canary.module"), name)
    raise AttributeError(f"module 'canary' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
