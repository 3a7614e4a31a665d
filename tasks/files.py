"""Where the data files are: paths, splits and formats, local or remote.

A path of a corpus may be one file, a folder, a glob, a template with `{split}`, or a mapping
from split to any of these. Remote paths (`gs://...`) go through etils.epath.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cosmo.engine.base.errors import DataError
from cosmo.engine.base.files import ENDINGS

SPLITS = ("train", "validation", "test")
_VALIDATION = ("validation", "valid", "val", "dev")
RECORDS = ("jsonl", "json", "ndjson", "parquet")  # the endings of files of records
TABLES = ("csv", "tsv")
TEXTS = ("txt",)
_REPOSITORY = Path(__file__).resolve().parent.parent

_log = logging.getLogger(__name__)
_warned: set[tuple[str, str]] = set()


def resolve(path: Any) -> Any:
    """`path` as a path object: pathlib's, or etils' for a remote one.

    A relative path is looked for from the working directory, then from the repository's root, so
    that recipes can name the files that come with the repository. One that is in neither place
    comes back relative to the working directory.
    """
    if "://" in str(path):
        from etils import epath  # remote file systems only: most runs never need it

        return epath.Path(path)
    local = Path(path).expanduser()
    if not local.is_absolute() and not local.exists() and (_REPOSITORY / local).exists():
        return _REPOSITORY / local
    return local


def files_for_split(path: Any, split: str, endings: tuple[str, ...] = RECORDS) -> list[Any]:
    """The data files of `split` under `path`, sorted by name; in folders those of `endings`.

    `path`: a mapping split -> path; a template with `{split}`; a glob; one file, which then
    serves every split (a warning says so); or a folder of `SPLIT*.jsonl|json|parquet`, compressed
    or not, or of folders named by split. `valid`, `val` and `dev` are other names for `validation`.
    Raises DataError with what was looked for, where, and what was found.
    """
    files, shared = _find(path, split, endings)
    if shared and split != "train" and (str(path), split) not in _warned:
        _warned.add((str(path), split))
        _log.warning("%s serves every split: split %r reads the same records", path, split)
    return files


def all_files(path: Any, split: str, endings: tuple[str, ...]) -> list[Any]:
    """The files to read for `split` of a corpus whose records name their splits themselves.

    A mapping or a template is looked up for the split; of anything else all files serve it.
    """
    if isinstance(path, Mapping) or path is None or "{split}" in str(path):
        return files_for_split(path, split, endings)
    return _expand(path, None, split, endings)[0]


def splits_of(path: Any, endings: tuple[str, ...] = RECORDS) -> list[str]:
    """The splits that `path` has files for, in the order of SPLITS; possibly none."""
    return splits_with(lambda split: _find(path, split, endings))


def splits_with(find: Callable[[str], Any]) -> list[str]:
    """The splits that `find` finds, in the order of SPLITS: for the others it raises DataError."""
    splits = []
    for split in SPLITS:
        try:
            find(split)
        except DataError:
            continue
        splits.append(split)
    return splits


def _find(path: Any, split: str, endings: tuple[str, ...]) -> tuple[list[Any], bool]:
    """(files of `split`, whether they serve every split)."""
    names = split_names(split)
    if isinstance(path, Mapping):
        for name in names:
            if name in path:
                return _expand(path[name], None, split, endings)[0], False
        raise DataError.at(
            dict(path),
            None,
            f"no path for split {split!r}",
            got=f"the splits {sorted(path)}",
            expected=f"one of {list(names)}",
            remedy="Add the split's path, or ask for another split.",
        )
    if path is None or not str(path):
        raise DataError.at(
            "data path",
            None,
            "the path is not set",
            got=repr(path),
            expected="a file, a folder, a glob or a mapping from split to these",
            remedy="Set it.",
            setting=("SODA_PATH", "PROSOCIAL_PATH"),
        )
    if "{split}" in str(path):
        for name in names:
            candidate = str(path).replace("{split}", name)
            place = resolve(candidate)
            if place.is_dir():
                found = _data_files(place, endings)
            elif place.exists():
                found = [place]
            else:
                found = _glob(candidate) if _is_glob(candidate) else []
            if found:
                return _one_format(found, path, endings), False
        raise _nothing(
            path, split, endings, f"{[str(path).replace('{split}', name) for name in names]}"
        )
    return _expand(path, names, split, endings)


def split_names(split: str) -> tuple[str, ...]:
    """The names that a split goes by: `valid`, `val` and `dev` are `validation` too."""
    return _VALIDATION if split in _VALIDATION else (split,)


def _expand(
    path: Any, names: tuple[str, ...] | None, split: str, endings: tuple[str, ...]
) -> tuple[list[Any], bool]:
    """(files of `path`, whether they serve every split).

    `names` are the names of the split, or None when every file of `path` belongs to it.
    """
    if _is_glob(str(path)) and not resolve(path).exists():
        found = _glob(str(path))
        if not found:
            raise _nothing(path, split, endings, "nothing that the glob matches")
        files, shared = _of_split(found, names, path, split, endings)
        return _one_format(files, path, endings), shared
    place = resolve(path)
    if place.is_dir():
        for name in names or ():
            if (place / name).is_dir() and (inside := _data_files(place / name, endings)):
                return _one_format(inside, path, endings), False
        found = _data_files(place, endings)
        chosen = found if names is None else _named(found, names)
        if not chosen:
            listed = sorted(child.name for child in place.iterdir())
            raise _nothing(
                path, split, endings, f"the folder {place} with {listed[:20] or 'nothing in it'}"
            )
        return _one_format(chosen, path, endings), False
    if place.exists():
        return [place], names is not None
    raise _nothing(path, split, endings, _looked_at(path))


def _of_split(
    found: list[Any], names: tuple[str, ...] | None, path: Any, split: str, endings: tuple[str, ...]
) -> tuple[list[Any], bool]:
    """Of a glob's files those named after the split; all of them when no name tells a split."""
    if names is None:
        return found, False
    every_name = ("train", "test", *_VALIDATION)
    if not _named(found, every_name):
        return found, True
    chosen = _named(found, names)
    if not chosen:
        raise _nothing(
            path, split, endings, f"a glob that matches {[file.name for file in found][:20]}"
        )
    return chosen, False


