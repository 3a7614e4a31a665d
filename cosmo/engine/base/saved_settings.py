"""Write and read the settings of a trained run as data: MODEL_DIR/settings.json.

Nothing in a run's folder is parsed as gin, imported or executed: the folder may be somebody else's.
`config.gin` beside it repeats the run. It is read only where a user passes it with --gin_file,
because gin can import any module and call any function.
"""

import ast
import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from cosmo.engine.base import annotations, json_lines
from cosmo.engine.base.errors import UserError

FILE = "settings.json"
GIN_FILE = "config.gin"
VERSION = 1  # of the file's format
# Settings that are never taken from a folder. Names in _DIR are places to write to, CHECKPOINT_PATH
# and CACHE_PATH other things to read: a user chooses these. A module is code.
MODULE = "MIXTURE_OR_TASK_MODULE"
_NOT_TAKEN = re.compile(rf".*_DIR|.*CHECKPOINT_PATH|CACHE_PATH|{MODULE}")
_MACRO = re.compile(r"^([A-Za-z_]\w*)\s*=(?!=)", re.M)


@dataclasses.dataclass(frozen=True)
class Saved:
    """The settings of a run.

    `macros` and `parameters` ("train/data.DatasetConfig.seed") map names to plain values. `code`
    maps names to what they were bound to where that is not a plain value, to be named in errors.
    `text_options` are of another system instead: ParlAI's options on the form of a model's texts.
    """

    path: str
    macros: dict[str, Any] = dataclasses.field(default_factory=dict)
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    code: dict[str, str] = dataclasses.field(default_factory=dict)
    text_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def macro(self, name: str, wanted: Any, default: Any = None) -> Any:
        """Return a macro's value, or `default`; UserError if it is of another type."""
        value = self.macros.get(name, default)
        if name in self.macros and not annotations.fits(value, wanted):
            raise UserError(
                f"{self.path} has {name}={value!r}; expected {annotations.words(wanted)}"
            )
        return value

    def taken(self) -> dict[str, Any]:
        """Return the macros that a command may take from a folder (see _NOT_TAKEN)."""
        return {k: v for k, v in self.macros.items() if not _NOT_TAKEN.fullmatch(k)}


def is_plain(value: Any) -> bool:
    """Return whether JSON keeps a value, but for tuples, which become lists."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def text(macros: Mapping[str, Any], parameters: Mapping[str, Any], code: Mapping[str, str]) -> str:
    """Return the content of settings.json."""
    content = {"format": VERSION, "macros": macros, "parameters": parameters, "code": code}
    # Sorted, so that the settings of two runs can be compared line by line.
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def read(folder: epath.PathLike) -> Saved | None:
    """Return the settings in a run's folder; None if it holds none.

    A run that is older than settings.json has its plain macros read from config.gin, as literals.
    Raises UserError for a file that cannot be read, or that a newer version has written.
    """
    path, older = epath.Path(folder) / FILE, epath.Path(folder) / GIN_FILE
    if path.exists():
        return _parse(path)
    if older.exists():
        try:
            return Saved(str(older), macros_in(older.read_text()))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{older} cannot be read: {error}; give --gin_file=FILE") from error
    return None


def _parse(path: epath.Path) -> Saved:
    try:
        content = json_lines.value(path.read_bytes())
        if content["format"] > VERSION:
            raise UserError(
                f"{path} was written by a newer version of this project (format "
                f"{content['format']}, known is {VERSION}); update, or give --gin_file=FILE"
            )
        parts = [content[name] for name in ("macros", "parameters", "code")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("expected three objects: macros, parameters and code")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); give --gin_file=FILE") from error
    # Settings are parts of frozen dataclasses, which are hashed: a list could not be.
    return Saved(str(path), *({k: _tuples(v) for k, v in part.items()} for part in parts))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def macros_in(text: str) -> dict[str, Any]:
    """Return the macros of a gin text that stand for literals; nothing is evaluated."""
    found: dict[str, Any] = {}
    # gin continues a line after a backslash.
    text = text.replace("\\\n", "")
    places = [*(match.start() for match in _MACRO.finditer(text)), len(text)]
    for start, end in itertools.pairwise(places):
        name, _, value = text[start:end].partition("=")
        # A blank line or a comment ends a value of several lines.
        value = re.split(r"\n\s*\n|\n#", value)[0]
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        # literal_eval raises the last two for texts nested too deeply.
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue  # a reference
    return found
