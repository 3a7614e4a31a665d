"""Name the tasks, and give each its corpus, its metrics and the mixture it is in.

Three families: Cosmo's (dialogue responses), Canary's (safety labels and rules of thumb) and
Prost's (responses after rules of thumb). `cosmo.tasks.mixtures.use` registers one at a time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cosmo.engine.base.errors import DataError
from cosmo.tasks import casual, conversations, goemotions, metrics, norms, sbic, toxichat
from cosmo.tasks import prost_corpora as prost
from cosmo.tasks.files import (
    RECORDS,
    SPLITS,
    TABLES,
    all_files,
    files_for_split,
    splits_of,
    splits_with,
)
from cosmo.tasks.formatting import Example, soda_examples
from cosmo.tasks.norms import NORM_BANK
from cosmo.tasks.prosocial import prosocial_examples
from cosmo.tasks.prost_text import VARIANTS, ProstExample, Variant
from cosmo.tasks.readers import read_prosocial, read_soda
from cosmo.tasks.safety import KINDS, STYLES, Kind, LabelStyle, canary_examples, lacks_rots

_log = logging.getLogger(__name__)

MISSING_ROTS = ("skip", "error")

# Mixture -> task -> rate.
MIXTURES: dict[str, dict[str, float]] = {
    # Published sizes of the training splits, in examples. SODA has 1,191,582 dialogues of 7.6
    # utterances on average, every one but the first a target; ProsocialDialog has 120,236
    # responses. These rates read every example equally often, as if the corpora were concatenated.
    "cosmo": {"soda": 1_191_582 * (7.6 - 1), "prosocial_dialog": 120_236.0},
    # Four examples of ProsocialDialog to one of each casual corpus.
    "canary": {
        "canary_prosocial": 4.0,
        "canary_dailydialog": 1.0,
        "canary_empathetic": 1.0,
        "canary_blended": 1.0,
    },
    # Published numbers of instances, of all splits together: the datasheet has no others.
    "norm_bank": {
        "norm_bank_free_form": 1_136_568.0,
        "norm_bank_yes_no": 477_514.0,
        "norm_bank_relative": 28_296.0,
    },
    # Baheti et al. 2021 train on both. Training examples: utterances of ToxiChat, posts of SBIC.
    "offense": {toxichat.OFFENSE: 6_070.0, "sbic_offense": 35_504.0},
    # Kim et al. 2022, appendix B.3: 9:3:3:3:3:3:1, here by examples. ParlAI's draw episodes,
    # whose examples in training number 2.84, 3.92, 10.9, 7.35, 4.02, 1.65 and 5.61 on average.
    # Topical-Chat has no teacher there: its 21.8 utterances a dialogue are of two sides. The rates
    # by episodes: MIXTURE_RATES = {'prost_prosocial': 25.6, 'prost_dailydialog': 11.8,
    # 'prost_topical_chat': 32.7, 'prost_persona_chat': 22.1, 'prost_wizard': 12.1,
    # 'prost_empathetic': 5.0, 'prost_blended': 5.6}.
    "prost": {
        "prost_prosocial": 9.0,
        "prost_dailydialog": 3.0,
        "prost_topical_chat": 3.0,
        "prost_persona_chat": 3.0,
        "prost_wizard": 3.0,
        "prost_empathetic": 3.0,
        "prost_blended": 1.0,
    },
}
# Without metrics of likelihoods: `mixtures.use` adds these to every task.
_RESPONSE = (metrics.f1, metrics.bleu4, metrics.distinct, metrics.response_length)
# A norm has one right text, so diversity and length measure nothing.
_TEXT = (metrics.f1, metrics.bleu4)
# The target is a label alone.
_LABEL = (metrics.label_accuracy,)
_WORD = (metrics.word_accuracy,)

# Family: task -> the metrics of its texts.
COSMO: dict[str, tuple[Callable[..., Any], ...]] = {
    "soda": _RESPONSE,
    "prosocial_dialog": _RESPONSE,
}
CANARY: dict[str, tuple[Callable[..., Any], ...]] = {
    "canary_prosocial": (metrics.label_accuracy, metrics.rot_overlap),
    "canary_safety": _LABEL,
    "canary_rot": _TEXT,
    "canary_dailydialog": _LABEL,
    "canary_empathetic": _LABEL,
    "canary_blended": _LABEL,
    "social_chemistry": _TEXT,
    "mic": _TEXT,
    **{f"norm_bank_{task}": _TEXT for task in NORM_BANK},
    toxichat.STANCE: _WORD,
    toxichat.OFFENSE: _WORD,
    "sbic_offense": _WORD,
    goemotions.TASK: _WORD,
}
PROST: dict[str, tuple[Callable[..., Any], ...]] = dict.fromkeys(MIXTURES["prost"], _RESPONSE)
COSMO_NAMES = (*COSMO, "cosmo")
CANARY_NAMES = (*CANARY, "canary", "norm_bank", "offense")
PROST_NAMES = (*PROST, "prost")
NAMES = (*COSMO_NAMES, *CANARY_NAMES, *PROST_NAMES)
# Tasks and mixtures whose targets begin with a safety label. Canary refuses checkpoints of others,
# because their labels would mean nothing.
LABEL_NAMES = (*(name for name in CANARY if metrics.label_accuracy in CANARY[name]), "canary")


@dataclass(frozen=True)
class Corpus:
    """The source of a task's examples.

    `examples(split)` yields them, `files(split)` raises DataError if there are none to read, and
    `splits()` returns the splits that have files.
    """

    # Functions, because naming a task must not touch its data: that may be on a bucket, or nowhere.

    examples: Callable[[str], Iterator[Example | ProstExample]]
    files: Callable[[str], Sequence[Any]]
    splits: Callable[[], Sequence[str]]


def soda_file_examples(path: Any, split: str) -> Iterator[Example]:
    """Yield the examples of a split of SODA, in file order. Raises DataError, see `read_soda`."""
    for dialogue in read_soda(path, split):
        yield from soda_examples(dialogue)


def prosocial_file_examples(path: Any, split: str, seed: int = 0) -> Iterator[Example]:
    """Yield Cosmo's examples of a split of ProsocialDialog, in file order.

    `seed` is of the drawn names. Raises DataError, see `read_prosocial`.
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
    """Yield Canary's examples of a split of ProsocialDialog, in file order.

    See `canary_examples` for `kind` and `style`. With `missing_rots` "error", an exchange whose
    label needs rules of thumb and has none raises DataError. With "skip" it is left out, and a
    warning counts these and names the first.
    """
    # "skip" exists because the published RoTs and labels are from different people: an exchange can
    # have one without the other.
    skipped, first = 0, ""
    for dialogue in read_prosocial(path, split):
        yield from canary_examples(dialogue, kind, style, strict=missing_rots == "error")
        # The other kinds need no rules of thumb, or give no example without them.
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
    read: Callable[[Any, str], Iterator[conversations.Conversation]],
    path: Any,
    split: str,
    style: LabelStyle = "text",
) -> Iterator[Example]:
    """Yield the casual examples of a split of the corpus that `read` reads, in file order."""
    for dialogue in read(path, split):
        yield from casual.casual_examples(dialogue, style)


