"""Pairs and model judges. Oracles: files made by hand, and models whose taste is known."""

import json
import re

import pytest

from cosmo.engine.base.errors import DataError, UserError
from data_pipeline import __main__ as command
from data_pipeline.annotation import answers as a
from data_pipeline.annotation import model_judge, pairs, report
from data_pipeline.annotation.task_files import read_task, write_task
from data_pipeline.co3 import prompts
from data_pipeline.co3.teacher import voice
from tests.data_pipeline.annotation_samples import answer, item, task
from tests.data_pipeline.scripted_model import scripted


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def predictions(path, name, ids=range(12)):
    rows = [
        {"id": f"c{n}", "inputs": f"Ann is sad. <sep> Imagine you are Bo and speak to Ann <sep> "
         f"Hello {n} <turn> Hi", "targets": "x", "prediction": f"{name} {n}"}
        for n in ids
    ]  # fmt: skip
    return write(path, rows)


def run(*arguments):
    return command.main(["annotate", *map(str, arguments), "--quiet"])


def test_a_sample_depends_on_seed_and_ids_alone():
    """Oracle: the reversed list; another seed draws others; a larger sample holds the smaller."""
    ids = [f"d{n}" for n in range(200)]
    drawn = pairs.sample(ids, 20, 5)
    assert drawn == pairs.sample(ids[::-1], 20, 5) and len(set(drawn)) == 20
    assert pairs.sample(ids, 30, 5)[:20] == drawn != pairs.sample(ids, 20, 6)
    with pytest.raises(UserError, match="only 200 of 201"):
        pairs.sample(ids, 201, 5)


def test_pairs_of_predictions(tmp_path):
    """Oracle: the records; the order of the files does not matter; the role is not shown."""
    one = predictions(tmp_path / "one.jsonl", "one")
    two = predictions(tmp_path / "two.jsonl", "two", reversed(range(12)))
    flags = ["--preset=PD-response", f"--a={one}", f"--b={two}", "--items=5", "--seed=4"]
    assert run("pairs", *flags, f"--output={tmp_path / 't.jsonl'}") == 0
    made = read_task(tmp_path / "t.jsonl")
    assert made.systems == ("one", "two") and made.judges_per_item == 3 and len(made.items) == 5
    first = made.items[0]
    number = first.id.removeprefix("c")
    assert first.context == (f"Hello {number}", "Hi") and first.narrative == "Ann is sad."
    assert first.options == ((f"one {number}",), (f"two {number}",))
    predictions(one, "one", reversed(range(12)))
    run("pairs", *flags, f"--output={tmp_path / 'u.jsonl'}")
    assert read_task(tmp_path / "u.jsonl").fingerprint == made.fingerprint


def test_filters_and_contexts(tmp_path):
    """Oracle: labels and turns by hand: c0 casual, c1 without label, c2 too short, c3 equal."""
    one = predictions(tmp_path / "one.jsonl", "one", range(6))
    two = predictions(tmp_path / "two.jsonl", "two", range(6))
    rows = [json.loads(line) for line in two.read_text().splitlines()]
    rows[3]["prediction"] = "one 3"
    write(two, rows)
    turns = [["Hi", "No", "Why"] if n != 2 else ["Hi"] for n in range(6)]
    contexts = write(
        tmp_path / "c.jsonl", [{"id": f"c{n}", "turns": t} for n, t in enumerate(turns)]
    )
    labels = write(
        tmp_path / "l.jsonl",
        [{"id": f"c{n}", "label": "__casual__" if n == 0 else "__needs_caution__"}
         for n in range(6) if n != 1],
    )  # fmt: skip
    flags = ["--preset=PD-steer", f"--a={one}", f"--b={two}", "--items=2", "--min_turns=2"]
    flags += [f"--contexts={contexts}", f"--output={tmp_path / 't.jsonl'}"]
    assert run("pairs", *flags) == 1  # no labels
    assert run("pairs", *flags, f"--labels={labels}") == 0
    made = read_task(tmp_path / "t.jsonl")
    assert {i.id for i in made.items} == {"c4", "c5"}
    assert made.made_by["left_out"] == {
        "casual": 1, "no label": 1, "fewer than 2 turns": 1, "equal responses": 1,
    }  # fmt: skip


