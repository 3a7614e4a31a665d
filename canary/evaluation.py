"""What a checkpoint is worth on ProsocialDialog: what `python -m canary eval` runs."""

import argparse
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from canary import labels, module, report
from canary.module import Canary, Settings
from canary.report import Found, Gold
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.folders import prepare_folder
from cosmo.engine.base.progress import Progress
from cosmo.engine.checkpoints import any_format
from cosmo.engine.data import datasets
from cosmo.engine.infer import infer
from cosmo.engine.model.decoding import DecodingConfig
from cosmo.tasks import readers, safety
from cosmo.tasks.files import resolve, splits_of

log = logging.getLogger("canary")


@dataclasses.dataclass(frozen=True)
class Case:
    """A context of the corpus, all that was said so far, and what the corpus says of it."""

    id: str
    turns: tuple[str, ...]
    gold: Gold


def cases(path: str, split: str) -> Iterator[Case]:
    """Every row of ProsocialDialog's `split`, in order.

    A casual context has no RoTs, as in the targets that a model learns. Raises DataError, naming
    file, line and field, for a bad record and for votes that contradict their label.
    """
    for dialogue in readers.read_prosocial(path, split):
        turns: tuple[str, ...] = ()
        for number, turn in enumerate(dialogue.turns):
            safety.check_votes(turn)
            turns += (turn.context,)
            rots = turn.rots if safety.needs_rots(turn.safety_label) else ()
            yield Case(f"{dialogue.id}-{number}", turns, Gold(turn.safety_label, rots))
            turns += (turn.response,)


def measure(
    canary: Canary,
    many: Sequence[Case],
    decoding: DecodingConfig,
    seed: int = 0,
    on_batch: Callable[[Counter[str]], None] = lambda counts: None,
) -> list[Found]:
    """What the model says of each case: in two passes, label and RoTs, then the gold RoTs scored.

    RoTs follow the label that the model chose: none after `__casual__`. The likelihood of gold RoTs
    is that after the gold label, of their tokens and EOS: the whole target's less the label's.
    What of a target does not fit the model's longest one is not counted.
    """
    rows = [canary.context(case.turns) for case in many]
    answers = canary.answers(rows, rots=True, decoding=decoding, seed=seed, on_batch=on_batch)
    places = [place for place, case in enumerate(many) if case.gold.rots]
    targets = [_with_target(canary, rows[place], many[place].gold) for place in places]
    work = infer.scoring(canary.session)
    scored = dict(zip(places, infer.answer(canary.session, targets, work, on_batch), strict=True))
    return [
        _found(canary, case, answer, scored.get(place))
        for place, (case, answer) in enumerate(zip(many, answers, strict=True))
    ]


def _with_target(canary: Canary, row: datasets.Row, gold: Gold) -> datasets.Row:
    text = safety.target(gold.label, gold.rots, canary.style)
    vocabulary = canary.session.vocabulary
    ids = (*vocabulary.encode(text), vocabulary.eos_id)
    return dataclasses.replace(row, targets=text, target_ids=ids)


def _found(canary: Canary, case: Case, answer: infer.Answer, scored: infer.Answer | None) -> Found:
    chirp = module.chirp(answer)
    likelihood, tokens = None, 0
    if scored is not None:
        place = safety.LABELS.index(case.gold.label)
        likelihood = scored.scores[0] - module.label_scores(answer)[place]
        tokens = scored.num_tokens - len(canary.choices[place])
    return Found(chirp.label, chirp.probabilities, chirp.rot_text, likelihood, tokens)


def run_eval(args: argparse.Namespace) -> None:
    """Run `eval`: print a table, write metrics.json and predictions.jsonl into a folder."""
    many = list(islice(cases(args.input, args.split), args.num_examples))
    if not many:
        raise UserError(
            f"{args.input}, split {args.split}: nothing to measure: no dialogue has all its rows, "
            "or --num_examples is 0",
            setting="input",
        )
    found = labels.settings(args)
    output = args.output or any_format.results_folder(args.checkpoint, "canary_eval", "output")
    folder = prepare_folder(output, "output")
    canary = found.opened(found.session.open()[0])
    decoding = labels.decoding(args, found)
    golds = [case.gold for case in many]
    progress = Progress(len(many) + sum(bool(gold.rots) for gold in golds), unit="row")
    done = 0

    def on_batch(counts: Counter[str]) -> None:
        nonlocal done
        done += counts["records"]
        progress.update(done)

    try:
        founds = measure(canary, many, decoding, args.seed, on_batch)
    finally:
        progress.finish()
    made = report.report(golds, founds, _baseline(args))
    settings = {"checkpoint": args.checkpoint, "input": args.input, "split": args.split}
    write_atomic(
        folder / "metrics.json", json.dumps({**settings, **_described(found), **made}, indent=1)
    )
    lines = (_line(case, one) for case, one in zip(many, founds, strict=True))
    write_atomic(
        folder / "predictions.jsonl",
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
    )
    print(report.table(made))
    print(f"{folder}: metrics.json, predictions.jsonl")


def _baseline(args: argparse.Namespace) -> Gold | None:
    """What is most frequent in the training split, if --input is a folder that has one."""
    if args.split == "train" or "train" not in splits_of(args.input):
        return None
    if not resolve(args.input).is_dir():
        return None  # one file serves every split: it would be what is evaluated
    return report.most_frequent([case.gold for case in cases(args.input, "train")])


def _described(found: Settings) -> dict[str, Any]:
    return {
        "label_style": found.style,
        "turn_separator": found.separator,
        "task_feature_lengths": dict(found.session.task_feature_lengths),
    }


def _line(case: Case, found: Found) -> dict[str, Any]:
    return {
        "id": case.id,
        "num_turns": len(case.turns),
        "gold": {"label": case.gold.label, "rots": list(case.gold.rots)},
        "label": found.label,
        "probabilities": {name: round(p, labels.DIGITS) for name, p in found.probabilities.items()},
        "rot_text": found.rot_text,
        "rot_log_likelihood": found.rot_log_likelihood,
        "rot_tokens": found.rot_tokens,
    }
