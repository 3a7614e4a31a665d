"""What a run tells people: order, columns, the card, plots."""

import collections
import json
import math
import re

import pytest

from cosmo.tasks import paper_tables
from data_pipeline.co3 import card, postprocess, reasons, report, statistics

ROW = {
    "head": "PersonX eats",
    "relation": "xWant",
    "tail": "to rest",
    "narrative": "Ann wants an apple.",
    "dialogue": ["Hi there.", "Hello | to you."],
    "speakers": ["Ann", "Bob"],
    "split": "valid",
    "head_answer": "Yes",
    "relation_tail_answer": "",
}
ABOUT = {
    "triples": "atomic.jsonl (9 bytes, 00)",
    "critic": None,
    "shard": "0/1",
    "seed": 0,
    "base_url": "http://10.0.0.7:8000/v1",
    "model": "teacher",
    "canary": "/home/ann/labels.jsonl",
    "moderation": None,
    "ask_human": False,
}
REASONS = collections.Counter(
    {
        ("commonsense", "head is not in the narrative"): 1,
        ("dialogue", "failed: timeout"): 2,
        ("speakers", "more than two speakers"): 3,
        ("triples", "none"): 1,
        ("triples", "blank"): 4,
    }
)
USED = {"calls": 2, "prompt_tokens": 1000, "completion_tokens": 500}
SPENT = {stage: {"answer": USED} for stage in ("dialogue", "head", "moderation", "narrative")}


def made(reasons=REASONS, spent=SPENT, prices=(0.0, 0.0), about=ABOUT):
    numbers = statistics.Statistics()
    numbers.add(ROW)
    return report.build(about, numbers, reasons, report.calls_of(spent, prices), {})


def test_stages_are_in_the_order_of_the_pipeline():
    """Oracle: by hand; of a stage the most frequent reason first. Filters are of conversations."""
    found = made()
    order = [(stage, reason) for stage, rows in found["rejected"].items() for reason in rows]
    assert order == [
        ("triples", "blank"),
        ("triples", "none"),
        ("dialogue", "failed: timeout"),
        ("speakers", "more than two speakers"),
        ("commonsense", "head is not in the narrative"),
    ]
    assert list(found["calls"]) == ["narrative", "dialogue", "head", "moderation"]
    assert (found["triples"], found["conversations"], found["records"]) == (12, 5, 1)


def test_filters_in_the_papers_base():
    """Oracle: section 3.1: its shares of what reaches each filter leave the 68.9% that it keeps."""
    paper = dict(paper_tables.SODA["filters"])
    kept = paper.pop("kept")
    assert tuple(paper) == postprocess.FILTERS
    assert 100 * math.prod(1 - share / 100 for share in paper.values()) == pytest.approx(
        kept, abs=0.1
    )
    # Five conversations: three of them are dropped by the third filter, one by the last.
    found = made()
    rows = found["filters"]
    assert rows["speakers"] == {"reached": 5, "dropped": 3, "percent_of_reached": 60.0}
    assert rows["human"]["reached"] == 2
    assert rows["commonsense"] == {"reached": 2, "dropped": 1, "percent_of_reached": 50.0}
    text = report.table(found)
    assert re.search(r"commonsense +2 +1 +50.0% +1.7% +20.0%", text)
    assert re.search(r"passed all +1 +68.9% +20.0%", text)


def test_broken_rows_of_a_file_are_no_conversations():
    """Oracle: counting, for `postprocess`, whose first stage reads records."""
    found = made(collections.Counter({("read", "broken row"): 2}))
    assert (found["triples"], found["conversations"]) == (3, 1)


def test_cost_is_a_column_where_there_are_prices():
    """Oracle: 4 stages of 1,000 tokens in at 2 a million and 500 out at 6: 0.02."""
    assert "cost" not in report.table(made())
    paid = made(prices=(2.0, 6.0))
    assert paid["cost"] == pytest.approx(0.02)
    assert "cost 0.0200" in report.table(paid)


def test_keywords_of_a_relation_are_not_those_of_all():
    """Oracle: table 3, whose relations exclude the keywords common to all."""
    words = collections.Counter({"home": 5, "apple": 3})
    total = words + collections.Counter({"home": 1, "pear": 20})
    assert statistics.keywords(words, total) == ["home", "apple"]
    assert statistics.keywords(words, total, ["home"]) == ["apple"]


def test_the_card_says_what_is_public_and_true():
    """Oracle: by hand. No address, no folder of the machine; zero is a seed, not a no."""
    text = card.card(made(), ROW)
    assert text.startswith("---\nlanguage: en\n") and "data_files: soda.jsonl" in text
    assert "10.0.0.7" not in text and "/home/ann" not in text
    assert "| Canary's labels | labels.jsonl |" in text and "moderation service | none" in text
    assert "| seed of names and samples | 0 |" in text
    assert "| model asked which speakers are human | no |" in text
    assert "taken out by: Canary's labels" in text
    assert "Bob: Hello | to you." in text and "valid 1." in text
    assert "| 1 | 2.0 |" in text  # table 2
    assert "| xWant | 100.0% | 1 |" in text  # table 3
    unsafe = card.card(made(about=ABOUT | {"canary": None}))
    assert "No safety filter was used" in unsafe and "```" not in unsafe


@pytest.mark.parametrize("prices", [(0.0, 0.0), (2.0, 6.0)])
def test_everything_is_left_in_the_folder(tmp_path, prices):
    """Property: four files, with records and rejections or without any."""
    pytest.importorskip("matplotlib")
    for name, row, found in (
        ("some", json.dumps(ROW) + "\n", made(prices=prices)),
        ("none", "", made(collections.Counter(), {}, prices)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "soda.jsonl").write_text(row)
        report.write(folder, found)
        assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((folder / "report.json").read_text()) == found
        assert (folder / "README.md").exists() and (folder / "report.txt").exists()


def test_every_reason_is_explained_once():
    """Oracle: by hand; the longer beginning wins over the shorter one."""
    found = made()
    text = card.card(found)
    assert "| more than two speakers | dialogues of exactly two are kept |" in text
    assert "  blank: head or tail has a gap to fill in (___)" in report.table(found)
    names = ["more than 20 turns", "duplicate dialogue", "failed: timeout", "blank", "blank"]
    told = dict(reasons.explained(names))
    assert list(told) == names[:-1] and told["more than 20 turns"] == "too long a dialogue"
    assert told["duplicate dialogue"] != reasons.MEANINGS["duplicate"]