def test_responses_below_each_other(tmp_path, capsys):
    """Oracle: table 12's form: context, reference, then each system."""
    one, two = (predictions(tmp_path / f"{n}.jsonl", n, range(1)) for n in ("one", "two"))
    assert run("show", "--predictions", one, two, "--items=1") == 0
    assert capsys.readouterr().out.splitlines() == [
        "c0: Ann is sad.", "A: Hello 0", "B: Hi", "  reference: x", "  one: one 0", "  two: two 0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"id": "c0", "prediction": "x"}], "lacks 11 of the 12 ids"),
        ([{"prediction": "x"}], "field 'id' is missing"),
        ([{"id": "c0", "prediction": "x"}] * 2, "an id twice"),
        ([{"id": "c0", "prediction": ["x"]}], "field 'prediction'"),
        (
            [{"id": f"c{n}", "prediction": "x", "inputs": "Bye"} for n in range(12)],
            "id 'c0' answers 'Bye', but in",
        ),
    ],
)
def test_bad_predictions_are_one_error(tmp_path, capsys, rows, problem):
    """Oracle: the fault of each file."""
    one = predictions(tmp_path / "one.jsonl", "one")
    two = write(tmp_path / "two.jsonl", rows)
    output = tmp_path / "t.jsonl"
    code = run("pairs", "--page=prosocial", f"--a={one}", f"--b={two}", f"--output={output}")
    printed = capsys.readouterr().err.splitlines()
    assert code == 1 and len(printed) == 1 and problem in printed[0] and not output.exists()


def test_why_too_few_can_be_drawn(tmp_path, capsys):
    """Oracle: all twelve responses are equal; one file is no two systems."""
    one, two = (predictions(tmp_path / f"{name}.jsonl", "same") for name in ("one", "two"))
    flags = (f"--a={one}", f"--b={two}", "--systems=a,b", f"--output={tmp_path / 't.jsonl'}")
    assert run("pairs", "--page=prosocial", "--items=3", *flags) == 1
    expected = "only 0 of 3 items can be drawn (left out: 12 x equal responses)"
    assert expected in capsys.readouterr().err
    assert run("pairs", "--page=prosocial", "--items=3", *flags, f"--b={one}") == 1
    assert "are one file" in capsys.readouterr().err and not (tmp_path / "t.jsonl").exists()


def test_marks_need_no_spaces_and_labels_are_known(tmp_path):
    """Oracle: the turns of the input; a label that ProsocialDialog does not have."""
    context = pairs.context_of(pairs.Prediction("c", "x", "A story.<sep>Hi<turn>You?<turn>Yes"))
    assert context.turns == ("Hi", "You?", "Yes") and context.narrative == "A story."
    path = write(tmp_path / "labels.jsonl", [{"id": "c0", "label": "safe"}])
    with pytest.raises(DataError, match="'label' has an unknown value: got 'safe'"):
        pairs.read_labels(path)


def test_a_judge_without_a_name_is_refused_before_any_call(tmp_path, capsys):
    """Oracle: no server is there, and the error is about the name."""
    write_task(tmp_path / "t.jsonl", task())
    common = ("judge", f"--task={tmp_path / 't.jsonl'}", "--base_url=http://127.0.0.1:1/v1")
    code = run(*common, f"--answers={tmp_path / 'a.jsonl'}", "--model=x", "--judge=a\nb")
    assert code == 1 and "judge: got 'model:a\\nb'" in capsys.readouterr().err
    assert run(*common, f"--answers={tmp_path}", "--model=x") == 1
    assert "is a folder: give the path of a file" in capsys.readouterr().err


def test_pairs_of_corpora_show_no_names(tmp_path):
    """Oracle: the sample corpora; SODA's narrative and names stay out, six questions remain."""
    flags = ["--preset=SC-dialogue", "--a=tasks/sample/soda", "--b=tasks/sample/dailydialog"]
    assert run("pairs", *flags, "--items=6", f"--output={tmp_path / 't.jsonl'}") == 0
    made = read_task(tmp_path / "t.jsonl")
    assert made.systems == ("soda", "dailydialog")
    assert sum(q.compares for q in made.page.questions) == 6
    assert all(not i.narrative and len(i.options) == 2 for i in made.items)
    with pytest.raises(DataError, match="not a corpus"):
        pairs.read_dialogues(write(tmp_path / "x.jsonl", [{"poem": "x"}]))


