"""Find the data files of a corpus: paths, splits and formats, local or remote.

`files_for_split` lists the forms of a path. Remote paths (`gs://...`) go through etils.epath.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cosmo.engine.base import files
from cosmo.engine.base.errors import DataError

SPLITS = ("train", "validation", "test")
_VALIDATION = ("validation", "valid", "val", "dev")
RECORDS = ("jsonl", "json", "ndjson", "parquet", "arrow")  # the endings of files of records
TABLES = ("csv", "tsv")
TEXTS = ("txt",)
_REPOSITORY = Path(__file__).resolve().parent.parent
_PATH_SETTINGS = ("SODA_PATH", "PROSOCIAL_PATH")
# Files that `datasets` writes beside the data in `save_to_disk`, in folders of the splits.
_ABOUT_DATA = ("dataset_dict.json", "dataset_info.json", "state.json")
MAX_NAMES_SHOWN = 20  # file names that an error lists

_log = logging.getLogger(__name__)
# (path, split) that had their warning, because each epoch asks for the files again.
_warned: set[tuple[str, str]] = set()


def resolve(path: Any) -> Any:
    """Return `path` as a path object: pathlib's, or etils' for a remote one.

    A relative path is looked for from the working directory, then from the repository's root. One
    that is in neither place comes back relative to the working directory.
    """
    place = files.resolve(path)
    # A remote path has no working directory, and a look at it costs a request.
    if "://" in str(place):
        return place
    place = place.expanduser()
    # The repository's root, so that recipes can name the files that come with the repository.
    if not place.is_absolute() and not place.exists() and (_REPOSITORY / place).exists():
        return _REPOSITORY / place
    return place


def files_for_split(path: Any, split: str, endings: tuple[str, ...] = RECORDS) -> list[Any]:
    """Return the data files of `split` under `path`, sorted by name; in folders those of `endings`.

    `path` is a mapping split -> path, a template with `{split}`, a glob, a folder or one file. A
    folder has `SPLIT*.jsonl|json|parquet|arrow`, compressed or not, or folders named by split. One
    file serves every split, and a warning names it.

    `valid`, `val` and `dev` are other names for `validation`. Raises DataError if there is no file.
    """
    found, shared = _find(path, split, endings)
    # Reading the training file for training is what the user meant.
    if shared and split != "train" and (str(path), split) not in _warned:
        _warned.add((str(path), split))
        _log.warning("%s serves every split: split %r reads the same records", path, split)
    return found


def split_file(
    path: Any,
    split: str,
    stems: tuple[str, ...],
    endings: tuple[str, ...] = RECORDS,
    folders: tuple[str, ...] = ("",),
) -> list[Any]:
    """Return the file of `split` in the folder `path` by a publisher's own name, or no file.

    `stems` are names without ending, the preferred one first; `folders` are folders inside `path`
    ("": itself). Both may hold `{split}`. The list is empty if `path` is no folder.
    """
    if not isinstance(path, str) and not hasattr(path, "is_dir"):
        return []
    place = resolve(path) if str(path) and "{split}" not in str(path) else None
    if place is None or not place.is_dir():
        return []
    for stem, name, folder in itertools.product(stems, split_names(split), folders):
        inside = place / folder.format(split=name) if folder else place
        if inside.is_dir():
            found = [
                file
                for file in _data_files(inside, endings)
                if _data_name(endings).match(file.name)["stem"] == stem.format(split=name)
            ]
            if found:
                return _one_format(found, path, endings)
    return []


def all_files(path: Any, split: str, endings: tuple[str, ...]) -> list[Any]:
    """Return the files to read for `split` of a corpus whose records name their splits themselves.

    A mapping or a template is looked up for the split. All files of another path serve each split.
    """
    if isinstance(path, Mapping) or path is None or "{split}" in str(path):
        return files_for_split(path, split, endings)
    return _all(path, split, endings)


def splits_of(path: Any, endings: tuple[str, ...] = RECORDS) -> list[str]:
    """Return the splits that `path` has files for, in the order of SPLITS; possibly none."""
    # Not files_for_split, because a question is no reason for its warning.
    return splits_with(lambda split: _find(path, split, endings))


def splits_with(find: Callable[[str], Any]) -> list[str]:
    """Return the splits for which `find` raises no DataError, in the order of SPLITS."""
    splits = []
    for split in SPLITS:
        try:
            find(split)
        except DataError:
            continue
        splits.append(split)
    return splits


def split_names(split: str) -> tuple[str, ...]:
    """Return all names of a split: `valid`, `val` and `dev` are `validation` too."""
    return _VALIDATION if split in _VALIDATION else (split,)


def _find(path: Any, split: str, endings: tuple[str, ...]) -> tuple[list[Any], bool]:
    """Return (the files of `split`, whether they serve every split). Raise DataError."""
    names = split_names(split)
    if isinstance(path, Mapping):
        given = [path[name] for name in names if name in path]
        if not given:
            raise DataError.at(
                dict(path),
                None,
                f"no path for split {split!r}",
                got=f"the splits {sorted(path)}",
                expected=f"one of {list(names)}",
                remedy="Add the split's path, or ask for another split.",
            )
        return _all(given[0], split, endings), False
    # An empty setting of gin is "", an unset one None.
    if path is None or not str(path):
        raise DataError.at(
            "data path",
            None,
            "the path is not set",
            got=repr(path),
            expected="a file, a folder, a glob or a mapping from split to these",
            remedy="Set it.",
            setting=_PATH_SETTINGS,
        )
    if "{split}" in str(path):
        tried = [str(path).replace("{split}", name) for name in names]
        # The first name with files counts, because a corpus has one name for a split.
        for candidate in tried:
            if found := _listed(candidate, endings):
                return _one_format(found, path, endings), False
        raise _nothing(path, split, endings, str(tried))
    place = resolve(path)
    if place.is_dir():
        # A folder of the split first: it may hold files that do not name their split.
        for name in names:
            if (place / name).is_dir() and (inside := _data_files(place / name, endings)):
                return _one_format(inside, path, endings), False
        named = _named(_data_files(place, endings), names)
        if not named:
            raise _nothing(path, split, endings)
        return _one_format(named, path, endings), False
    found = _listed(path, endings)
    if not found:
        raise _nothing(path, split, endings)
    # Names of a glob's files count only where at least one of them is a split's.
    if place.exists() or not _named(found, ("train", "test", *_VALIDATION)):
        return _one_format(found, path, endings), True
    named = _named(found, names)
    if not named:
        matched = [file.name for file in found][:MAX_NAMES_SHOWN]
        raise _nothing(path, split, endings, f"a glob that matches {matched}")
    return _one_format(named, path, endings), False


def _all(path: Any, split: str, endings: tuple[str, ...]) -> list[Any]:
    """Return all files of `path`. Raise DataError if there is none."""
    found = _listed(path, endings)
    if not found:
        raise _nothing(path, split, endings)
    return _one_format(found, path, endings)


def _listed(path: Any, endings: tuple[str, ...]) -> list[Any]:
    """Return the files of a folder or a glob, or the file itself; possibly none."""
    place = resolve(path)
    if place.is_dir():
        return _data_files(place, endings)
    if place.exists():  # before a glob, because a name may have its characters
        return [place]
    return _glob(str(path)) if _is_glob(path) else []


def _named(found: list[Any], names: tuple[str, ...]) -> list[Any]:
    # "train-00000-of-00002" is of split train, "training" would be something else.
    pattern = re.compile(rf"(?:{'|'.join(names)})(?![A-Za-z])", re.I)
    return [file for file in found if pattern.match(file.name)]


def _data_files(folder: Any, endings: tuple[str, ...]) -> list[Any]:
    # Sorted, because the ids of examples count records in the order of files' names.
    found = (child for child in folder.iterdir() if _data_name(endings).match(child.name))
    # Hidden files are partial downloads and macOS's copies (._train.jsonl).
    found = (f for f in found if not f.name.startswith(".") and f.name not in _ABOUT_DATA)
    return sorted(found, key=lambda f: f.name)


@functools.cache
def _data_name(endings: tuple[str, ...]) -> re.Pattern[str]:
    packed = "|".join(files.ENDINGS)
    return re.compile(rf"(?P<stem>.+?)\.({'|'.join(endings)})(\.({packed}))?$", re.I)


def _one_format(found: list[Any], path: Any, endings: tuple[str, ...]) -> list[Any]:
    """Return `found`. Raise DataError if a file is there twice: `train.jsonl`, `train.parquet`."""
    # Reading both would train twice on every record, without a sign of it.
    seen: dict[str, str] = {}
    for file in found:
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
    return found


def _is_glob(path: Any) -> bool:
    return re.search(r"[*?\[]", str(path)) is not None


def _glob(pattern: str) -> list[Any]:
    """Return the files (not folders) that match `pattern`, sorted."""
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    base = fixed[: fixed.rfind("/") + 1]
    # The repository's folder too where the working directory has one of the same name.
    for place in (files.resolve(base or "."), _REPOSITORY / base):
        if place.exists():
            found = [file for file in place.glob(pattern[len(base) :]) if file.is_file()]
            if found:
                return sorted(found, key=str)
    return []


def _nothing(path: Any, split: str, endings: tuple[str, ...], found: str = "") -> DataError:
    """Return the error for a path without files of `split`."""
    place = resolve(path)
    if not found and place.is_dir():
        # The names show whether the folder is the wrong one, or its files are named otherwise.
        names = sorted(child.name for child in place.iterdir())[:MAX_NAMES_SHOWN]
        found = f"the folder {place} with {names or 'nothing in it'}"
    elif not found and _is_glob(path):
        found = "nothing that the glob matches"
    elif not found:
        local = "://" not in str(path) and not place.is_absolute()
        places = dict.fromkeys(folder / path for folder in (Path.cwd(), _REPOSITORY) if local)
        found = f"nothing at {' nor at '.join(map(str, places))}" if places else ""
    others = f"or .{', .'.join(endings[1:])}, " if endings[1:] else ""
    return DataError.at(
        path,
        None,
        f"no data for split {split!r}",
        got=found or "nothing there",
        expected="a file, or a folder with files named "
        + ", ".join(f"{name}*.{endings[0]}" for name in split_names(split))
        + f" ({others}each plain or compressed: .{', .'.join(files.ENDINGS)})",
        remedy="Download the corpus or correct the path.",
        setting=_PATH_SETTINGS,
    )
