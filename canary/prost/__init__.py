"""Answer dialogues with responses that follow rules of thumb: Prost (Kim et al. 2022, section 4.2).

In Python: `Prost.load("/tmp/prost").reply(["..."])` (see `canary.prost.agent`).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from canary.prost.agent import Prost, Reply

__all__ = ["Prost", "Reply"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line's help pages do without JAX.
    if name in __all__:
        return getattr(importlib.import_module("canary.prost.agent"), name)
    raise AttributeError(f"module 'canary.prost' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
