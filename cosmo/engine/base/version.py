"""Find the version of this project, whose one source is pyproject.toml."""

import functools
import importlib.metadata
import pathlib
import tomllib

DISTRIBUTION = "cosmo-dialogue"


@functools.cache
def version() -> str:
    """Return the version: of the checkout that this file is in, else of the installed package."""
    # A checkout first: another version may be installed beside it.
    path = pathlib.Path(__file__).resolve().parents[3] / "pyproject.toml"
    if path.exists():
        project = tomllib.loads(path.read_text()).get("project", {})
        if project.get("name") == DISTRIBUTION:
            return project["version"]
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:  # files that were copied without either
        return "unknown"
