"""Read the prompts of CO3 from `prompts.toml`, and make requests of them.

| stage | asks for | fields |
| --- | --- | --- |
| narrative | two or three sentences | literal |
| speaker | the other one in the scene | narrative, x |
| dialogue | the conversation, after "X:" | narrative, x, y |
| continuation | the rest of one that broke off | narrative, x, y, so_far, next |
| human | Yes or No | speaker |
| head, relation_tail | Yes, No or Unknown | context, question |
| head_alone, relation_tail_alone | the same without context | question |
| moderation | scores; its prompt is the text itself | text |

Kim et al. 2023, sections 2.3 and 2.4, appendices A and B.1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.calls.requests import Request, Sampling

DEFAULT = Path(__file__).with_name("prompts.toml")
PUBLISHED = Path(__file__).with_name("prompts_published.toml")
NO_CONTEXT = Path(__file__).with_name("prompts_no_context.toml")
# ATOMIC-10X's relations about PersonX. Its seventh, HinderedBy, is not used by the paper.
RELATIONS = ("xReact", "xIntent", "xAttr", "xEffect", "xWant", "xNeed")
# The fields of each stage's prompt.
_FIELDS = {
    "narrative": ("literal",),
    "speaker": ("narrative", "x"),
    "dialogue": ("narrative", "x", "y"),
    "continuation": ("narrative", "x", "y", "so_far", "next"),
    "human": ("speaker",),
    "head": ("context", "question"),
    "head_alone": ("question",),
    "relation_tail": ("context", "question"),
    "relation_tail_alone": ("question",),
}
STAGES = tuple(_FIELDS)
# Exceptions of a template with a mistake, as it is filled in.
_MISTAKES = (KeyError, IndexError, ValueError, TypeError, AttributeError)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The contents of `prompts.toml`; `version` is a hash of them, stored with each record."""

    table: dict[str, Any] = dataclasses.field(repr=False)
    samplings: dict[str, Sampling] = dataclasses.field(repr=False)
    version: str

    def sentence(self, relation: str, **fields: str) -> str:
        """Return the triple as a sentence (table 8)."""
        return self.table["relations"][relation]["sentence"].format(**fields)

    def question(self, relation: str, **fields: str) -> str:
        """Return the triple as a question (table 9)."""
        return self.table["relations"][relation]["question"].format(**fields)

    def head_question(self, head: str) -> str:
        """Return the triple's head as a question (appendix B.1)."""
        return self.table["questions"]["head"].format(head=head)

    def request(self, stage: str, record_id: str, attempt: int = 0, **fields: str) -> Request:
        """Return the request of a stage, in both forms."""
        entry = self.table[stage]
        return Request(
            record_id=record_id,
            stage=stage,
            attempt=attempt,
            # Both forms, because the server decides which is sent.
            prompt=entry["completion"].format(**fields),
            messages=tuple((m["role"], m["content"].format(**fields)) for m in entry["chat"]),
            sampling=self.samplings[entry["sampling"]],
        )


def load(path: str | Path = DEFAULT) -> Prompts:
    """Read the prompts of a file. Its `base` names a file beside it, which has the parts it lacks.

    Raises:
        ValueError: a part is missing, or a sampling has a setting that there is not.
    """
    table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    if base := table.pop("base", None):
        below = tomllib.loads(Path(path).with_name(base).read_text(encoding="utf-8"))
        table["sampling"] = {**below["sampling"], **table.get("sampling", {})}
        table = {**below, **table}
    wanted = ["relations", "questions", "sampling", *STAGES]
    missing = [name for name in wanted if name not in table]
    missing += [f"relations.{r}" for r in RELATIONS if r not in table.get("relations", {})]
    if missing:
        raise ValueError(f"{path}: no [{missing[0]}]. Copy {DEFAULT.name} and change its words.")
    made = book(table, path)
    # Now, because a mistake in a rare prompt would end a run after hours of calls.
    _try_all(made, path)
    return made


def book(table: dict[str, Any], path: str | Path) -> Prompts:
    """Return the prompts of a parsed file; ValueError for a sampling setting that there is not."""
    samplings = {}
    for name, settings in table["sampling"].items():
        try:
            # TOML has lists, and `Sampling` wants tuples.
            settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
            samplings[name] = Sampling(**settings)
        except TypeError as error:
            raise ValueError(f"{path}, [sampling.{name}]: {error}") from None
    # A hash of the parsed table: a comment or another line break makes no new version.
    text = json.dumps(table, sort_keys=True, ensure_ascii=False)
    version = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Prompts(table=table, samplings=samplings, version=version)


def _try_all(book: Prompts, path: str | Path) -> None:
    """Fill in every template once. Raises ValueError, with the part's name."""
    triple = dict.fromkeys(("head", "tail", "tail_past", "x"), "a")
    part = "questions"
    try:
        book.head_question("a")
        for relation in RELATIONS:
            part = f"relations.{relation}"
            book.sentence(relation, **triple), book.question(relation, **triple)
    except _MISTAKES as error:
        raise _mistake(path, part, error, DEFAULT) from None
    try_stages(book, path, _FIELDS, DEFAULT)


def try_stages(
    book: Prompts, path: str | Path, fields: Mapping[str, tuple[str, ...]], model: Path
) -> None:
    """Fill in the template of each stage once. Raises ValueError, with the stage's name.

    `fields` are those of each stage; `model` is the file that has no mistake.
    """
    for stage, names in fields.items():
        try:
            book.request(stage, "id", **dict.fromkeys(names, "a"))
        except _MISTAKES as error:
            raise _mistake(path, stage, error, model) from None


def _mistake(path: str | Path, part: str, error: Exception, model: Path) -> ValueError:
    # A KeyError's text is the missing name alone.
    problem = f"no {error}" if isinstance(error, KeyError) else str(error)
    return ValueError(f"{path}, [{part}]: {problem}. Compare with {model.name}.")
