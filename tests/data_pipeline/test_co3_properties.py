"""Properties of parsing and of other names, for any texts: hypothesis draws them."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from cosmo.tasks import namebook
from data_pipeline.co3 import names, schema, turns

BOOK = namebook.load()
WORDS = st.sampled_from(["hello", "you", "are", "late", "but", "the", "dog", "ran", "home"])
UTTERANCE = st.lists(WORDS, min_size=1, max_size=8).map(lambda w: " ".join(w).capitalize() + ".")


@settings(max_examples=100, deadline=None)
@given(st.lists(UTTERANCE, min_size=2, max_size=8))
def test_turns_with_prefixes_are_read_back(utterances):
    """Oracle: the utterances and speakers that were written, one a line."""
    speakers = ["Ann" if i % 2 == 0 else "Coach" for i in range(len(utterances))]
    text = "\n".join(f"{s}: {u}" for s, u in zip(speakers, utterances, strict=True))
    found = turns.parse(text, "Ann", ("Coach",))
    assert list(found.dialogue) == utterances
    assert list(found.speakers) == speakers


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(UTTERANCE, st.just("Ann, it is Ann's turn.")), min_size=1), st.text())
def test_one_name_is_one_other_name_throughout(dialogue, record_id):
    """Oracle: putting the old name back gives the old text; a second time changes nothing."""
    record = schema.Record(record_id, "PersonX runs", "xWant", "to win", "Ann runs.", "Ann", "")
    record = dataclasses.replace(
        record, narrative="Ann runs.", dialogue=tuple(dialogue), speakers=("Ann", "Coach")
    )
    renamed = names.replace(record, BOOK, 0)
    assert renamed.x != "Ann" and renamed.x in BOOK
    assert tuple(text.replace(renamed.x, "Ann") for text in renamed.dialogue) == record.dialogue
    assert names.replace(renamed, BOOK, 0) == renamed
