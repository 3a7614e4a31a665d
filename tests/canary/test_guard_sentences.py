"""Sentences of a text that arrives in pieces."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canary.guard.sentences import MIN_CHARS, Splitter, whole


def split(pieces, most=400):
    splitter = Splitter(most)
    found = [sentence for piece in pieces for sentence in splitter.add(piece)]
    return found + splitter.finish()


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("I will help you now. Then we go.", ["I will help you now.", " Then we go."]),
        ("Version 3.14 is out for all of you", ["Version 3.14 is out for all of you"]),
        ('He said "never again!" And he left.', ['He said "never again!"', " And he left."]),
        ("Yes. No. 1. This is a long sentence.", ["Yes. No. 1. This", " is a long sentence."]),
        ("A line of a list\nAnother line", ["A line of a list", "\nAnother line"]),
        ("Wait for it, please... then go", ["Wait for it, please...", " then go"]),
        ("  \n ", ["  \n "]),
        ("", []),
    ],
)
def test_sentences(text, wanted):
    """Oracle: cut by hand."""
    if text.startswith("Yes."):
        wanted = [text]  # "Yes. No. 1." is shorter than MIN_CHARS
        assert len("Yes. No. 1.") < MIN_CHARS
    assert split([text]) == wanted


def test_marks_of_scripts_without_spaces_end_a_sentence():
    text = "这是一个很长的句子用来测试分割器的功能。" * 2
    assert split([text]) == [text[: len(text) // 2]] * 2


# Marks, quotations, white space, an astral character, and halves of one.
MARKS = "ab. !?\n\"')\u3002\uff1f\u300d\u2026\u00e9\U0001f600\u200b\t,"
alphabet = st.sampled_from([*MARKS, "word ", "\ud83d", "\ude00"])
texts = st.lists(alphabet, max_size=120).map("".join)


@settings(max_examples=300, deadline=None)
@given(texts, st.lists(st.integers(0, 200), max_size=12), st.sampled_from([40, 60, 400]))
def test_pieces_change_nothing(text, cuts, most):
    """Oracle: the text in one piece; sentences are its parts in order."""
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    once = split([text], most)
    assert split(pieces, most) == split(list(text), most) == once
    assert "".join(once) == whole(text)
    assert all(0 < len(sentence) <= most for sentence in once)


@given(texts)
def test_whole_texts_have_utf_8(text):
    whole(text).encode()


def test_a_long_text_takes_little_time():
    """Oracle: 4 MB of one word and of many sentences end; quadratic work would not."""
    assert len(split(["x" * 2_000_000])) == 5000
    assert len(split(["This is a sentence. " * 100_000])) == 100_000 + 1
