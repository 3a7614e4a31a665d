"""Label a file of dialogues of any size: the job of `python -m canary label`."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from canary.module import Canary, Chirp, Settings
from canary.reading import Dialogue, equal_ids_warner
from cosmo.engine.infer import bulk, infer
from cosmo.engine.model.decoding import DecodingConfig

DIGITS = 6  # of probabilities in files


@dataclasses.dataclass(frozen=True)
class LabelJob:
    """A `bulk.BulkRun`: the label of each dialogue, or of each of its beginnings (`per_turn`)."""

    canary: Settings
    rots: bool
    per_turn: bool
    decoding: DecodingConfig
    seed: int = 0

    @property
    def session(self) -> infer.SessionConfig:
        """Return the settings of Canary's session."""
        return self.canary.session

    def settings(self) -> dict[str, Any]:
        """Return what the labels depend on beside session, input and shards, as JSON values."""
        return {
            # In the manifest, so that no run continues an output of another kind of answers.
            "what": "labels",
            "style": self.canary.style,
            "separator": self.canary.separator,
            "per_turn": self.per_turn,
            "rots": self.rots,
            # None without RoTs, because a label alone depends on neither.
            "decoding": self.decoding.settings() if self.rots else None,
            "seed": self.seed if self.rots else None,
        }

    def answerer(self, session: infer.Session) -> bulk.Answerer:
        """Return the function from dialogues to lines, one for each dialogue."""
        canary = self.canary.with_session(session)
        warn = equal_ids_warner()

        def lines(dialogues, on_batch):
            warn(dialogues)
            return label(canary, dialogues, self, on_batch)

        return lines


def label(
    canary: Canary,
    dialogues: Sequence[Dialogue],
    job: LabelJob,
    on_batch: infer.OnBatch,
) -> list[dict[str, Any]]:
    """Return the lines of `dialogues`, in order.

    A line is {id, label, probabilities, needs_human, rots, text, num_turns}. With `per_turn` it is
    {id, num_turns, turns}, and `turns` has the other fields for every beginning of the dialogue.
    """
    # All rows of a window together, so that rows of equal length share batches.
    contexts = [list(canary.contexts(d.turns, only_last=not job.per_turn)) for d in dialogues]
    rows = [row for one in contexts for row in one]
    # `Canary.label` answers equal contexts once, so progress counts them once.
    report = _count_dialogues(on_batch, len(dialogues), len(set(rows)))
    found = iter(
        canary.label(rows, rots=job.rots, decoding=job.decoding, seed=job.seed, on_batch=report)
    )
    lines = []
    for dialogue, one in zip(dialogues, contexts, strict=True):
        chirps = [line(next(found), job.rots) for _ in one]
        name, count = {"id": dialogue.id}, {"num_turns": len(dialogue.turns)}
        if job.per_turn:
            lines.append({**name, **count, "turns": chirps})
        else:
            lines.append({**name, **chirps[0], **count})
    return lines


def line(chirp: Chirp, rots: bool = True) -> dict[str, Any]:
    """Return a Chirp as JSON values, without RoTs and text unless `rots` were asked for."""
    found: dict[str, Any] = {
        "label": chirp.label,
        "probabilities": {name: round(p, DIGITS) for name, p in chirp.probabilities.items()},
        "needs_human": chirp.needs_human,
    }
    return {**found, "rots": list(chirp.rots), "text": chirp.text} if rots else found


def _count_dialogues(on_batch: infer.OnBatch, dialogues: int, rows: int) -> infer.OnBatch:
    """Return `on_batch` with counts of dialogues instead of rows."""
    # Every row counts as its share of all dialogues, because a dialogue may have many rows of a
    # batch or none.
    done = 0

    def report(counts: Counter[str]) -> None:
        nonlocal done
        before = done
        done += counts["records"]
        # A difference of floors: the shares add up to the number of dialogues.
        share = done * dialogues // rows - before * dialogues // rows
        on_batch(Counter({**counts, "records": share}))

    return report
