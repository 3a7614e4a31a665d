"""Social dialogue models. In Python: `model = cosmo.load("/tmp/run")` (see `cosmo.dialogue`)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmo.dialogue import DialogueModel, Reply, Score, load

__all__ = ["DialogueModel", "Reply", "Score", "load"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line's help pages do without JAX.
    if name in __all__:
        from cosmo import dialogue

        return getattr(dialogue, name)
    raise AttributeError(f"module 'cosmo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
