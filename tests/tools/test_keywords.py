"""`python -m tools.keywords`. Oracles: counts by hand over a scripted model's answers."""

import json

import pytest

from cosmo.engine.base.errors import DataError
from tests.data_pipeline.scripted_model import scripted
from tools import keywords

ROWS = [
    ("xReact", "Ann is proud."), ("xReact", "Bo is proud and tired."), ("xReact", "Nothing."),
    ("xWant", "Cid looks for a job."),
]  # fmt: skip
ANSWERS = {
    "Ann is proud.": "Pride, friend.",
    "Bo is proud and tired.": "Keywords: pride, Pride,\n2. being tired\n- work",
    "Nothing.": "I am sorry that I have no keywords for this.",
    "Cid looks for a job.": "job",
}


def soda(path, rows=ROWS):
    lines = [json.dumps({"relation": r, "narrative": n}) for r, n in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def reply(body):
    text = body["messages"][0]["content"]
    return next(answer for narrative, answer in ANSWERS.items() if narrative in text)


def test_keywords_are_counted_by_relation(tmp_path, capsys, caplog):
    """Oracle: by hand: once a narrative, case ignored, sentences left out; a second run is free."""
    path, out = soda(tmp_path / "soda.jsonl"), tmp_path / "out"
    with scripted(reply) as (url, asked):
        command = [f"--input={path}", f"--output={out}", f"--base_url={url}", "--model=m"]
        assert keywords.main(command) == 0
        assert keywords.main(command) == 0
        assert len(asked) == 4  # the journal answers the second time
    made = json.loads((out / "keywords.json").read_text())
    assert made == {
        "xReact": {
            "narratives": 2,
            "keywords": {"pride": 2, "being tired": 1, "friend": 1, "work": 1},
        },
        "xWant": {"narratives": 1, "keywords": {"job": 1}},
    }
    assert list(made["xReact"]["keywords"]) == ["pride", "being tired", "friend", "work"]
    lines = [json.loads(line) for line in (out / "keywords.jsonl").read_text().splitlines()]
    assert {one["id"]: one["keywords"] for one in lines}["soda-train-1"] == [
        "pride", "being tired", "work",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "frustration, anger" in printed and "pride, being tired" in printed
    assert "no keywords of soda-train-2" in caplog.text


def test_answers_are_cut_into_keywords():
    """Oracle: by hand."""
    assert keywords.parsed("1) Hope; , 2) fear.") == ["hope", "fear"]
    assert keywords.parsed("a, b, c, d, e, f") == ["a", "b", "c", "d", "e"]
    assert keywords.parsed("a text of many words") == [] and keywords.parsed(" ") == []


def test_the_sample_is_of_each_relation(tmp_path):
    """Oracle: by hand: at most so many of each, the same ones for the same seed."""
    path = soda(tmp_path / "soda.jsonl")
    chosen = keywords.drawn(keywords.narratives(path, "train"), 2, 0)
    assert sorted(relation for relation, _ in chosen.values()) == ["xReact", "xReact", "xWant"]
    assert chosen == keywords.drawn(keywords.narratives(path, "train"), 2, 0)


def test_a_row_without_a_narrative_is_named(tmp_path):
    """Oracle: file, line and field."""
    path = soda(tmp_path / "soda.jsonl", [*ROWS, ("xWant", " ")])
    with pytest.raises(DataError, match=r"soda\.jsonl:5: field 'narrative'"):
        list(keywords.narratives(path, "train"))