@dataclass(frozen=True)
class CanaryData:
    """The paths of the corpora of Canary's tasks, beside ProsocialDialog, and the form of labels.

    Paths are as in `cosmo.tasks.files.files_for_split`; `norm_bank_path` is as in
    `cosmo.tasks.norms.norm_bank_files`. `label_style` is "text" (`__casual__`) or "sentinel"
    (`<extra_id_95>`). `missing_rots` ("skip" or "error") is for an exchange whose label needs rules
    of thumb and that has none: see `canary_file_examples`. Raises DataError for another word.
    """

    dailydialog_path: Any = "data/dailydialog"
    empathetic_path: Any = "data/empathetic_dialogues"
    blended_path: Any = "data/blended_skill_talk"
    social_chemistry_path: Any = "data/social_chemistry"
    mic_path: Any = "data/mic"
    norm_bank_path: Any = "data/norm_bank"
    toxichat_path: Any = "data/toxichat"
    sbic_path: Any = "data/sbic"
    goemotions_path: Any = "data/goemotions"
    label_style: LabelStyle = "text"
    missing_rots: str = "skip"

    def __post_init__(self) -> None:
        for name, known in (("label_style", STYLES), ("missing_rots", MISSING_ROTS)):
            # Now, because a wrong word would else show only at the first record that needs it.
            value = getattr(self, name)
            if value not in known:
                raise DataError(f"{name}={value!r}: expected one of {known}", setting=name.upper())


