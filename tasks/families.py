"""The tasks by name, and for each its corpus, its metrics and the mixture it is in.

Two families: Cosmo's (dialogue responses) and Canary's (safety labels and rules of thumb), which
`cosmo.tasks.mixtures.use` registers one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cosmo.engine.base.errors import DataError
from cosmo.tasks import corpus_examples as corpora
from cosmo.tasks import metrics
from cosmo.tasks.corpus_examples import Corpus
from cosmo.tasks.norms import NORM_BANK
from cosmo.tasks.safety import KINDS, STYLES, LabelStyle

MISSING_ROTS = ("skip", "error")

# Mixture -> task -> rate.
#
# cosmo: published sizes of the training splits, in examples: SODA has 1,191,582 dialogues of 7.6
# utterances on average, every one but the first a target; ProsocialDialog has 120,236 responses.
# Mixing at these rates reads every example equally often.
# canary: four examples of ProsocialDialog to one of each casual corpus.
# norm_bank: the published numbers of instances (the datasheet has them for all splits together).
MIXTURES: dict[str, dict[str, float]] = {
    "cosmo": {"soda": 1_191_582 * (7.6 - 1), "prosocial_dialog": 120_236.0},
    "canary": {
        "canary_prosocial": 4.0,
        "canary_dailydialog": 1.0,
        "canary_empathetic": 1.0,
        "canary_blended": 1.0,
    },
    "norm_bank": {
        "norm_bank_free_form": 1_136_568.0,
        "norm_bank_yes_no": 477_514.0,
        "norm_bank_relative": 28_296.0,
    },
}
_RESPONSE = (metrics.f1, metrics.bleu4, metrics.distinct, metrics.response_length)
_TEXT = (metrics.f1, metrics.bleu4)
_LABEL = (metrics.label_accuracy,)

# Task -> the metrics of its texts, by family.
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
}
COSMO_NAMES = (*COSMO, "cosmo")
CANARY_NAMES = (*CANARY, "canary", "norm_bank")
NAMES = (*COSMO_NAMES, *CANARY_NAMES)
# Tasks and mixtures whose targets begin with a safety label.
LABEL_NAMES = (*(name for name in CANARY if metrics.label_accuracy in CANARY[name]), "canary")


@dataclass(frozen=True)
class CanaryData:
    """Where the corpora of Canary's tasks lie, beside ProsocialDialog, and how labels are written.

    Paths are as in `cosmo.tasks.files.files_for_split`; `norm_bank_path` as in
    `cosmo.tasks.norms.norm_bank_files`. `label_style` is "text" (`__casual__`) or "sentinel"
    (`<extra_id_95>`); `missing_rots` is what happens to an exchange whose label needs rules of
    thumb and that has none: "skip" (counted in a warning) or "error". Raises DataError for another
    word.
    """

    dailydialog_path: Any = "data/dailydialog"
    empathetic_path: Any = "data/empathetic_dialogues"
    blended_path: Any = "data/blended_skill_talk"
    social_chemistry_path: Any = "data/social_chemistry"
    mic_path: Any = "data/mic"
    norm_bank_path: Any = "data/norm_bank"
    label_style: LabelStyle = "text"
    missing_rots: str = "skip"

    def __post_init__(self) -> None:
        for name, known in (("label_style", STYLES), ("missing_rots", MISSING_ROTS)):
            value = getattr(self, name)
            if value not in known:
                raise DataError(f"{name}={value!r}: expected one of {known}", setting=name.upper())


def cosmo_corpora(soda_path: Any, prosocial_path: Any, seed: int) -> dict[str, Corpus]:
    """The corpora of Cosmo's tasks; `seed` is of the names drawn for ProsocialDialog."""
    return {
        "soda": corpora.soda(soda_path),
        "prosocial_dialog": corpora.prosocial(prosocial_path, seed),
    }


def canary_corpora(prosocial_path: Any, data: CanaryData) -> dict[str, Corpus]:
    """The corpora of Canary's tasks."""
    style = data.label_style
    return {
        **{
            f"canary_{kind}": corpora.canary(prosocial_path, kind, style, data.missing_rots)
            for kind in KINDS
        },
        "canary_dailydialog": corpora.dailydialog(data.dailydialog_path, style),
        "canary_empathetic": corpora.empathetic(data.empathetic_path, style),
        "canary_blended": corpora.blended(data.blended_path, style),
        "social_chemistry": corpora.social_chemistry(data.social_chemistry_path),
        "mic": corpora.mic(data.mic_path),
        **{f"norm_bank_{task}": corpora.norm_bank(data.norm_bank_path, task) for task in NORM_BANK},
    }


def mixtures_for(
    name: str, given: Mapping[str, float] | None, names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """The mixtures among `names`, `given` in place of rates of the mixture that `name` is or is in.

    Raises DataError for rates of other tasks, below 0, or all 0.
    """
    mixtures = {key: dict(rates) for key, rates in MIXTURES.items() if key in names}
    for key, rates in mixtures.items():
        if given and (name == key or name in rates):
            mixed = {**rates, **given}
            if set(mixed) != set(rates) or min(mixed.values()) < 0 or not sum(mixed.values()):
                raise DataError(
                    f"rates={mixed}: expected numbers from 0, not all 0, for {sorted(rates)}",
                    setting="MIXTURE_RATES",
                )
            mixtures[key] = mixed
    return mixtures
