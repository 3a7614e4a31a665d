"""Properties of the text formats, for any texts: hypothesis draws them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cosmo.tasks.formatting import Separators, cosmo_input, drop_oldest_turns

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=20)
TURNS = st.lists(TEXT.filter(str.strip), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT, TURNS)
def test_an_input_holds_all_parts_in_order(narrative, instruction, turns):
    """Oracle: the parts that are not empty, split off again at the separators."""
    separators = Separators()
    text = cosmo_input(narrative, instruction, turns, separators)
    *parts, dialogue = text.split(separators.sep)
    assert parts == [part for part in (narrative, instruction) if part]
    assert dialogue.split(separators.turn) == list(turns)


@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT, TURNS, st.integers(1, 120))
def test_as_few_of_the_oldest_turns_are_dropped_as_fit(narrative, instruction, turns, budget):
    """Oracle: trying every suffix, longest first; a character is a token here."""

    def fits(kept):
        return len(cosmo_input(narrative, instruction, kept)) + 1 <= budget

    kept = drop_oldest_turns(narrative, instruction, turns, budget, len)
    suffixes = [tuple(turns[i:]) for i in range(len(turns))]
    expected = next((suffix for suffix in suffixes if fits(suffix)), suffixes[-1])
    assert kept == expected
