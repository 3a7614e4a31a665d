"""Load a model from any checkpoint, then generate and score in Python.

```python
import cosmo

model = cosmo.load("/tmp/run")
reply, = model.generate([["Hi, how was the exam?"]], temperature=1.0, top_p=0.95)
print(reply.text)
```
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cosmo import records
from cosmo.engine.base import saved_settings
from cosmo.engine.base.errors import UserError
from cosmo.engine.data import datasets
from cosmo.engine.infer import any_checkpoint, infer
from cosmo.engine.model.decoding import DecodingConfig
from cosmo.tasks import formatting, vocabularies

# A record {turns, narrative?, instruction?, response?, id?}, its turns alone, or one utterance.
Record = Mapping[str, Any] | Sequence[str] | str

LENGTHS = {"inputs": 512, "targets": 128}  # of a checkpoint without settings of its own


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer: `text` is the first of `texts`, which holds all samples or beams.

    A score is the text's log-likelihood in nats (with beams, over the length penalty).
    """

    text: str
    score: float
    texts: tuple[str, ...]
    scores: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Score:
    """The log-likelihood of a record's response, in nats; EOS counts as a token."""

    log_likelihood: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """Return exp of the mean negative log-likelihood of a token."""
        return math.exp(-self.log_likelihood / self.num_tokens)


@dataclasses.dataclass(frozen=True)
class DialogueModel:
    """A model that answers dialogues; made by `load`."""

    session: infer.Session
    separators: formatting.Separators
    step: int  # of its checkpoint

    def generate(self, records: Iterable[Record], *, seed: int = 0, **sampling: Any) -> list[Reply]:
        """Return a reply to each record, in order.

        `sampling` are fields of `DecodingConfig`, such as max_new_tokens, temperature, top_p,
        beam_size or block_ngram; greedy without any. A sample depends on `seed` and the record's
        id, its place in `records` if it has none. Raises UserError for a record that cannot be
        used, before any is answered.
        """
        longest = self.session.lengths["targets"]
        # By default as long as the targets that the model learnt to write.
        decoding = DecodingConfig.from_settings({"max_new_tokens": longest, **sampling})
        rows = self._rows(records)
        found = infer.answer(self.session, rows, infer.generation(self.session, decoding, seed))
        return [Reply(a.predictions[0], a.scores[0], a.predictions, a.scores) for a in found]

    def score(self, records: Iterable[Record]) -> list[Score]:
        """Return the log-likelihood of each record's `response`; UserError if one has none."""
        rows = self._rows(records)
        # All rows first: an error must not cost the answers before it.
        for row in rows:
            if row.target_ids is None:
                raise UserError(f"record {row.id!r}: field 'response': missing, and scores need it")
        found = infer.answer(self.session, rows, infer.scoring(self.session))
        return [Score(a.scores[0], a.num_tokens) for a in found]

    def _rows(self, items: Iterable[Record]) -> list[datasets.Row]:
        # A string is a sequence of strings: every letter would become a record.
        if isinstance(items, str | Mapping):
            raise UserError("give a list of records: [record] for one")
        made = [_record(item) for item in items]
        mappings = [record for record in made if isinstance(record, Mapping)]
        unknown = Counter(name for record in mappings for name in record.keys() - records.KNOWN)
        # A misspelled field would otherwise be ignored without a word.
        records.warn_of_unknown_fields(unknown)
        given = (str(r["id"]) for r in mappings if r.get("id") is not None)
        # A sample depends on its record's id, so a number must equal no id that is given.
        prefix = records.automatic_ids(given)
        vocabulary, length = self.session.vocabulary, self.session.lengths["inputs"]
        rows = []
        for place, record in enumerate(made):
            name = f"{prefix}{place}"
            try:
                rows.append(records.row(record, vocabulary, length, self.separators, name))
            except (ValueError, RuntimeError) as error:  # SentencePiece's, for broken Unicode
                raise UserError(f"record {place}: {error}") from error
        return rows


def _record(item: Record) -> Any:
    """Return an utterance, or a list of turns, as a record; anything else as it is."""
    if isinstance(item, str):
        return {"turns": [item]}
    if isinstance(item, Mapping):
        turns = item.get("turns")
        # `records.row` takes lists alone, as JSON has no tuples.
        return {**item, "turns": list(turns)} if isinstance(turns, tuple) else item
    return {"turns": list(item)} if isinstance(item, Sequence) else item


def load(
    path: str,
    *,
    vocabulary: str | None = None,
    lengths: Mapping[str, int] | None = None,
    separators: formatting.Separators | None = None,
    batch_size: int = 32,
    dtype: str | None = None,
    num_partitions: int = 1,
    backend: str | None = None,
) -> DialogueModel:
    """Load a model from a run's MODEL_DIR, one of its checkpoints, a HuggingFace or T5X folder.

    Args:
        path: the checkpoint; its format is found out.
        vocabulary: a SentencePiece model or a byte-level BPE, if none is kept with the checkpoint.
        lengths: the most tokens of "inputs" (oldest turns are left out) and "targets"; by default
            the run's own, or Cosmo's 512 and 128.
        separators: between the parts and the turns of an input; by default the run's, or Cosmo's.
        batch_size: records at a time; rounded up to the number of devices.
        dtype: "float32" or "bfloat16"; by default float32 on a CPU, else bfloat16.
        num_partitions: devices that one copy of the model is split over.
        backend: the engine that answers: "jax", or "ctranslate2" and "ctranslate2_int8" (extra
            `ct2`; T5 on a CPU). By default "jax", and for a CTranslate2 folder its own.

    Raises UserError if there is no checkpoint, or if its vocabulary is unknown.
    """
    config, saved = any_checkpoint.session_config(
        path,
        vocabularies.load,
        vocabulary=vocabulary,
        lengths=lengths,
        usual_lengths=LENGTHS,
        batch_size=batch_size,
        dtype=dtype,
        num_partitions=num_partitions,
        backend=backend,
    )
    return opened(config, saved, separators)


def opened(
    config: infer.SessionConfig,
    saved: saved_settings.Saved,
    separators: formatting.Separators | None = None,
) -> DialogueModel:
    """Return the model of settings that `any_checkpoint.session_config` found. See `load`."""
    if separators is None:
        usual = formatting.Separators()
        separators = formatting.Separators(
            saved.macro("SEPARATOR", str, usual.sep), saved.macro("TURN_SEPARATOR", str, usual.turn)
        )
    session, step = config.open()
    return DialogueModel(session, separators, step)
