"""Task files and answers. Oracles: the papers' pages as specified, and files made by hand."""

import dataclasses
import json

import pytest

from cosmo.engine.base.errors import DataError, UserError
from data_pipeline import __main__ as command
from data_pipeline.annotation import answers as a
from data_pipeline.annotation import pages, report, report_text
from data_pipeline.annotation.fields import plain
from data_pipeline.annotation.task_files import Item, fields, read_task, write_task
from tests.data_pipeline.annotation_samples import GOOD, TURNS, answer, item, task

PAGES = pages.names()


def test_the_pages_ask_what_the_papers_ask():
    """Oracle: the specification of figures 4, 5, 7 to 10, appendix C.3 and B.1."""
    ids = {name: [q.id for q in pages.load(name).questions] for name in PAGES}
    compared = {n: [q.id for q in pages.load(n).questions if q.compares] for n in PAGES}
    assert len(compared["dialogues"]) == 6 and len(ids["dialogues"]) == 9
    assert compared["responses"] == ["natural", "consistent", "specific", "overall"]
    assert len(compared["prosocial"]) == len(ids["prosocial"]) == 5
    assert {q.id: len(q.choices) for q in pages.load("dialogues").questions}["natural"] == 4
    assert {q.id: len(q.choices) for q in pages.load("prosocial").questions}["overall"] == 3
    assert pages.load("rots").question("response").least == 31  # more than 30 characters
    assert pages.load("proofreading").question("changes").least == 1
    colours = {c.id: c.colour for c in pages.load("safety").question("label").choices}
    assert colours == {"caution": "yellow", "intervention": "red", "casual": "blue"}
    presets = pages.presets()
    numbers = {name: (p.items, p.judges_per_item) for name, p in presets.items()}
    assert numbers == {
        "PD-response": (400, 3), "PD-steer": (600, 3), "SC-dialogue": (300, 3),
        "SC-response": (100, 3), "SC-nocontext": (100, 3),
    }  # fmt: skip
    seven = pages.load("dialogues", presets["SC-nocontext"].questions)
    assert sum(q.compares for q in seven.questions) == 7


@pytest.mark.parametrize("page", PAGES)
def test_a_task_is_read_as_it_was_written(tmp_path, page):
    """Oracle: equality, and the fingerprint, which changes with any word."""
    made = task(page, items=2)
    write_task(tmp_path / "task.jsonl", made)
    read = read_task(tmp_path / "task.jsonl")
    assert read == made and read.fingerprint == made.fingerprint
    other = dataclasses.replace(made, page=dataclasses.replace(made.page, title="Another"))
    assert other.fingerprint != made.fingerprint
    assert dataclasses.replace(made, made_by={"by": "me"}).fingerprint == made.fingerprint


@pytest.mark.parametrize("page", PAGES)
def test_good_answers_pass(page):
    """Oracle: answers written by hand for each page."""
    a.check_answer(task(page), answer(task(page)))


@pytest.mark.parametrize(
    ("page", "changes", "problem"),
    [
        ("prosocial", {"overall": "best"}, "expected one of"),
        ("prosocial", {"overall": None}, "expected one of"),
        ("prosocial", {"speed": "a"}, "unknown question"),
        ("dialogues", {"aspect": "natural"}, "'aspect_other': answered, although"),
        ("dialogues", {"reasons": "short"}, "at least 10 characters"),
        ("rots", {"response": "x" * 30}, "at least 31 characters"),
        ("rots", {"response": " " * 40}, "at least 31 characters"),
        ("rots", {"chosen_rules": [1, 2, 3]}, "at most 2"),
        ("rots", {"chosen_rules": [4]}, "different numbers"),
        ("rots", {"chosen_rules": []}, "1 or more"),
        ("rots", {"no_personal_data": False}, "agreed to"),
        ("proofreading", {"changes": {}}, "at least 1 rewritten"),
        ("proofreading", {"changes": {"2": TURNS[1] + " "}}, "another text"),
        ("proofreading", {"changes": {"4": "new"}}, "numbers of"),
        ("proofreading", {"changes": {"1": " "}}, "no empty text"),
        ("safety", {"label.2": "casual"}, "unknown question 'label.2'"),
        ("validation", {"harsh": [1]}, "different numbers of [2]"),
        ("validation", {"incoherent": [3, 3]}, "different numbers"),
        ("commonsense", {"head": "maybe"}, "expected one of"),
    ],
)
def test_bad_answers_are_refused(page, changes, problem):
    """Oracle: the rule of the page that each breaks."""
    made = task(page)
    with pytest.raises(ValueError, match="question") as error:
        a.check_answer(made, answer(made, answers={**GOOD[page], **changes}))
    assert problem in str(error.value)


