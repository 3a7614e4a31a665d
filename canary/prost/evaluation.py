"""Measure Prost on the seven corpora: BLEU-4, F1 and perplexity of responses.

The rows of tables 3 and 8 of Kim et al. 2022 ("ProsocialDialog"). The paper does not print what its
numbers of "RoT & response" count. Here BLEU-4 and F1 are of the response after the RoTs. The
perplexity is of the corpus's response, after the model's own RoTs or the corpus's ("gold").
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from canary.prost.agent import Prost, Reply
from cosmo.engine.base import saved_settings
from cosmo.engine.base.tables import text_table
from cosmo.engine.checkpoints import any_format
from cosmo.engine.data.datasets import Row
from cosmo.engine.infer import infer
from cosmo.engine.model.decoding import DecodingConfig
from cosmo.tasks import families, paper_tables, prost_text
from cosmo.tasks.metrics.responses import pair_bleu4, pair_f1
from cosmo.tasks.prost_text import ProstExample

PROSOCIAL = "prost_prosocial"
Rots = Literal["own", "gold"]  # whose RoTs a response follows
# The paper's row of a variant, and of whose RoTs a response follows.
ROWS = {
    ("response_only", "own"): "Prost (Response only)",
    ("rot_and_response", "own"): "Prost (RoT & Response)",
    ("rot_and_response", "gold"): "Prost (Response w/ gold RoT)",
}
# The columns of table 8, in its order: our task and the corpus.
CORPORA = {
    "prost_prosocial": "Prosocial",
    "prost_dailydialog": "DailyDialog",
    "prost_topical_chat": "TopicalChat",
    "prost_persona_chat": "PersonaChat",
    "prost_wizard": "WoW",
    "prost_empathetic": "ED",
    "prost_blended": "BST",
}
NOTES = """\
Perplexity is of a response's tokens. Those of different vocabularies do not compare: the rows of
GPT-2, DialoGPT, BART and T5 are per token of their own vocabularies, those of BlenderBot, PushShift
and Prost per token of BlenderBot's 8,008. In table 8 PushShift's Prosocial cell (6.16/32.78) equals
table 3's row of gold RoTs: the same model twice, or a slip of the paper."""


def corpora(checkpoint: str, folder: str | None) -> dict[str, families.Corpus]:
    """Return the corpora by task: those in `folder`, or those that the checkpoint's run read."""
    found = any_format.locate(checkpoint)
    saved = saved_settings.read(found.folder) if found.format == "cosmo" else None
    macros = saved.macros if saved is not None else {}

    def path(macro: str, usual: str) -> Any:
        if folder is not None:
            return f"{folder}/{usual.removeprefix('data/')}"
        return macros.get(macro, usual)

    # The fields of ProstData have the macros' names; their defaults end in the usual folders.
    fields = {
        field.name: path(field.name.upper(), field.default)
        for field in dataclasses.fields(families.ProstData)
        if field.name.endswith("_path")
    }
    prosocial = path("PROSOCIAL_PATH", "data/prosocial_dialog")
    return families.prost_corpora(prosocial, families.ProstData(**fields))


@dataclasses.dataclass(frozen=True)
class Measured:
    """A reply to an example, and the log-likelihood (nats) of the corpus's response.

    `tokens` counts that response's tokens with the end token. `cut`: whether the history was cut.
    """

    reply: Reply
    log_likelihood: float
    tokens: int
    cut: bool = False


def measure(
    prost: Prost,
    examples: Sequence[ProstExample],
    decoding: DecodingConfig,
    rots: Rots = "own",
    seed: int = 0,
    on_batch: infer.OnBatch = lambda counts: None,
) -> list[Measured]:
    """Return the model's reply to each example, and the likelihood of the corpus's response.

    With `rots="gold"` both follow the corpus's RoTs. Tokens of a target that exceed the model's
    longest one are not counted.
    """
    rows = [
        dataclasses.replace(prost.row(e.turns), id=e.id or str(i)) for i, e in enumerate(examples)
    ]
    given = [example.rots for example in examples] if rots == "gold" else None
    replies = prost.answers(rows, given, decoding, seed, on_batch)
    followed = [reply.rots for reply in replies]
    vocabulary = prost.session.vocabulary
    scored = [
        _with_target(row, example.response, before, vocabulary)
        for row, example, before in zip(rows, examples, followed, strict=True)
    ]
    found = infer.answer(prost.session, scored, infer.scoring(prost.session), on_batch)
    return [
        Measured(reply, answer.scores[0], answer.num_tokens, answer.row.cut)
        for reply, answer in zip(replies, found, strict=True)
    ]


