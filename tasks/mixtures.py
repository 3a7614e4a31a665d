"""The front door to the SeqIO tasks: `use("cosmo", ...)` registers them for one set of settings.

Importing this module is cheap; calling `use` imports SeqIO and with it TensorFlow.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.errors import DataError
from tasks.formatting import Separators
from tasks.vocabularies import T5_VOCABULARY

NAMES = ("soda", "prosocial_dialog", "cosmo")

# Published sizes of the training splits, in examples: SODA has 1,191,582 dialogues of 7.6
# utterances on average, every one but the first a target; ProsocialDialog has 120,236 responses.
# Mixing at these rates reads every example equally often.
RATES = {"soda": 1_191_582 * (7.6 - 1), "prosocial_dialog": 120_236.0}
_SEPARATORS = Separators()


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
) -> str:
    """Registers the tasks `soda` and `prosocial_dialog` and the mixture `cosmo`; returns `name`.

    An earlier registration of the three is replaced, so a run is described by one call. The name
    of a task that somebody else registered with SeqIO is returned untouched. Data is not opened
    here: a path that does not exist is reported when its dataset is asked for.

    Args:
        name: the task or mixture wanted.
        soda_path, prosocial_path: see `tasks.files.files_for_split`.
        vocabulary_path: a SentencePiece model with T5's special ids.
        separators: a `Separators`, or its two texts (between parts, between turns).
        narrative_dropout, instruction_dropout: how often training leaves the part out, drawn
            independently for each example and epoch (Kim et al. 2023, section 4). Splits other
            than `train` always keep both.
        rates: the mixture's rate per task, by default RATES.
        source: `files`, or `tfds` for datasets that `tfds build` wrote to `tfds_data_dir`.
        token_metrics: whether to add perplexity and token accuracy, which need a model that
            returns token counts with its scores.
        seed: of the names drawn for ProsocialDialog; data from TFDS has its names already.
        shuffle_buffer_size: examples held to shuffle from.

    Raises:
        DataError: `name` is neither ours nor registered, the vocabulary cannot be used, or a
            setting has an impossible value.
    """
    if name not in NAMES:
        import seqio

        known = sorted({*NAMES, *seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
        if name in known:
            return name
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise DataError.at(
            "MIXTURE_OR_TASK_NAME",
            None,
            "no such task or mixture",
            got=repr(name),
            expected=f"one of {known}, perhaps {nearest!r}",
            remedy="Correct the name, or import the module that registers it first.",
        )
    if not isinstance(separators, Separators):
        separators = Separators(*separators)
    for key, value in (
        ("narrative_dropout", narrative_dropout),
        ("instruction_dropout", instruction_dropout),
    ):
        if not 0 <= value <= 1:
            raise DataError(
                f"{key}={value} is no probability: expected 0 to 1 (gin: {key.upper()})"
            )
    if source not in ("files", "tfds"):
        raise DataError(f"source={source!r}: expected 'files' or 'tfds' (gin: mixtures.use.source)")
    if source == "tfds" and not tfds_data_dir:
        raise DataError(
            "source='tfds' needs the folder of the datasets (gin: mixtures.use.tfds_data_dir)"
        )
    rates = {**RATES, **(rates or {})}
    if set(rates) != set(RATES) or min(rates.values()) < 0 or not sum(rates.values()):
        raise DataError(
            f"rates={rates}: expected numbers from 0, not all 0, for {sorted(RATES)} "
            "(gin: MIXTURE_RATES)"
        )

    from tasks import seqio_tasks

    seqio_tasks.register(
        sources=seqio_tasks.sources(source, soda_path, prosocial_path, tfds_data_dir, seed),
        vocabulary_path=vocabulary_path,
        separators=separators,
        narrative_dropout=narrative_dropout,
        instruction_dropout=instruction_dropout,
        rates=rates,
        token_metrics=token_metrics,
        shuffle_buffer_size=shuffle_buffer_size,
    )
    return name
