"""The numbers of the papers' tables, from `paper_tables.toml`, to print beside ours."""

import tomllib
from pathlib import Path
from typing import Any

_ALL = tomllib.loads(Path(__file__).with_name("paper_tables.toml").read_text(encoding="utf-8"))
STATISTICS, PROSOCIAL, SODA = _ALL["statistics"], _ALL["prosocial"], _ALL["soda"]
GUARDS = _ALL["guards"]


def table(name: str) -> Any:
    """Return a table by its name in the file, such as "soda.emotions". Raises KeyError."""
    found: Any = _ALL
    for part in name.split("."):
        found = found[part]
    return found
