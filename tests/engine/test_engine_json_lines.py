"""JSON lines: every text can be written and comes back; every fault is named.

Oracle: Python's json on the written line, and the inputs by hand.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmo.engine.base import json_lines
from cosmo.engine.base.atomic import write_atomic

# Any code point, halves of surrogate pairs included.
TEXT = st.text(st.characters(codec=None, categories=None), max_size=30)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(VALUE)
def test_every_value_is_one_line_and_comes_back(value):
    """Property: writing never fails, a line has one newline, and reading gives the value."""
    line = json_lines.line(value)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    # Two halves that stand side by side are one character to JSON.
    assert json_lines.value(line) == json.loads(json.dumps(value))


def test_half_a_character_is_written_as_its_escape(tmp_path):
    r"""Oracle: by hand: the six ASCII characters \ud800, other text as it is."""
    assert json_lines.line({"a": "é\ud800\\"}) == b'{"a": "\xc3\xa9\\ud800\\\\"}\n'
    write_atomic(tmp_path / "page.md", "é\ud800")
    assert (tmp_path / "page.md").read_bytes() == b"\xc3\xa9\\ud800"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON: Expecting value, column 1"),
        (b'{"a": 1} {', "not JSON: Extra data, column 10"),
        (b'"\xff"', r"not UTF-8 text \(byte 0xff\)"),
        ("[" * 10_000 + "]" * 10_000, "nested too deeply"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested too deeply"),
        (b"1" * 5_000, "a whole number of more than 4,300 digits"),
        (b"[-" + b"1" * 5_000 + b"]", "a whole number of more than 4,300 digits"),
    ],
)
def test_a_fault_is_named(data, words):
    """Oracle: the fault of each input, by hand."""
    with pytest.raises(ValueError, match=words):
        json_lines.value(data)


def test_what_is_unusual_and_right_is_read():
    """Oracle: by hand: the deepest value, many brackets side by side, a byte order mark."""
    deepest = "[" * 100 + "]" * 100
    assert json_lines.value(deepest) == json.loads(deepest)
    assert json_lines.value(b"[" + b"[]," * 500 + b"[]]") == [[]] * 501
    assert json_lines.value(b'\xef\xbb\xbf{"a": 1}\r\n') == {"a": 1}
    assert json_lines.value('\ufeff{"a": 1}') == {"a": 1}