@pytest.mark.parametrize("page", [p for p in PAGES if p != "validation"])
def test_every_required_question_must_be_answered(page):
    """Oracle: each answer taken away in turn; those after it hang on no other."""
    made = task(page)
    for key in GOOD[page]:
        if not made.page.question(key.partition(".")[0]).required:
            continue
        left = {k: v for k, v in GOOD[page].items() if k != key}
        with pytest.raises(ValueError, match=r"not answered|although it was not asked"):
            a.check_answer(made, answer(made, answers=left))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rows: rows[0].update(format="soda"), "no task file"),
        (lambda rows: rows[0]["page"].update(color="red"), "unknown field 'color'"),
        (lambda rows: rows[0].update(systems=["one"]), "names of two"),
        (lambda rows: rows[0].update(judges_per_item=0), "1 or more"),
        (lambda rows: rows[0]["page"]["questions"][0].update(kind="poem"), "kind 'poem'"),
        (lambda rows: rows[0]["page"]["questions"][0].update(id="token"), "be one of token"),
        (lambda rows: rows[1].pop("options"), "'options' is missing"),
        (lambda rows: rows[1].update(options=[["a"], "b"]), "lists of texts"),
        (lambda rows: rows[1].update(context=["", "b"]), "none empty"),
        (lambda rows: rows[2].update(id="i0"), "an id twice"),
        (lambda rows: rows[2].update(role="gold"), "expects no answer"),
        (lambda rows: rows[2].update(role="gold", expected={"overall": ["b"]}), "some of"),
        (lambda rows: rows[2].update(seed=1), "unknown field 'seed'"),
        (lambda rows: rows.__delitem__(slice(1, None)), "without items"),
        (lambda rows: rows.clear(), "an empty file"),
    ],
)
def test_a_broken_task_file_is_one_clear_error(tmp_path, change, problem):
    """Oracle: the field that was changed."""
    path, made = tmp_path / "task.jsonl", task(items=3)
    rows = json.loads(json.dumps([made.head(), *map(plain, made.items)]))
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        read_task(path)
    assert problem in str(error.value) and str(path) in str(error.value)


def test_speakers_who_do_not_alternate():
    """Oracle: sides given by hand; without them turns alternate from the left."""
    made = task("safety", content=[item(page="safety", speakers=("left", "left", "right"))])
    assert [f.key for f in fields(made.page, made.items[0])] == [
        "label.1", "reason.1", "label.2", "reason.2",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="a speaker"):
        Item("x", context=("a", "b"), speakers=("left",))


def write_answers(path, rows):
    path.write_bytes(b"".join(r if isinstance(r, bytes) else r.line() for r in rows))
    return path


def test_bad_lines_are_set_aside_with_their_reason(tmp_path):
    """Oracle: one good line, and one of each kind of bad ones."""
    made = task(min_seconds=5.0)
    good = answer(made, seconds=9.0)
    rows = [
        good,
        answer(made, "i1", seconds=2.0),
        good,
        dataclasses.replace(good, item="i9"),
        dataclasses.replace(good, task="0" * 16, judge="bob"),
        dataclasses.replace(good, order=(), judge="bob"),
        dataclasses.replace(good, judge=" "),
        b'{"task": 5}\n',
        b"[]\n",
        answer(made, "i2", judge="bob", seconds=9.0).line()[:80],  # cut in the middle
    ]
    found = a.read_answers(made, [write_answers(tmp_path / "a.jsonl", rows)])
    assert found.kept == (good,)
    expected = ["less than 5 s", "doubled", "unknown item", "of another task", "order:", "judge:",
                "missing", "expected an object", "cut or damaged"]  # fmt: skip
    assert [e in q.reason for e, q in zip(expected, found.quarantined, strict=True)] == [True] * 9
    assert [q.line for q in found.quarantined] == list(range(2, 11))
    a.write_quarantined(tmp_path / "q.jsonl", found.quarantined)
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 9


