"""Register or check the tasks for one set of settings: `use("cosmo", ...)`.

Importing this module is cheap. Calling `use` imports SeqIO and with it TensorFlow.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from cosmo.engine.base.errors import DataError
from cosmo.tasks import families
from cosmo.tasks.families import NAMES, CanaryData, Corpus, ProstData
from cosmo.tasks.formatting import Separators
from cosmo.tasks.prost_text import check_variant
from cosmo.tasks.safety import check_labels
from cosmo.tasks.vocabularies import T5_VOCABULARY, load

_SEPARATORS = Separators()
_CANARY = CanaryData()
_PROST = ProstData()


def use(
    name: str,
    soda_path: Any = "data/soda",
    prosocial_path: Any = "data/prosocial_dialog",
    vocabulary_path: Any = T5_VOCABULARY,
    separators: Separators | Sequence[str] = _SEPARATORS,
    narrative_dropout: float = 0.3,
    instruction_dropout: float = 0.5,
    rates: Mapping[str, float] | None = None,
    source: str = "files",
    tfds_data_dir: Any = None,
    token_metrics: bool = True,
    seed: int = 0,
    shuffle_buffer_size: int = 20_000,
    canary: CanaryData = _CANARY,
    prost: ProstData = _PROST,
) -> str:
    """Register the family of tasks and mixtures that `name` is of, and return `name`.

    Cosmo's family: the tasks `soda` and `prosocial_dialog`, the mixture `cosmo` of them.

    Canary's family: `canary_prosocial` (label, then rules of thumb), `canary_safety` (label),
    `canary_rot` (rules of thumb), `canary_dailydialog`, `canary_empathetic`, `canary_blended` (all
    casual). `canary` is the mixture of the first and the last three. For pre-training there are
    `social_chemistry`, `mic`, `norm_bank_free_form`, `norm_bank_yes_no`, `norm_bank_relative`, and
    `norm_bank`, the mixture of the last three. `toxichat_stance` and `toxichat_offense` judge the
    last turn of a dialogue in a word, `sbic_offense` a post; `offense` is the mixture of the last
    two. `goemotions` names the emotion of a comment.

    Prost's family: `prost_prosocial`, `prost_dailydialog`, `prost_topical_chat`,
    `prost_persona_chat`, `prost_wizard`, `prost_empathetic`, `prost_blended`, and `prost`, the
    mixture of all.

    An earlier registration is replaced. The name of a task that another module registered with
    SeqIO is returned as it is. Data is not opened here: asking for a dataset raises the error of a
    missing path.

    Args:
        name: the task or mixture wanted.
        soda_path, prosocial_path: see `cosmo.tasks.files.files_for_split`.
        vocabulary_path: a SentencePiece model with T5's special ids; for Prost a byte-level BPE.
        separators: a `Separators`, or its two texts (between parts, between turns).
        narrative_dropout, instruction_dropout: the probability that training leaves the part out,
            drawn independently for each example and epoch (Kim et al. 2023, section 4). Splits
            other than `train` always keep both. Canary's and Prost's tasks have neither part.
        rates: rates of the tasks in the mixture that `name` is, or is in; the others keep those of
            `cosmo.tasks.families.MIXTURES`. A task of rate 0 is left out.
        source: `files`, or, for Cosmo's tasks, `tfds` for datasets that `tfds build` wrote to
            `tfds_data_dir`.
        token_metrics: whether to add perplexity and token accuracy, which need a model that
            returns token counts with its scores.
        seed: the seed of the names drawn for ProsocialDialog; TFDS data has its names already.
        shuffle_buffer_size: examples held to shuffle from.
        canary: where the other corpora of Canary's tasks are, and how labels are written.
        prost: where the other corpora of Prost's tasks are, and what its targets hold.

    Raises:
        DataError: `name` is neither ours nor registered, the vocabulary cannot be used, or a
            setting has an impossible value.
    """
    if name not in NAMES:
        import seqio

        # A module of the user's may have registered it: MIXTURE_OR_TASK_MODULE.
        registered = sorted({*NAMES, *seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
        if name in registered:
            return name
        raise _unknown(name, registered)
    if not isinstance(separators, Separators):
        separators = Separators(*separators)
    settings = (soda_path, prosocial_path, vocabulary_path, narrative_dropout, instruction_dropout)
    corpora, mixtures = _checked(name, *settings, rates, source, tfds_data_dir, seed, canary, prost)
    for_canary = name in families.CANARY_NAMES

    # Imported here, because it loads SeqIO and TensorFlow (20 to 27 s the first time on 2 cores),
    # which chat and export never need.
    if name in families.PROST_NAMES:
        from cosmo.tasks import prost_seqio

        prost_seqio.register(
            corpora=corpora,
            mixtures=mixtures,
            text_metrics=families.PROST,
            vocabulary_path=vocabulary_path,
            variant=prost.variant,
            token_metrics=token_metrics,
            shuffle_buffer_size=shuffle_buffer_size,
        )
        return name
    from cosmo.tasks import seqio_tasks

    seqio_tasks.register(
        sources={
            task: seqio_tasks.tfds_source(task, tfds_data_dir)
            if source == "tfds"
            else seqio_tasks.FilesSource(corpus)
            for task, corpus in corpora.items()
        },
        mixtures=mixtures,
        text_metrics=families.CANARY if for_canary else families.COSMO,
        vocabulary_path=vocabulary_path,
        separators=separators,
        narrative_dropout=narrative_dropout,
        instruction_dropout=instruction_dropout,
        token_metrics=token_metrics,
        shuffle_buffer_size=shuffle_buffer_size,
    )
    return name


def check(splits: Sequence[str], name: str, **settings: Any) -> None:
    """Raise DataError for settings with which `use(name, **settings)`, or reading, would fail.

    The files of each of `splits` must exist. Only the vocabulary is read, and TensorFlow is not
    loaded: so a mistake is found before anything is compiled.
    """
    if name not in NAMES:
        raise _unknown(name, sorted(NAMES))
    # The signature of `use`, so that an unknown or missing setting fails here as there.
    bound = inspect.signature(use).bind(name, **settings)
    bound.apply_defaults()
    given = bound.arguments
    corpora, mixtures = _checked(**given)
    if given["source"] == "tfds":  # TFDS looks for its files itself
        return
    rates = mixtures.get(name, {name: 1.0})
    wanted = [corpora[task] for task, rate in rates.items() if rate]
    for split in splits:
        # Training reads every task; an evaluation those that have its split.
        having = wanted if split == "train" else [c for c in wanted if split in c.splits()]
        known = sorted({known for corpus in wanted for known in corpus.splits()})
        if not having and known:
            raise DataError(f"no task of {name!r} has a split {split!r}; there are {known}")
        # Without any file, the first task's error explains what to do.
        for corpus in having or wanted[:1]:
            corpus.files(split)


def _unknown(name: str, known: Sequence[str]) -> DataError:
    # cutoff=0.0, so that there is a suggestion for any name.
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return DataError.at(
        "MIXTURE_OR_TASK_NAME",
        None,
        "no such task or mixture",
        got=repr(name),
        expected=f"one of {list(known)}, perhaps {nearest!r}",
        remedy="Correct the name, or import the module that registers it first.",
    )


def _checked(
    name: str,
    soda_path: Any,
    prosocial_path: Any,
    vocabulary_path: Any,
    narrative_dropout: float,
    instruction_dropout: float,
    rates: Mapping[str, float] | None,
    source: str,
    tfds_data_dir: Any,
    seed: int,
    canary: CanaryData,
    prost: ProstData,
    **others: Any,
) -> tuple[dict[str, Corpus], dict[str, dict[str, float]]]:
    """Return (the family's corpora by task, its mixtures). Raise DataError for a bad setting.

    `others` are the settings of `use` that any value serves.
    """
    # A probability that is out of range, or NaN, would drop all or nothing without a sign.
    for key, value in (
        ("narrative_dropout", narrative_dropout),
        ("instruction_dropout", instruction_dropout),
    ):
        if not 0 <= value <= 1:
            raise DataError(
                f"{key}={value} is no probability: expected 0 to 1", setting=key.upper()
            )
    if source not in ("files", "tfds"):
        raise DataError(
            f"source={source!r}: expected 'files' or 'tfds'", setting="mixtures.use.source"
        )
    if source == "tfds" and not tfds_data_dir:
        raise DataError(
            "source='tfds' needs the folder of the datasets", setting="mixtures.use.tfds_data_dir"
        )
    # TFDS builders exist for Cosmo's corpora alone.
    if source == "tfds" and name not in families.COSMO_NAMES:
        raise DataError(
            f"source='tfds' serves {sorted(families.COSMO)}, not {name!r}: expected 'files'",
            setting="mixtures.use.source",
        )
    every = (families.COSMO_NAMES, families.CANARY_NAMES, families.PROST_NAMES)
    names = next(family for family in every if name in family)
    # The whole family's, because `use` registers all of it.
    mixtures = families.mixtures_for(name, rates, names)
    # Vocabularies are checked now: one without the labels' or marks' pieces would show only in
    # trained answers.
    if names is families.CANARY_NAMES:
        check_labels(load(vocabulary_path), canary.label_style)
        corpora = families.canary_corpora(prosocial_path, canary)
    elif names is families.PROST_NAMES:
        check_variant(prost.variant, load(vocabulary_path))
        corpora = families.prost_corpora(prosocial_path, prost)
    else:
        corpora = families.cosmo_corpora(soda_path, prosocial_path, seed)
    return corpora, mixtures
