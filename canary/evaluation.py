"""Measure a checkpoint on ProsocialDialog: cases, answers, lines of predictions."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from canary import labels, module
from canary.module import Canary
from canary.report import Found, Gold
from cosmo.engine.data import datasets
from cosmo.engine.infer import infer
from cosmo.engine.model.decoding import DecodingConfig
from cosmo.tasks import readers, safety


@dataclasses.dataclass(frozen=True)
class Case:
    """A context of the corpus: its id, all turns so far, and the corpus's label and RoTs."""

    id: str
    turns: tuple[str, ...]
    gold: Gold


def cases(path: str, split: str) -> Iterator[Case]:
    """Yield a case for every row of ProsocialDialog's `split`, in order.

    Raises DataError, naming file, line and field, for a bad record and for votes that contradict
    their label.
    """
    for dialogue in readers.read_prosocial(path, split):
        turns: tuple[str, ...] = ()
        for number, turn in enumerate(dialogue.turns):
            safety.check_votes(turn)  # here, because reading for Cosmo does not use labels
            # A case holds all turns up to its context; the response follows it.
            turns += (turn.context,)
            # A casual context has no RoTs, as in the targets that a model learns.
            rots = turn.rots if safety.needs_rots(turn.safety_label) else ()
            yield Case(f"{dialogue.id}-{number}", turns, Gold(turn.safety_label, rots))
            turns += (turn.response,)


def measure(
    canary: Canary,
    cases: Sequence[Case],
    decoding: DecodingConfig,
    seed: int = 0,
    on_batch: infer.OnBatch = lambda counts: None,
) -> list[Found]:
    """Return the model's answer to each case, with the likelihood of the gold RoTs.

    RoTs follow the label that the model chose: none after `__casual__`. The likelihood of gold RoTs
    is that after the gold label, of their tokens and EOS. Tokens of a target that exceed the
    model's longest one are not counted.
    """
    rows = [canary.context(case.turns) for case in cases]
    answers = canary.answers(rows, rots=True, decoding=decoding, seed=seed, on_batch=on_batch)
    # Contexts without gold RoTs have no likelihood to measure.
    places = [place for place, case in enumerate(cases) if case.gold.rots]
    targets = [_with_target(canary, rows[place], cases[place].gold) for place in places]
    work = infer.scoring(canary.session)
    scored = dict(zip(places, infer.answer(canary.session, targets, work, on_batch), strict=True))
    return [
        _found(canary, case, answer, scored.get(place))
        for place, (case, answer) in enumerate(zip(cases, answers, strict=True))
    ]


def _with_target(canary: Canary, row: datasets.Row, gold: Gold) -> datasets.Row:
    text = safety.target(gold.label, gold.rots, canary.style)
    vocabulary = canary.session.vocabulary
    ids = (*vocabulary.encode(text), vocabulary.eos_id)
    # The inputs stay those of labelling: the label's log-likelihood is subtracted later.
    return dataclasses.replace(row, targets=text, target_ids=ids)


def _found(canary: Canary, case: Case, answer: infer.Answer, scored: infer.Answer | None) -> Found:
    chirp = module.chirp(answer)
    likelihood, tokens = None, 0
    if scored is not None:
        # The target begins with the label, so the whole target's log-likelihood less the label's is
        # the RoTs' after the label.
        place = safety.LABELS.index(case.gold.label)
        likelihood = scored.scores[0] - module.label_scores(answer)[place]
        tokens = scored.num_tokens - len(canary.choices[place])
    return Found(chirp.label, chirp.probabilities, chirp.rot_text, likelihood, tokens)


def line(case: Case, found: Found) -> dict[str, Any]:
    """Return a case and the model's answer as a line of predictions.jsonl."""
    probabilities = {name: round(p, labels.DIGITS) for name, p in found.probabilities.items()}
    return {
        "id": case.id,
        "num_turns": len(case.turns),
        "gold": dataclasses.asdict(case.gold),
        **dataclasses.asdict(found),
        "probabilities": probabilities,
    }