def test_reasons_of_one_kind_are_counted_together(tmp_path):
    """Oracle: three answers sent twice, two too fast, two of times whose sum would overflow."""
    made = task(min_seconds=5.0)
    good = [answer(made, f"i{n}", seconds=9.0) for n in range(3)]
    fast = [answer(made, f"i{n}", "bob", seconds=n + 1.5) for n in range(2)]
    long = [answer(made, f"i{n}", "eve", seconds=1.7e308) for n in range(2)]
    path = write_answers(tmp_path / "a.jsonl", [*good, *good, *fast, *long])
    counted = report.build(made, a.read_answers(made, [path]))["quarantined"]
    assert counted == {"doubled": 3, "answered too fast": 2, "seconds": 2}


def test_names_that_may_be_one_person_are_reported(tmp_path):
    """Oracle: two spellings of ann; Model:x is a model, whatever its case."""
    made = task()
    rows = [answer(made, "i0", judge) for judge in ("ann", "Ann", "bob", "Model:x")]
    found = a.read_answers(made, [write_answers(tmp_path / "a.jsonl", rows)])
    assert found.similar_names == (("Ann", "ann"),) and list(found.models()) == ["Model:x"]
    text = report_text.text(report.build(made, found))
    assert "judges 'Ann', 'ann' are counted as 2 persons" in text


def test_a_model_may_answer_in_both_orders(tmp_path):
    """Oracle: two orders are two answers, the same order twice is one."""
    made = task()
    both = [answer(made, judge="model:x", order=order) for order in a.ORDERS]
    found = a.read_answers(made, [write_answers(tmp_path / "a.jsonl", [*both, both[0]])])
    assert len(found.kept) == 2 and "doubled" in found.quarantined[0].reason


def test_two_judges_of_one_name(tmp_path):
    """Oracle: the second answer to one item is set aside, and the shared name is given."""
    made = task()
    one = write_answers(tmp_path / "one.jsonl", [answer(made, "i0"), answer(made, "i1")])
    two = write_answers(tmp_path / "two.jsonl", [answer(made, "i0"), answer(made, "i2")])
    found = a.read_answers(made, [one, two])
    assert [x.item for x in found.kept] == ["i0", "i1", "i2"]
    assert "one.jsonl:1" in found.quarantined[0].reason and found.shared_names == ("ann",)


def test_answers_of_another_task_and_no_answers_are_errors(tmp_path):
    """Oracle: one line that names the file."""
    made, other = task(), task("responses")
    path = write_answers(tmp_path / "a.jsonl", [answer(other)])
    with pytest.raises(DataError, match=r"a\.jsonl: the answers are of another task"):
        a.read_answers(made, [path])
    with pytest.raises(DataError, match="no answers"):
        a.read_answers(made, [write_answers(tmp_path / "b.jsonl", [])])
    with pytest.raises(DataError, match="cannot be read"):
        a.read_answers(made, [tmp_path / "missing.jsonl"])


def test_appending_after_a_cut_line_loses_no_other(tmp_path):
    """Oracle: the answers before and after the cut."""
    made, path = task(), tmp_path / "a.jsonl"
    a.append_answers(path, [answer(made, "i0"), answer(made, "i1")])
    path.write_bytes(path.read_bytes()[:-30])
    a.append_answers(path, [answer(made, "i1"), answer(made, "i2")])
    found = a.read_answers(made, [path])
    assert [x.item for x in found.kept] == ["i0", "i1", "i2"] and len(found.quarantined) == 1
    with pytest.raises(UserError, match="cannot write"):
        a.append_answers(tmp_path / "no" / "a.jsonl", [answer(made)])


def test_verbs_of_two_words_are_a_group(capsys):
    """Oracle: help with code 0 where it was asked for, else 2; flags are those of the second."""
    assert command.main(["annotate", "--help"]) == 0
    assert "annotate pairs" in capsys.readouterr().out
    assert command.main(["annotate"]) == command.main(["annotate", "dance"]) == 2
    assert "no verb 'annotate dance': annotate pairs" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        command.main(["annotate", "report", "--answers", "a", "--task=t", "--sed=1"])
    assert stop.value.code == 2 and "did you mean --seed" in capsys.readouterr().err
