"""Canary: safety labels and rules of thumb for dialogues (Kim et al. 2022, "ProsocialDialog").

In Python: `Canary.load("/tmp/canary").chirp("...")` (see `canary.module`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from canary.module import Canary, Chirp

__all__ = ["Canary", "Chirp"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line's help pages do without JAX.
    if name in __all__:
        from canary import module

        return getattr(module, name)
    raise AttributeError(f"module 'canary' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
