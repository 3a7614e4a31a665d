"""Mutated lines in every reader of records: no traceback, and no line lost without a word.

Oracle: a count of the file's lines. Each line that is not blank is an example, a rejection, or ends
the reading with one DataError that names the file. Mutations come from a seeded generator.
"""

import collections
import functools
import json
import random

import pytest

from canary import reading
from cosmo import records
from cosmo.engine.base.errors import DataError, UserError
from cosmo.engine.infer import record_sources
from cosmo.tasks import conversations, vocabularies
from cosmo.tasks.dialogues import Place
from cosmo.tasks.readers import read_prosocial, read_soda
from cosmo.tasks.record_files import read_table
from tests.tasks.tasks_samples import prosocial_row, soda_row
from tests.tasks.test_tasks_casual import ED_HEADER, bst_row, ed_row

TOKENS = [
    *(b'"', b'""', b",", b"\t", b"{", b"}", b"[", b"]", b":", b"\\", b"\\ud800", b"\\u0000", b"|"),
    *(b"\n", b"\r", b"\r\n", b"\x00", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\x1a"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b'{"a": 1}', b"[]", b"__eou__"),
    *(b"1" * 5000, b"[" * 3000, b"[" * 150 + b"]" * 150, b'{"a":' * 2000, "é😀".encode(), b" "),
]


def mutated(line, draw):
    """Return a line with one to three mutations."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        start = draw.randrange(len(line) + 1)
        end = min(len(line), start + draw.choice((0, 0, 1, 1, 5, 50)))
        kind = draw.randrange(5)
        if kind == 0:
            middle = bytes([draw.randrange(256)])
        elif kind == 1:
            middle = b""
        elif kind == 2:
            middle = line[start:end] * 2
        else:
            middle = draw.choice(TOKENS)
        line = line[:start] + middle + line[end:]
    return line


def json_line(row):
    """Return a record as a line."""
    return json.dumps(row).encode()


def of_the_source(source):
    """Return the number of items of a source for bulk inference."""
    span = record_sources.Span(0, 0, source.count)
    return sum(len(items) for items in source.read([span]))


def rows_and_their_newlines(rows):
    """Return the number of lines that rows of fields take."""
    return sum(1 + sum(field.count("\n") for field in fields) for _, fields in rows)


def empathetic(path):
    """Return the number of lines in the rows, all of which are checked."""
    rows = [(None, conversations._EMPATHETIC_HEADER)]
    for place, fields in conversations.empathetic_rows(path):
        conversations.empathetic_utterance(fields, place)
        rows.append((place, fields))
    return rows_and_their_newlines(rows)


def table(path):
    """Return the number of lines in a table's rows."""
    rows = [(None, ["header"])]
    rows += [(place, list(row.values())) for place, row in read_table(path, "\t")]
    return rows_and_their_newlines(rows)


@functools.cache
def vocabulary():
    """Return the sample vocabulary."""
    return vocabularies.load("tasks/sample/vocabulary.model")


TURNS = [
    json_line({"id": f"r{i}", "turns": ["Hi.", "Hello."], "response": "Ha."}) for i in range(3)
]
SODA = [json_line(soda_row(i)) for i in range(3)]
PROSOCIAL = [json_line(prosocial_row(i, 0, done=True)) for i in range(3)]
DAILY = [b"Hi . __eou__ Hello , you . __eou__", b"One . __eou__", b"Two . __eou__ three . __eou__"]
EMPATHETIC = [
    ED_HEADER.strip().encode(),
    *(ed_row(f"c:{i}", 1, 'I won_comma_ "really"!').strip().encode() for i in range(3)),
]
# Reader: (its lines, its ending, function from a path to the number of lines that are accounted
# for, line from which mutations begin).
READERS = {
    "soda": (SODA, "jsonl", lambda path: len(list(read_soda(path)))),
    "prosocial": (
        PROSOCIAL,
        "jsonl",
        lambda path: sum(len(d.turns) for d in read_prosocial(path)),
    ),
    "dailydialog": (DAILY, "txt", lambda path: len(list(conversations.read_dailydialog(path)))),
    "empathetic": (EMPATHETIC, "csv", empathetic),
    "blended": (
        [json_line(bst_row()) for _ in range(3)],
        "json",
        lambda path: len(list(conversations.read_blended(path))),
    ),
    "table": ([b"a\tb\tc", b'1\t"x ""y"" z"\t2', b"3\t4\tfive"], "tsv", table),
    "infer": (
        TURNS,
        "jsonl",
        lambda path: of_the_source(records.source(str(path), vocabulary(), 64)),
    ),
    "score": (
        TURNS,
        "jsonl",
        lambda path: of_the_source(records.source(str(path), vocabulary(), 64, mode="score")),
    ),
    **{
        f"label {name}": (lines, "jsonl", lambda path: of_the_source(reading.source(str(path))))
        for name, lines in (("soda", SODA), ("prosocial", PROSOCIAL), ("turns", TURNS))
    },
    "label dailydialog": (DAILY, "txt", lambda path: of_the_source(reading.source(str(path)))),
}
# These skip a dialogue that lacks a row, with a warning; a mutated number may make it so.
COUNTED_BY_WARNINGS = ("prosocial",)


@pytest.mark.parametrize(
    "count", [pytest.param(40, id="sample"), pytest.param(1000, marks=pytest.mark.slow, id="all")]
)
@pytest.mark.parametrize("name", READERS)
def test_no_line_is_lost_and_nothing_else_is_raised(tmp_path, name, count, caplog):
    """Property: see above. 40 files a reader; 1,000 of each, 12,000 in all, in the slow test."""
    lines, ending, read = READERS[name]
    draw, outcomes = random.Random(count), collections.Counter()
    path = tmp_path / f"train.{ending}"
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert read(path) == len(lines)
    for _ in range(count):
        place = draw.randrange(len(lines))
        changed = [*lines[:place], mutated(lines[place], draw), *lines[place + 1 :]]
        content = b"\n".join(changed) + b"\n"
        path.write_bytes(content)
        caplog.clear()
        try:
            found = read(path)
        except (DataError, UserError) as error:
            message = str(error)
            assert str(path) in message and "\n" not in message and len(message) < 2000, message
            outcomes["error"] += 1
            continue
        kept = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        # A quoted field may hold blank lines, which are then no blank lines of the file.
        # Readers of text count lines of Unicode's white space as blank, those of bytes do not.
        wanted = {
            len(kept) - 1,
            sum(bool(line.strip()) for line in kept),
            sum(bool(line.decode(errors="replace").strip()) for line in kept),
        }
        warned = name in COUNTED_BY_WARNINGS and "incomplete dialogues" in caplog.text
        assert found in wanted or warned, (found, wanted, changed[place][:300])
        outcomes["read"] += 1
    assert outcomes["error"] + outcomes["read"] == count
    print(f"\n{name}: {count} files with a mutated line: {dict(outcomes)}, 0 lost")


def test_a_place_is_one_line():
    """Oracle: an error's text for a value with newlines has none."""
    assert "\n" not in str(Place("f", 1).error("p", repr("a\nb"), "e"))
