"""Make frozen dataclasses of JSON or TOML objects, and the other way: one error for each fault."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import shown

T = TypeVar("T")
_PLAIN: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "float | None": ((int, float, type(None)), "a number or null"),
    "bool": ((bool,), "true or false"),
    "dict[str, Any]": ((dict,), "an object"),
}


def built(cls: type[T], given: Any, what: str) -> T:
    """Return the dataclass `cls` made of an object; ValueError names the field that is wrong.

    A field of the type `tuple[X, ...]` takes a list. `cls.NESTED` gives the class of a field's
    elements.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{what}: got {shown(given)}, expected an object")
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{what}: unknown field {shown(unknown[0])}, expected {sorted(known)}")
    for name, field in known.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ValueError(f"{what}: field {name!r} is missing")
    nested = getattr(cls, "NESTED", {})
    return cls(
        **{
            name: _value(known[name].type, value, nested.get(name), f"{what}, field {name!r}")
            for name, value in given.items()
        }
    )


def _value(kind: str, value: Any, nested: type | None, what: str) -> Any:
    if kind.startswith("tuple["):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{what}: got {shown(value)}, expected a list")
        places = [f"{what}, element {number}" for number in range(1, len(value) + 1)]
        if nested is not None:
            return tuple(built(nested, one, at) for one, at in zip(value, places, strict=True))
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_value(inner, one, None, at) for one, at in zip(value, places, strict=True))
    types, words = _PLAIN[kind]
    # True is an integer for Python, and no number for people.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{what}: got {shown(value)}, expected {words}")
    if isinstance(value, str) and not json_lines.is_whole(value):
        raise ValueError(f"{what}: got {shown(value)}, expected characters that UTF-8 can encode")
    if isinstance(value, float) and value - value != 0:
        raise ValueError(f"{what}: got {value}, expected a finite number")
    return value


def plain(value: Any) -> Any:
    """Return a dataclass as JSON values, without the fields that have their default."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: plain(getattr(value, f.name)) for f in fields if not _is_default(value, f)}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def _is_default(value: Any, field: dataclasses.Field) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return getattr(value, field.name) == field.default_factory()
    return field.default is not dataclasses.MISSING and getattr(value, field.name) == field.default
