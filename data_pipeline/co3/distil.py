"""Make a record of SODA from a triple: all of CO3 (Kim et al. 2023, sections 2 and 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from data_pipeline.calls.requests import Rejected, Stage
from data_pipeline.calls.run import Work
from data_pipeline.co3 import commonsense, dialogue, filters, narrative, sentences, speakers
from data_pipeline.co3.postprocess import Settings, check, postprocess, rejected_with, result_of
from data_pipeline.co3.schema import Record
from data_pipeline.co3.triples import Triple

STRANGERS = ("Person 1", "Person 2")  # the speakers of a dialogue without context


def distil(triple: Triple, settings: Settings = Settings()) -> Stage[Record | Rejected]:
    """Make one triple's record: yield requests, return the record or why there is none.

    Checks that need no model run before each further request.
    """
    texts_of = settings.prompts
    sentence = sentences.sentence(triple, texts_of, settings.names, settings.seed)
    if isinstance(sentence, Rejected):
        # No record exists yet: the rejection has the triple alone.
        return sentence
    record = Record(
        **{name: getattr(triple, name) for name in ("id", "head", "relation", "tail", "split")},
        **{name: getattr(sentence, name) for name in ("literal", "x", "y", "z")},
        original_index=triple.index,
        prompts=texts_of.version,
    )
    story = yield from narrative.narrate(
        record.id, record.literal, texts_of, settings.retries, settings.as_published
    )
    if isinstance(story, Rejected):
        return rejected_with(story, record)
    record = _noted(record, "narrative", story.attempts, story.fault, narrative=story.text)
    other = yield from speakers.interlocutor(
        record.id, record.narrative, record.x, record.y, texts_of
    )
    if isinstance(other, Rejected):
        return rejected_with(other, record)
    # Kept even if no dialogue comes of it: the rejection shows whom the model named.
    record = dataclasses.replace(record, interlocutor=other)
    conversation = yield from dialogue.converse(
        record.id,
        record.narrative,
        record.x,
        other,
        texts_of,
        settings.retries,
        settings.wanted_turns,
        settings.as_published,
        # The published code names Z only beside Y.
        record.z if record.y else "",
    )
    if isinstance(conversation, Rejected):
        return rejected_with(conversation, record)
    record = _conversed(record, conversation)
    rejected = check(record, settings)
    # The paper's order, which is also that of cost: a short question, one text, up to four texts.
    if rejected is None and settings.ask_human:
        record = yield from filters.ask_human(record, settings.names, texts_of)
        rejected = check(record, settings)
    if rejected is None and settings.ask_moderation:
        record = yield from filters.ask_moderation(record)
        rejected = check(record, settings)
    if rejected is None and settings.ask_commonsense:
        record = yield from commonsense.judge(record, sentence, texts_of)
    # Names change last, so that the model is asked with the names of its own text.
    return rejected or postprocess(record, settings)


def without_context(triple: Triple, settings: Settings) -> Stage[Record | Rejected]:
    """Make a dialogue without narrative or names: the baseline of section 3.3.

    The basic filters judge it: patterns, turns, speakers, humans. Its speakers keep the names
    Person 1 and Person 2 of the prompt.
    """
    record = Record(
        id=triple.id, head="", relation="", tail="", literal="", x=STRANGERS[0], y=STRANGERS[1],
        original_index=triple.index, interlocutor=STRANGERS[1], prompts=settings.prompts.version,
        renamed=True,
    )  # fmt: skip
    conversation = yield from dialogue.converse(
        record.id, "", *STRANGERS, settings.prompts, settings.retries, settings.wanted_turns
    )
    if isinstance(conversation, Rejected):
        return rejected_with(conversation, record)
    record = _conversed(record, conversation)
    rejected = check(record, settings)
    if rejected is None and settings.ask_human:
        record = yield from filters.ask_human(record, settings.names, settings.prompts)
        rejected = check(record, settings)
    return rejected or record


def _conversed(record: Record, conversation: dialogue.Conversation) -> Record:
    """Return the record with its dialogue."""
    record = _noted(
        record,
        "dialogue",
        conversation.attempts,
        conversation.fault,
        dialogue=conversation.turns.dialogue,
        speakers=conversation.turns.speakers,
    )
    # Counted apart, because one attempt may have a continuation or none.
    attempts = {**record.attempts, "continuation": conversation.continuations}
    return dataclasses.replace(record, attempts=attempts)


def _noted(record: Record, stage: str, attempts: int, fault: str, **fields: object) -> Record:
    """Return the record with a stage's result, its attempts, and the fault it was kept with."""
    marks = (*record.marks, f"{stage}: {fault}") if fault else record.marks
    return dataclasses.replace(
        record, marks=marks, attempts={**record.attempts, stage: attempts}, **fields
    )


def works(rows: Iterable[tuple[int, Triple | Rejected]], settings: Settings) -> Iterator[Work]:
    """Yield one `Work` for each row: a triple to distil, or a rejection to write."""
    for position, row in rows:
        if isinstance(row, Rejected):
            # A rejected row is work too, so that every position of the input leaves a line.
            # `row=row` keeps this loop's row, since the function is called later.
            yield Work(row.id, position, lambda row=row: _at_once(row), result_of)
        else:
            make = without_context if settings.no_context else distil
            yield Work(row.id, position, lambda row=row, make=make: make(row, settings), result_of)


def _at_once(rejected: Rejected) -> Stage[Rejected]:
    return rejected
    yield  # what makes it a generator
