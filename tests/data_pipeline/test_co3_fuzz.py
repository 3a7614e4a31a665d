"""Mutated triples and mutated answers of a model: no traceback, and nothing lost without a word.

Oracle: a count of the file's lines: each that is not blank is a triple or a rejection. A reply is a
response, or one AnswerError. Mutations come from a seeded generator.
"""

import json
import random
from collections import Counter

import pytest

from cosmo.engine.base.errors import UserError
from data_pipeline.calls.client import AnswerError, parse_answer
from data_pipeline.calls.requests import Rejected
from data_pipeline.co3 import triples
from tests.tasks.test_tasks_fuzz import mutated

COUNTS = [pytest.param(100, id="sample"), pytest.param(2000, marks=pytest.mark.slow, id="all")]
ROWS = [("PersonX sings", "xWant", "to rest"), ("PersonX helps PersonY", "xReact", "happy")]
FILES = {
    "jsonl": [
        json.dumps(dict(zip(("head", "relation", "tail"), row, strict=True))).encode()
        for row in ROWS
    ],
    "tsv": ["\t".join(row).encode() for row in ROWS],
}
CHOICE = {"index": 0, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 7, "completion_tokens": 3}
REPLIES = {
    "completion": {"choices": [{**CHOICE, "text": "Hi.\nX: Ha."}], "usage": USAGE},
    "chat": {
        "choices": [
            {**CHOICE, "message": {"role": "assistant", "content": "<think>a</think> Hi."}}
        ],
        "usage": USAGE,
    },
    "moderation": {"results": [{"category_scores": {"hate": 0.1, "self-harm": 0.2}}]},
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("ending", FILES)
def test_no_triple_is_lost(tmp_path, ending, count):
    """Property: see above; the counts are printed."""
    draw, found = random.Random(count), Counter()
    path, lines = tmp_path / f"triples.{ending}", FILES[ending]
    for _ in range(count):
        place = draw.randrange(len(lines))
        changed = [*lines[:place], mutated(lines[place], draw), *lines[place + 1 :]]
        content = b"\n".join(changed) + b"\n"
        path.write_bytes(content)
        try:
            rows = list(triples.read(path))
        except UserError as error:
            message = str(error)
            assert str(path) in message and "\n" not in message
            found["files refused"] += 1
            continue
        kept = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        filled = {sum(bool(x.strip()) for x in kept), sum(bool(x) for x in kept)}
        filled.add(sum(bool(x.decode(errors="replace").strip()) for x in kept))
        assert len(rows) in filled, (rows, changed[place][:300])
        for row in rows:
            assert not isinstance(row, Rejected) or (row.reason and row.stage == "triples")
            found["rejected" if isinstance(row, Rejected) else "triples"] += 1
            json.dumps(row.record if isinstance(row, Rejected) else row.head)
    print(f"\ntriples .{ending}: {count} mutated lines: {dict(found)}")
    assert found["rejected"] > count // 10 and found["triples"] > count


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("form", REPLIES)
def test_an_answer_is_read_or_refused(form, count):
    """Property: see above; the counts are printed."""
    draw, found = random.Random(count), Counter()
    line = json.dumps(REPLIES[form]).encode()
    for _ in range(count):
        text = mutated(line, draw).decode(errors="replace")
        try:
            response = parse_answer(text, form)
        except AnswerError:
            found["refused"] += 1
            continue
        response.text.encode()  # it can be written
        found["read"] += 1
    print(f"\n{form} answers: {count} mutated: {dict(found)}")
    assert found["refused"] > count // 10 and found["read"] > count // 10
