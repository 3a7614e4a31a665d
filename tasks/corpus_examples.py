"""The examples of a whole split of a corpus: readers and formatting joined."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cosmo.tasks import casual, norms
from cosmo.tasks.files import SPLITS, TABLES, all_files, files_for_split, splits_of, splits_with
from cosmo.tasks.formatting import Example, soda_examples
from cosmo.tasks.prosocial import prosocial_examples
from cosmo.tasks.readers import read_prosocial, read_soda
from cosmo.tasks.safety import Kind, LabelStyle, canary_examples, lacks_rots

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Where a task's examples come from.

    `examples(split)` reads them, `files(split)` raises DataError where there are none to read,
    `splits()` are the splits there are files for; none of the three is called before it is needed.
    """

    examples: Callable[[str], Iterator[Example]]
    files: Callable[[str], Sequence[Any]]
    splits: Callable[[], Sequence[str]]


def soda_file_examples(path: Any, split: str) -> Iterator[Example]:
    """The examples of a split of SODA, in file order. Raises DataError as `read_soda` does."""
    for dialogue in read_soda(path, split):
        yield from soda_examples(dialogue)


def prosocial_file_examples(path: Any, split: str, seed: int = 0) -> Iterator[Example]:
    """The examples of a split of ProsocialDialog, in file order; `seed` is of the drawn names.

    Raises DataError as `read_prosocial` does.
    """
    for dialogue in read_prosocial(path, split):
        yield from prosocial_examples(dialogue, seed)


def canary_file_examples(
    path: Any,
    split: str,
    kind: Kind = "prosocial",
    style: LabelStyle = "text",
    missing_rots: str = "skip",
) -> Iterator[Example]:
    """Canary's examples of a split of ProsocialDialog, in file order; see `canary_examples`.

    Of `kind` "prosocial" an exchange whose label needs rules of thumb and has none raises
    DataError with `missing_rots` "error", and is left out with "skip": the published RoTs and
    labels are from different people, so that one can be there without the other. A warning then
    tells how many, and names the first.
    """
    skipped, first = 0, ""
    for dialogue in read_prosocial(path, split):
        yield from canary_examples(dialogue, kind, style, strict=missing_rots == "error")
        for turn in dialogue.turns if kind == "prosocial" else ():
            if lacks_rots(turn):
                skipped += 1
                first = first or (f"{turn.place.file}:{turn.place.line}" if turn.place else "")
    if skipped:
        _log.warning(
            "%s: split %r: %d exchanges are not used: their label needs rules of thumb, and field "
            "'rots' is null or empty (the first: %s; gin: MISSING_ROTS)",
            path,
            split,
            skipped,
            first,
        )


def casual_file_examples(
    read: Callable[[Any, str], Iterator[casual.CasualDialogue]],
    path: Any,
    split: str,
    style: LabelStyle = "text",
) -> Iterator[Example]:
    """The casual examples of a split of the corpus that `read` reads, in file order."""
    for dialogue in read(path, split):
        yield from casual.casual_examples(dialogue, style)


def soda(path: Any) -> Corpus:
    """SODA under `path`, for Cosmo."""
    return _by_split(path, functools.partial(soda_file_examples, path))


def prosocial(path: Any, seed: int) -> Corpus:
    """ProsocialDialog under `path`, for Cosmo; `seed` is of the drawn names."""
    return _by_split(path, functools.partial(prosocial_file_examples, path, seed=seed))


def canary(path: Any, kind: Kind, style: LabelStyle, missing_rots: str) -> Corpus:
    """ProsocialDialog under `path`, for Canary."""
    settings = {"kind": kind, "style": style, "missing_rots": missing_rots}
    return _by_split(path, functools.partial(canary_file_examples, path, **settings))


def dailydialog(path: Any, style: LabelStyle) -> Corpus:
    """DailyDialog under `path`."""
    files = functools.partial(casual.dailydialog_files, path)
    read = functools.partial(casual_file_examples, casual.read_dailydialog, path, style=style)
    return Corpus(read, files, functools.partial(splits_with, files))


def empathetic(path: Any, style: LabelStyle) -> Corpus:
    """EmpatheticDialogues under `path`."""
    read = functools.partial(casual_file_examples, casual.read_empathetic, path, style=style)
    return _by_split(path, read, TABLES)


def blended(path: Any, style: LabelStyle) -> Corpus:
    """BlendedSkillTalk under `path`."""
    read = functools.partial(casual_file_examples, casual.read_blended, path, style=style)
    return _by_split(path, read)


def social_chemistry(path: Any) -> Corpus:
    """Social Chemistry 101 under `path`."""
    return _by_column(path, functools.partial(norms.social_chemistry_examples, path))


def mic(path: Any) -> Corpus:
    """MIC under `path`."""
    return _by_column(path, functools.partial(norms.mic_examples, path))


def norm_bank(path: Any, task: str) -> Corpus:
    """One task of the Commonsense Norm Bank under `path`."""
    files = functools.partial(norms.norm_bank_files, path, task)
    read = functools.partial(norms.norm_bank_examples, path, task)
    return Corpus(read, files, functools.partial(splits_with, files))


def _by_split(path: Any, examples: Callable[[str], Iterator[Example]], *endings: Any) -> Corpus:
    """A corpus with files of their own for each split."""
    files = functools.partial(files_for_split, path)
    return Corpus(
        examples,
        lambda split: files(split, *endings),
        lambda: splits_of(path, *endings),
    )


def _by_column(path: Any, examples: Callable[[str], Iterator[Example]]) -> Corpus:
    """A corpus whose records name their splits."""
    return Corpus(examples, lambda split: all_files(path, split, TABLES), lambda: SPLITS)