@dataclass(frozen=True)
class ProstData:
    """The paths of the corpora of Prost's tasks, beside ProsocialDialog, and the form of targets.

    Paths are as in `cosmo.tasks.files.files_for_split`, or a publisher's folder. `variant` is
    "rot_and_response" or "response_only", see `cosmo.tasks.prost_text`. Raises DataError for
    another word.
    """

    dailydialog_path: Any = "data/dailydialog"
    topical_chat_path: Any = "data/topical_chat"
    persona_chat_path: Any = "data/persona_chat"
    wizard_path: Any = "data/wizard_of_wikipedia"
    empathetic_path: Any = "data/empathetic_dialogues"
    blended_path: Any = "data/blended_skill_talk"
    variant: Variant = "rot_and_response"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise DataError(
                f"variant={self.variant!r}: expected one of {VARIANTS}", setting="PROST_VARIANT"
            )


def cosmo_corpora(soda_path: Any, prosocial_path: Any, seed: int) -> dict[str, Corpus]:
    """Return the corpora of Cosmo's tasks; `seed` is of the names drawn for ProsocialDialog."""
    return {
        "soda": _by_split(soda_file_examples, soda_path),
        "prosocial_dialog": _by_split(prosocial_file_examples, prosocial_path, seed=seed),
    }


def canary_corpora(prosocial_path: Any, data: CanaryData) -> dict[str, Corpus]:
    """Return the corpora of Canary's tasks."""
    style, missing = data.label_style, data.missing_rots
    readers = (
        conversations.read_dailydialog,
        conversations.read_empathetic,
        conversations.read_blended,
    )
    dailydialog, empathetic, blended = (
        functools.partial(casual_file_examples, read) for read in readers
    )
    daily_files = functools.partial(conversations.dailydialog_files, data.dailydialog_path)
    return {
        **{
            f"canary_{kind}": _by_split(
                canary_file_examples, prosocial_path, kind=kind, style=style, missing_rots=missing
            )
            for kind in KINDS
        },
        "canary_dailydialog": _by_files(
            functools.partial(dailydialog, data.dailydialog_path, style=style), daily_files
        ),
        "canary_empathetic": _by_split(empathetic, data.empathetic_path, TABLES, style=style),
        "canary_blended": _by_split(blended, data.blended_path, style=style),
        "social_chemistry": _by_column(norms.social_chemistry_examples, data.social_chemistry_path),
        "mic": _by_column(norms.mic_examples, data.mic_path),
        **{
            f"norm_bank_{task}": _by_files(
                functools.partial(norms.norm_bank_examples, data.norm_bank_path, task),
                functools.partial(norms.norm_bank_files, data.norm_bank_path, task),
            )
            for task in NORM_BANK
        },
        toxichat.STANCE: _by_split(toxichat.stance_examples, data.toxichat_path),
        toxichat.OFFENSE: _by_split(toxichat.offense_examples, data.toxichat_path),
        "sbic_offense": _by_files(
            functools.partial(sbic.offense_examples, data.sbic_path),
            functools.partial(sbic.sbic_files, data.sbic_path),
        ),
        goemotions.TASK: _by_split(goemotions.goemotions_examples, data.goemotions_path, TABLES),
    }