def _named(files: list[Any], names: tuple[str, ...]) -> list[Any]:
    # "train-00000-of-00002" is of split train, "training" would be something else.
    pattern = re.compile(rf"(?:{'|'.join(names)})(?![A-Za-z])")
    return [file for file in files if pattern.match(file.name)]


def _data_files(folder: Any, endings: tuple[str, ...]) -> list[Any]:
    files = (child for child in folder.iterdir() if _data_name(endings).match(child.name))
    return sorted((f for f in files if not f.name.startswith(".")), key=lambda f: f.name)


@functools.cache
def _data_name(endings: tuple[str, ...]) -> re.Pattern[str]:
    packed = "|".join(ENDINGS)
    return re.compile(rf"(?P<stem>.+?)\.({'|'.join(endings)})(\.({packed}))?$")


def _one_format(files: list[Any], path: Any, endings: tuple[str, ...]) -> list[Any]:
    """`files`, unless one of them is there twice: `train.jsonl` beside `train.parquet`."""
    seen: dict[str, str] = {}
    for file in files:
        match = _data_name(endings).match(file.name)
        stem = str(file.parent / (match["stem"] if match else file.name))
        if stem in seen:
            raise DataError.at(
                path,
                None,
                "the same data in two formats",
                got=f"{seen[stem]} and {file.name}",
                expected="one file for each part of the data",
                remedy="Remove one of the two, or give the path as a glob that matches only one.",
            )
        seen[stem] = file.name
    return files


def _is_glob(path: str) -> bool:
    return any(character in path for character in "*?[")


def _glob(pattern: str) -> list[Any]:
    """Files (not folders) matching `pattern`, sorted."""
    anchor, _, rest = pattern.rpartition("://")
    parts = rest.split("/")
    first = next(i for i, part in enumerate(parts) if _is_glob(part))
    base_text = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")
    base = resolve(f"{anchor}://{base_text}" if anchor else base_text)
    found = _matches(base, "/".join(parts[first:]))
    relative = not anchor and not Path(base_text).expanduser().is_absolute()
    if not found and relative:
        found = _matches(_REPOSITORY / base_text, "/".join(parts[first:]))
    return found


def _matches(base: Any, pattern: str) -> list[Any]:
    return sorted((f for f in base.glob(pattern) if f.is_file()), key=str) if base.exists() else []


def _looked_at(path: Any) -> str:
    if "://" in str(path) or Path(path).expanduser().is_absolute():
        return "nothing there"
    return f"nothing at {Path.cwd() / path} nor at {_REPOSITORY / path}"


def _nothing(path: Any, split: str, endings: tuple[str, ...], found: str) -> DataError:
    names = split_names(split)
    return DataError.at(
        path,
        None,
        f"no data for split {split!r}",
        got=found,
        expected="a file, or a folder with files named "
        + ", ".join(f"{name}*.{endings[0]}" for name in names)
        + f" ({'or .' + ', .'.join(endings[1:]) + ', ' if endings[1:] else ''}each plain or "
        f"compressed: .{', .'.join(ENDINGS)})",
        remedy="Download the corpus or correct the path.",
        setting=("SODA_PATH", "PROSOCIAL_PATH"),
    )
