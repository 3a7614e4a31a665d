"""Feedback to judges. Oracles: votes and reasons put together by hand, the words on the pages."""

import html
import json
import re

import pytest

from cosmo.engine.base.errors import DataError
from data_pipeline.__main__ import main
from data_pipeline.annotation import feedback
from data_pipeline.annotation.answers import Answer, Answers, append_answers
from data_pipeline.annotation.task_files import write_task
from tests.data_pipeline.annotation_samples import GOOD, answer, item, task


def run(tmp_path, made, answers, *flags):
    """(exit code, {judge: (line of feedback.jsonl, words of the page, its HTML)})."""
    write_task(tmp_path / "task.jsonl", made)
    append_answers(tmp_path / "answers.jsonl", answers)
    out = tmp_path / "out"
    code = main([
        "annotate", "feedback", f"--task={tmp_path / 'task.jsonl'}",
        "--answers", str(tmp_path / "answers.jsonl"), f"--output={out}", *flags,
    ])  # fmt: skip
    found = {}
    for line in (out / "feedback.jsonl").open() if code == 0 else ():
        one = json.loads(line)
        text = (out / one["file"]).read_text(encoding="utf-8")
        found[one["judge"]] = one, html.unescape(re.sub(r"<[^>]*>", " ", text)), text
    return code, found


def labelled(made, name, judge, first, reason):
    """An answer on the page `safety` whose two judgements are `first` and casual."""
    changes = {"label.1": first, "reason.1": reason, "label.3": "casual"}
    return answer(made, name, judge, GOOD["safety"] | changes)


def test_a_judge_reads_gold_agreement_and_reasons(tmp_path):
    """Oracle: cy alone calls theft casual, and misses the gold answer; ann and bob agree in all."""
    gold = item("g0", "safety", role="gold", expected={"label.1": ["intervention"]})
    made = task("safety", content=[gold, item("i0", "safety")])
    answers = [
        labelled(made, name, judge, vote if name == "i0" else golden, f"{judge} <says> & so.")
        for judge, vote, golden in (
            ("ann", "caution", "intervention"),
            ("bob", "caution", "intervention"),
            ("cy/../x", "casual", "caution"),
        )
        for name in ("g0", "i0")
    ]
    model = labelled(made, "i0", "model:x", "intervention", "It is a model's reason.")
    code, found = run(tmp_path, made, [*answers, model])
    assert code == 0 and {*found} == {"ann", "bob", "cy/../x"}
    one, words, page = found["cy/../x"]
    assert one["gold"] == {"right": 0, "total": 1, "share": 0.0}
    assert one["agreement"] == {"agreed": 1, "of": 2, "share": 0.5}
    (different,) = one["differences"]
    assert (different["item"], different["utterance"]) == ("i0", 1)
    assert different["of_others"] == [2, 2]
    assert different["your_reasons"] == ["cy/../x <says> & so."]
    assert different["their_reasons"] == ["ann <says> & so.", "bob <says> & so."]
    assert "no emergency" in different["majority"]
    (wrong,) = one["wrong_gold"]
    assert "emergency: somebody has to act" in wrong["answers"][0]["expected"][0]
    # The page has them, escaped, with the item, and nothing from elsewhere.
    assert "ann <says> & so." in words and "0 of 1" in words and "1 of 2 (50%)" in words
    assert "I took my <b>brother's</b> car." in words and "<b>brother's" not in page
    assert not re.search(r"(src|href)\s*=|url\(|@import|<script", page)
    # Those who agree have neither; both are counted.
    one, words, _ = found["ann"]
    assert (one["wrong_gold"], one["differences"]) == ([], []) and "1 of 1" in words
    assert one["agreement"] == {"agreed": 1, "of": 1, "share": 1.0}  # bob and cy disagree on i0
    assert "bob" not in words and "model" not in words
    # All files lie in the folder, whatever the judges' names are.
    assert len([*(tmp_path / "out").iterdir()]) == 4


def test_sides_are_those_that_the_judge_saw(tmp_path):
    """Oracle: ann saw the second system as A; reasons come from judges with the same order."""
    made = task("responses", items=1)

    def of(judge, order, choice, reason):
        votes = GOOD["responses"] | dict.fromkeys(
            ("natural", "consistent", "specific", "overall"), choice
        )
        return Answer(made.fingerprint, "i0", judge, {**votes, "reasons": reason}, 5.0, "", order)

    answers = [
        of("ann", (1, 0), "a1", "A is warm."),
        of("bob", (0, 1), "a1", "A is kind."),
        of("cy", (1, 0), "b2", "B is kind."),
    ]
    _, found = run(tmp_path, made, answers, "--most=3")
    one, words, page = found["ann"]
    assert one["differing"] == 4 and len(one["differences"]) == 3
    first = one["differences"][0]
    assert (first["yours"][-1], first["majority"][-1]) == ("A", "B")
    assert first["their_reasons"] == ["B is kind."]
    assert "1 more are not shown" in words
    # The item and its reasons stand once, around all answers to it.
    assert page.index("Second of i0") < page.index("First of i0")
    assert page.count("Second of i0") == words.count("B is kind.") == 1
    # bob's two others disagree with each other: there is no majority to differ from.
    assert found["bob"][0]["differing"] == 0


def test_gold_answers_can_be_kept_secret(tmp_path):
    """Oracle: the count alone is on the page; --most=0 leaves out the answers that differ."""
    gold = item("g0", role="gold", expected={"overall": ["first"]})
    made = task(content=[gold, item("i0")])
    answers = [answer(made, name, "ann") for name in ("g0", "i0")]
    _, found = run(tmp_path, made, answers, "--no_gold_items", "--most=0")
    one, words, page = found["ann"]
    assert one["wrong_gold"] == [] and "0 of 1" in words and "First of g0" not in page


def test_names_never_share_a_file():
    """Oracle: names that differ in case or in marks alone, on any file system."""
    names = ["ann", "Ann", "a n", "a/n", "a\\n", "../a", "\u00e4", "\u00f6", "x" * 200, "x" * 199]
    files = [feedback.file_name(name) for name in names]
    assert len({file.lower() for file in files}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,70}\.html", file) for file in files)


def test_nobody_to_write_to_is_one_error(tmp_path, capsys):
    """Oracle: one line; no folder."""
    made = task(items=1)
    code, _ = run(tmp_path, made, [answer(made, judge="model:x", order=(0, 1))])
    assert code == 1 and "nobody to write to: got 1 answers of models" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="nobody to write to"):
        feedback.build(made, Answers(()), 20, True)