def test_tasks_of_dialogues(tmp_path):
    """Oracle: ProsocialDialog's first utterance is the problematic speaker's, on the left."""
    flags = ["--input=tasks/sample/prosocial", "--items=4", f"--output={tmp_path / 't.jsonl'}"]
    assert run("make", "--page=safety", *flags) == 0
    made = read_task(tmp_path / "t.jsonl")
    assert len(made.items) == 4 and made.items[0].side(1) == "left" and not made.systems
    rows = [{"id": "x", "context": ["a", "b"], "rots": ["Be kind."]}]
    source = write(tmp_path / "items.jsonl", rows)
    gold = write(
        tmp_path / "gold.jsonl", [{"id": "g", "context": ["a"], "expected": {"rule": ["none"]}}]
    )
    flags = ["--page=rots", f"--input={source}", f"--output={tmp_path / 'r.jsonl'}"]
    assert run("make", *flags, f"--gold={gold}", "--consent=I agree") == 0
    made = read_task(tmp_path / "r.jsonl")
    assert [(i.id, i.role) for i in made.items] == [("g", "gold"), ("x", "item")]
    assert made.page.consent == "I agree" and made.gold_every == 10


def test_models_answer_the_sampled_contexts_alone(tmp_path):
    """Oracle: the script's own words; the second start calls nothing."""
    contexts = write(
        tmp_path / "c.jsonl", [{"id": f"c{n}", "turns": [f"Hello {n}"]} for n in range(8)]
    )

    def reply(body):
        return f"Speaker 2: {body['model']} heard {body['messages'][1]['content'][-1]}"

    with scripted(reply) as (url, asked):
        flags = ["--page=responses", f"--a=small@{url}", f"--b=large@{url}", "--items=3"]
        flags += [f"--contexts={contexts}", f"--output={tmp_path / 't.jsonl'}"]
        assert run("pairs", *flags) == 0 and len(asked) == 6
        made = read_task(tmp_path / "t.jsonl")
        assert run("pairs", *flags) == 0 and len(asked) == 6
    assert made.systems == ("small", "large")
    number = made.items[0].id[1:]
    assert made.items[0].options == ((f"small heard {number}",), (f"large heard {number}",))
    assert url not in (tmp_path / "t.jsonl").read_text()


@pytest.mark.parametrize(("name", "wanted"), [
    ("instructgpt", "context:Ann and Bob talk.\ndialogue:\nHello\nHi there\nFine"),
    ("chatgpt", "context:\nAnn and Bob talk.\ndialogue:\nHello\nHi there\nFine\n"
     "What is the most appropriate next utterance (3 sentences max)?"),
])  # fmt: skip
def test_models_are_asked_by_the_papers_words(tmp_path, capsys, name, wanted):
    """Oracle: the prompts of Kim et al. 2023, appendix D; a line a turn."""
    turns = {"turns": ["Hello", "Hi\nthere", "Fine"], "narrative": "Ann and Bob talk."}
    rows = [{"id": "c0", **turns}, {"id": "c1", "turns": ["Hello"]}]
    contexts = write(tmp_path / "c.jsonl", rows[:1])
    ours = write(tmp_path / "ours.jsonl", [{"id": "c0", "inputs": "Fine", "prediction": "Good."}])
    with scripted(lambda body: "\n Glad to hear. \nMe too.") as (url, asked):
        flags = ["--page=responses", f"--a={ours}", f"--b=gpt@{url}", f"--prompt={name}"]
        flags += [f"--contexts={contexts}", f"--output={tmp_path / 't.jsonl'}"]
        assert run("pairs", *flags) == 0
        (message,) = asked[0]["messages"]
        assert message["role"] == "user" and message["content"].endswith("\n\n" + wanted)
        start = "You will be generating the next turn of a given dialogue between two people. Your "
        assert message["content"].startswith(start)
        (made,) = read_task(tmp_path / "t.jsonl").items
        assert made.options == (("Good.",), ("Glad to hear.",))
        write(contexts, rows[1:])
        models = ["--page=responses", f"--a=one@{url}", f"--b=two@{url}", *flags[3:]]
        assert run("pairs", *models) == 1 and len(asked) == 1
        assert "context 'c1' has no narrative" in capsys.readouterr().err
        assert run("pairs", "--page=responses", f"--a={ours}", f"--b={contexts}", *flags[3:]) == 1
        assert "no model is asked" in capsys.readouterr().err


