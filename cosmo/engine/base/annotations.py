"""Check whether a plain value is of an annotated type; put that type in words for an error."""

import collections.abc
import types
import typing
from typing import Any

# For people who set values and know no Python types.
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    type(None): "None",
}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def fits(value: Any, wanted: Any) -> bool:
    """Return whether a plain value (number, text, None, tuple, list, dict) is of type `wanted`.

    An int serves as a float. A bool serves only as a bool: `True` layers is a mistake. A type that
    is not understood here, such as a TypeVar, accepts every value.
    """
    if wanted is Any:
        return True
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        # In Python 1 equals True and 1.0, which are other choices here.
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is typing.Annotated:
        return fits(value, inner[0])
    if wanted is None:
        return value is None
    # A bool is an int to Python.
    if isinstance(value, bool) and wanted in (int, float):
        return False
    if wanted is float:
        return isinstance(value, int | float)
    kind = origin or wanted
    # isinstance refuses most protocols.
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if isinstance(value, str) and kind is not str and issubclass(kind, collections.abc.Collection):
        return False  # a text is a sequence of texts to Python, and a slip to people
    if not isinstance(value, kind):
        return False
    if isinstance(value, dict) and len(inner) == 2:
        return all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if isinstance(value, tuple | list) and inner:
        # tuple[int, str] has a type a place, tuple[int, ...] one for all places.
        if kind is tuple and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(one, inner[0]) for one in value)
    return True


def is_plain(wanted: Any) -> bool:
    """Return whether only numbers, texts, bools and None are of type `wanted`."""
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return all(map(is_plain, typing.get_args(wanted)))
    return wanted is None or wanted in (int, float, str, bool, type(None))


def words(wanted: Any) -> str:
    """Return an annotated type in words: "a whole number or None"."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is None or wanted in _WORDS:
        return _WORDS[type(None) if wanted is None else wanted]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(words, inner))
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    kind = origin or wanted
    if not isinstance(kind, type):
        return str(wanted)
    if issubclass(kind, collections.abc.Callable) and origin:
        return "a function"
    if issubclass(kind, collections.abc.Mapping):
        return f"a dict of {_plural(inner[0])} to {_plural(inner[1])}" if inner else "a dict"
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return f"a tuple of {', '.join(map(words, inner))}"
    if issubclass(kind, collections.abc.Collection):
        name = "tuple" if kind is tuple else "list"
        return f"a {name} of {_plural(inner[0])}" if inner else f"a {name}"
    return f"a {kind.__name__}"


def _plural(wanted: Any) -> str:
    return _PLURALS.get(wanted) or f"{words(wanted)} each"