def prost_corpora(prosocial_path: Any, data: ProstData) -> dict[str, Corpus]:
    """Return the corpora of Prost's tasks. A missing one is named with its publisher's page."""
    # Task -> how its examples are read, its path, and how the files of a split are found.
    read: dict[str, tuple[Callable[..., Iterator[ProstExample]], Any, Callable[..., Any]]] = {
        "prost_prosocial": (prost.prosocial_examples, prosocial_path, files_for_split),
        "prost_dailydialog": (
            prost.dailydialog_examples,
            data.dailydialog_path,
            conversations.dailydialog_files,
        ),
        "prost_topical_chat": (
            prost.topical_chat_examples,
            data.topical_chat_path,
            conversations.topical_chat_files,
        ),
        "prost_persona_chat": (
            prost.persona_chat_examples,
            data.persona_chat_path,
            conversations.persona_chat_files,
        ),
        "prost_wizard": (prost.wizard_examples, data.wizard_path, conversations.wizard_files),
        "prost_empathetic": (
            prost.empathetic_examples,
            data.empathetic_path,
            functools.partial(files_for_split, endings=TABLES),
        ),
        "prost_blended": (prost.blended_examples, data.blended_path, files_for_split),
    }
    return {
        task: _by_files(
            functools.partial(examples, path), functools.partial(_prost_files, task, files, path)
        )
        for task, (examples, path, files) in read.items()
    }


def _prost_files(
    task: str, files: Callable[[Any, str], Sequence[Any]], path: Any, split: str
) -> Sequence[Any]:
    """Return `files(path, split)`; its error names the corpus, its publisher and the setting."""
    try:
        return files(path, split)
    except DataError as error:
        corpus, home, setting = prost.SOURCES[task]
        text = f"{corpus}, published at {home}: {error.message}"
        raise DataError(text, setting=setting) from None


def _by_split(
    read: Callable[..., Iterator[Example]],
    path: Any,
    endings: tuple[str, ...] = RECORDS,
    **settings: Any,
) -> Corpus:
    """Return a corpus with files of its own for each split."""
    return Corpus(
        functools.partial(read, path, **settings),
        lambda split: files_for_split(path, split, endings),
        lambda: splits_of(path, endings),
    )


def _by_files(
    examples: Callable[[str], Iterator[Example]], files: Callable[[str], Sequence[Any]]
) -> Corpus:
    """Return a corpus with a rule of its own for the files of a split."""
    return Corpus(examples, files, lambda: splits_with(files))


def _by_column(read: Callable[..., Iterator[Example]], path: Any) -> Corpus:
    """Return a corpus whose records name their splits."""
    return Corpus(
        # Which splits there are is known from the records alone, so all are assumed.
        functools.partial(read, path),
        lambda split: all_files(path, split, TABLES),
        lambda: SPLITS,
    )


def mixtures_for(
    name: str, given: Mapping[str, float] | None, names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Return the mixtures among `names`: mixture -> task -> rate.

    `given` rates replace those of the mixture that `name` is, or is in. Raises DataError for rates
    of other tasks, below 0, or all 0.
    """
    mixtures = {key: dict(rates) for key, rates in MIXTURES.items() if key in names}
    # A task alone takes rates too, so that one set of settings serves it and its mixture.
    for key, rates in mixtures.items():
        if given and (name == key or name in rates):
            mixed = {**rates, **given}
            # A misspelt task would else train at its usual rate, without a sign of it.
            if set(mixed) != set(rates) or min(mixed.values()) < 0 or not sum(mixed.values()):
                raise DataError(
                    f"rates={mixed}: expected numbers from 0, not all 0, for {sorted(rates)}",
                    setting="MIXTURE_RATES",
                )
            mixtures[key] = mixed
    return mixtures