def lines(choice):
    return "\n".join(
        f"**{key}**: {choice}"
        for key in ("prosocial", "engaged", "respectful", "coherent", "overall")
    )


def judged(tmp_path, made, reply, *more):
    """(exit code, the answers, the requests) of a run of the verb judge."""
    path, out = tmp_path / "task.jsonl", tmp_path / "answers.jsonl"
    write_task(path, made)
    with scripted(reply) as (url, asked):
        code = run("judge", f"--task={path}", f"--answers={out}", f"--base_url={url}",
                   "--model=script", *more)  # fmt: skip
    kept = a.read_answers(made, [out]) if out.read_bytes() else a.Answers(())
    return code, kept, asked


def test_a_model_that_prefers_the_second_system(tmp_path):
    """Oracle: its taste: in both orders it takes the text that begins with Second."""

    def reply(body):
        second_is_a = re.search(r"Response A:\nSecond", body["messages"][1]["content"])
        return lines("a" if second_is_a else "B")

    made = task(items=3)
    code, found, asked = judged(tmp_path, made, reply)
    assert code == 0 and len(found.kept) == len(asked) == 6
    assert {x.judge for x in found.kept} == {"model:script"}
    model = report.build(made, found)["models"]["model:script"]
    assert model["questions"]["overall"]["shares"]["second"] == 1.0
    one = model["by_order"]["overall"]
    assert (one["consistent"], one["share_a"]) == (1.0, 0.5)
    # The same command asks nothing, and adds nothing.
    code, again, asked = judged(tmp_path, made, reply)
    assert code == 0 and not asked and again.kept == found.kept


def test_answers_that_a_server_has_open_are_not_judged_into(tmp_path, capsys):
    """Oracle: one error while the lock is held; the model is not asked, and nothing is written."""
    made, out = task(items=1), tmp_path / "answers.jsonl"
    out.write_bytes(b"")
    with a.lock_answers(out):
        code, _, asked = judged(tmp_path, made, lambda body: lines("tie"))
        assert code == 1 and not asked and not out.read_bytes()
        assert "is in use by another process, such as `annotate serve`" in capsys.readouterr().err
    code, found, _ = judged(tmp_path, made, lambda body: lines("tie"))
    assert code == 0 and len(found.kept) == 2


def test_a_model_beside_people_in_one_file(tmp_path):
    """Oracle: people's answers stay; only what is missing is judged."""
    made = task(items=2)
    known = [answer(made, "i0"), answer(made, "i0", "model:script", order=(0, 1))]
    a.append_answers(tmp_path / "answers.jsonl", known)
    code, found, asked = judged(tmp_path, made, lambda body: lines("tie"))
    assert code == 0 and len(asked) == 3 and len(found.kept) == 5
    assert found.people() == known[:1]


def test_replies_that_cannot_be_read_are_asked_again_and_set_aside(tmp_path):
    """Oracle: i0 is refused always, i1 is readable at the second attempt."""

    def reply(body):
        words = body["messages"][1]["content"]
        if "First of i0" in words:
            return "I would rather not judge."
        return lines("a") if "could not be read" in words else lines("perhaps a")

    made = task(items=2)
    code, found, asked = judged(tmp_path, made, reply)
    assert code == 0 and {x.item for x in found.kept} == {"i1"} and len(asked) == 2 * (3 + 2)
    rows = [json.loads(s) for s in (tmp_path / "answers.jsonl.unreadable.jsonl").open()]
    assert {row["id"] for row in rows} == {"i0#ab", "i0#ba"}
    assert all(row["reason"].startswith("unreadable: question 'prosocial'") for row in rows)