def _with_target(row: Row, response: str, rots: Sequence[str], vocabulary: Any) -> Row:
    """Return `row` with a response to score after RoTs, which count nothing."""
    before = prost_text.gold_prefix_ids(rots, vocabulary) if rots else []
    ids = (*before, *vocabulary.encode(response), vocabulary.eos_id)
    return dataclasses.replace(row, targets=response, target_ids=ids, num_given=len(before))


def report(examples: Sequence[ProstExample], measured: Sequence[Measured]) -> dict[str, Any]:
    """Return the numbers of one task as JSON values; BLEU-4 and F1 are ParlAI's, times 100."""
    count = len(examples)
    pairs = [(m.reply.text, e.response) for m, e in zip(measured, examples, strict=True)]
    tokens = sum(m.tokens for m in measured)
    nats = -sum(m.log_likelihood for m in measured) / tokens if tokens else math.inf
    return {
        "examples": count,
        "bleu4": 100 * math.fsum(pair_bleu4(*pair) for pair in pairs) / count,
        "f1": 100 * math.fsum(pair_f1(*pair) for pair in pairs) / count,
        # exp of more is no float.
        "perplexity": math.exp(nats) if nats < 700 else None,
        "tokens": tokens,
        "cut": sum(m.cut for m in measured),
        "answers_of_another_form": sum(bool(m.reply.problem) for m in measured),
    }


def line(task: str, example: ProstExample, found: Measured, rots: Rots) -> dict[str, Any]:
    """Return an example and its reply as a line of predictions.jsonl."""
    return {
        "task": task,
        "id": example.id,
        "turns": list(example.turns),
        "target": example.response,
        "target_rots": list(example.rots),
        "rots_from": rots,
        "prediction": found.reply.text,
        "rots": list(found.reply.rots),
        "score": found.reply.score,
        "log_likelihood": found.log_likelihood,
        "problem": found.reply.problem,
    }


def tables(variant: prost_text.Variant, made: Mapping[str, Mapping[str, Any]]) -> str:
    """Return tables 3 and 8 with this model's rows beside the paper's.

    `made` maps a task to its `report`, and "prost_prosocial gold" to that with gold RoTs.
    """
    parts = []
    if PROSOCIAL in made:
        parts.append("Table 3, ProsocialDialog:\n" + text_table(_table_3(variant, made)))
    parts.append("Table 8, perplexity/F1:\n" + text_table(_table_8(variant, made)))
    return "\n\n".join([*parts, NOTES])


def _table_3(variant: str, made: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    rows = [["", "BLEU-4", "F1", "perplexity"]]
    for name, numbers in paper_tables.PROSOCIAL["responses"].items():
        rows.append([name, *map(cell, numbers)])
    for rots in ("own", "gold"):
        found = made.get(PROSOCIAL if rots == "own" else f"{PROSOCIAL} gold")
        if found is not None:
            cells = [cell(found[name]) for name in ("bleu4", "f1", "perplexity")]
            rows.append([_ours(variant, rots), *cells])
    return rows


def _table_8(variant: str, made: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    rows = [["", *CORPORA.values()]]
    for name, numbers in paper_tables.PROSOCIAL["corpora"].items():
        if name != "columns":
            pairs = zip(numbers[::2], numbers[1::2], strict=True)
            rows.append([name, *(f"{cell(ppl)}/{cell(f1)}" for ppl, f1 in pairs)])
    ours = [
        f"{cell(made[task]['perplexity'])}/{cell(made[task]['f1'])}" if task in made else "-"
        for task in CORPORA
    ]
    return [*rows, [_ours(variant, "own"), *ours]]


def _ours(variant: str, rots: str) -> str:
    return f"this model: {ROWS[variant, rots].removeprefix('Prost ')}"


def cell(value: float | None) -> str:
    """Return a number as a table shows it."""
    return "-" if value is None else f"{value:.2f}"
