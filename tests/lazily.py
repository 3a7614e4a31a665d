"""Import heavy packages when a test first uses them, not when pytest collects its file.

Each worker process collects every file; TensorFlow, SciPy and their like take seconds of each.
"""

import importlib
import importlib.util

import pytest


class _Lazy:
    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


def importorskip(name: str):
    """Return a stand-in for the module `name`; skip the tests of a file where it is missing."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the package {name}", allow_module_level=True)
    return _Lazy(name)