def test_a_cap_stops_the_judge_and_the_same_command_resumes(tmp_path):
    """Oracle: exit code 3, then all answers."""
    made = task(items=3)
    code, found, _ = judged(tmp_path, made, lambda body: lines("a"), "--token_cap=3000")
    assert code == 3 and len(found.kept) < 6
    code, found, _ = judged(tmp_path, made, lambda body: lines("a"))
    assert code == 0 and len(found.kept) == 6


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        (lines("b"), "b"),
        (lines("Tie").replace("**", ""), "tie"),
        ("Here they are:\n- " + lines("'A'").replace("\n", ".\n- "), "a"),
        (lines("a = A"), "a"),
        (lines("c"), None),
        (lines("a") + "\noverall: b", None),
        ("overall: a", None),
        ("", None),
    ],
)
def test_reading_a_reply(text, choices):
    """Oracle: what a person would read."""
    made = task()
    if choices is None:
        with pytest.raises(ValueError, match="question"):
            model_judge.read_reply(made, made.items[0], text)
        return
    assert set(model_judge.read_reply(made, made.items[0], text).values()) == {choices}


def test_a_page_without_choices_has_no_judge():
    """Oracle: proofreading is writing."""
    with pytest.raises(UserError, match="no question of choices"):
        model_judge.judgements(task("proofreading"), [], "model:x")
    left = model_judge.judgements(
        task(content=[item("q", role="qualification", expected={"overall": ["tie"]}), item("i")]),
        [],
        "model:x",
    )
    assert list(left) == ["i#ab", "i#ba"]
    words = model_judge.prompt(task("safety"), task("safety").items[0], ())
    assert "label.1:" in words and "label.3:" in words and "violet: I took" in words


def test_the_scripted_teacher_can_judge():
    """Oracle: the reader of replies, in both forms; another seed may choose otherwise."""
    made = task("dialogues", items=3)
    teacher = voice.Voice(prompts.load())
    seen = set()
    for seed, one in enumerate(made.items):
        asked = next(model_judge.judge_stage(made, one, (0, 1)))
        messages = [{"role": r, "content": c} for r, c in asked.messages]
        for form, words in (("completion", asked.prompt), ("chat", messages)):
            text = teacher.answer(form, words, seed).text
            seen.add(tuple(model_judge.read_reply(made, one, text).values()))
    assert len(seen) > 1


PAGE = """
title = "How sure are they?"
shows = ["context"]
warning = ""
questions = [
  {id = "sure", kind = "choice", scale = "interval", text = "How sure is {who}?", choices = [
    {id = "1", text = "not at all", value = 1}, {id = "2", text = "somewhat", value = 2},
    {id = "5", text = "very", value = 5},
  ]},
]
"""


def test_a_page_of_ones_own(tmp_path, capsys):
    """Oracle: alpha of the interval scale by hand: pairs (1, 2) and (5, 5).

    Observed 1 / 2; expected the mean squared difference of 1, 2, 5, 5: (1 + 2 * 16 + 2 * 9) / 6.
    """
    page = tmp_path / "sure.toml"
    page.write_text(PAGE)
    rows = [{"id": f"i{n}", "context": ["Hm."], "texts": {"who": "Ann"}} for n in range(2)]
    source, path = write(tmp_path / "items.jsonl", rows), tmp_path / "t.jsonl"
    flags = [f"--page={page}", f"--input={source}", f"--output={path}"]
    assert run("make", *flags) == 0
    made = read_task(path)
    assert made.page.name == "sure"
    votes = {"i0": ("1", "2"), "i1": ("5", "5")}
    answers = [
        answer(made, name, judge, {"sure": vote})
        for name, both in votes.items()
        for judge, vote in zip(("ann", "bob"), both, strict=True)
    ]
    found = report.build(made, a.Answers(tuple(answers)))["people"]["questions"]["sure"]
    assert found["alpha"]["interval"] == pytest.approx(1 - (1 / 2) / (51 / 6))
    write(source, [{"id": "i0", "context": ["Hm."]}])
    assert run("make", *flags) == 1 and "no text 'who'" in capsys.readouterr().err
    odd = PAGE.replace('["context"]', "5", 1)
    for text, problem in ((odd, "expected a list"), ("x", "is no page"), ("", "is missing")):
        page.write_text(text)
        assert run("make", *flags) == 1 and problem in capsys.readouterr().err
