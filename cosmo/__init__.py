"""Social dialogue models. In Python: `model = cosmo.load("/tmp/run")` (see `cosmo.dialogue`)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmo.dialogue import DialogueModel, Reply, Score, load

    __version__: str

__all__ = ["DialogueModel", "Reply", "Score", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the command line's help pages do without JAX.
    if name == "__version__":
        from cosmo.engine.base.version import version

        return version()
    if name in __all__:
        from cosmo import dialogue

        return getattr(dialogue, name)
    raise AttributeError(f"module 'cosmo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
