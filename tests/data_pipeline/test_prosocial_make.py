"""Drafts, rounds, validation, labels; kills. Oracles: by hand, the reader of the published rows."""

import json
import random
import shutil
import subprocess
import sys
import time

import pytest

from cosmo.engine.base.errors import DataError, UserError
from cosmo.tasks.readers import read_prosocial
from data_pipeline import __main__ as command
from data_pipeline.annotation import pages
from data_pipeline.annotation.answers import Answer, append_answers, check_answer
from data_pipeline.annotation.task_files import Item, Task, read_task
from data_pipeline.calls.requests import Rejected, Response
from data_pipeline.co3 import prompts as co3_prompts
from data_pipeline.co3.teacher import self_chat, voice
from data_pipeline.prosocial import (
    draft,
    make,
    people,
    prompts,
    rows,
    situations,
    statistics,
    survey,
    worker,
)
from data_pipeline.prosocial.store import Store
from tests.data_pipeline.co3_script import drive
from tests.data_pipeline.loopback import stats, teacher, teacher_process

TEXTS = prompts.load()
SOCIAL = situations.Situation(
    "s-1", "socialchemistry", "train", "not getting treatment for my sick child",
    ("Parents should care for their children.",), "reddit/confessions/x",
)  # fmt: skip
ETHICS = situations.Situation("e-1", "ethics_amt", "validation", "I shoved my friend.")
POST = situations.Situation("b-1", "sbic", "test", "Farmers are what is wrong here.", ("Be fair.",))
QUESTION = "Why are you not going to get treatment for your child?"


def test_the_paper_s_prompt_and_the_lines_so_far():
    """Oracle: the prompt as appendix A.2 prints it, with A and Q in turn."""
    asked = TEXTS.request("question", "1", dialogue=prompts.dialogue(["I lied."]))
    assert asked.prompt.startswith(
        "A is a toxically biased chatbot answering the reason behind its thoughts. Q is a curious "
        "chatbot asking the reason behind thoughts."
    )
    assert (
        "\nQ: Why do you want to break up with him? Is this because of his cancer?\n"
        in asked.prompt
    )
    assert asked.prompt.endswith("\n\nA: I lied.\nQ:") and asked.sampling.stop == ("\n",)
    assert prompts.dialogue("abc") == "A: a\nQ: b\nA: c"


def test_prompts_of_one_s_own(tmp_path):
    """Oracle: another word, another version; a mistake is named."""
    text = prompts.DEFAULT.read_text()
    (tmp_path / "p.toml").write_text(text.replace("toxically biased", "rude"))
    assert prompts.load(tmp_path / "p.toml").version != TEXTS.version
    (tmp_path / "p.toml").write_text(text.replace("{situation}", "{scene}", 1))
    with pytest.raises(UserError, match=r"\[utterance\]: no 'scene'"):
        prompts.load(tmp_path / "p.toml")
    (tmp_path / "p.toml").write_text("[sampling.line]\n")
    with pytest.raises(UserError, match=r"no \[utterance\]"):
        prompts.load(tmp_path / "p.toml")


def test_a_draft_of_social_chemistry():
    """Oracle: by hand. Three lines are asked for; the candidates are the source's."""
    answers = [
        ' "I\'m not going to get treatment."',
        f"Q: {QUESTION}",
        "Because I am poor.\nQ: Oh.",
    ]
    made, asked = drive(draft.draft(SOCIAL, TEXTS), answers)
    assert [request.stage for request in asked] == ["utterance", "question", "reason"]
    assert made["turns"] == ["I'm not going to get treatment.", QUESTION, "Because I am poor."]
    assert made["candidates"] == list(SOCIAL.rots) and made["candidates_by"] == "source"
    assert asked[2].prompt.endswith(f"\nA: I'm not going to get treatment.\nQ: {QUESTION}\nA:")


def test_a_draft_of_a_post_and_of_ethics():
    """Oracle: a post is u1 itself; ETHICS has its rules asked for, and equal ones once."""
    made, asked = drive(draft.draft(POST, TEXTS), [QUESTION, "Because."])
    assert [request.stage for request in asked] == ["question", "reason"]
    assert made["turns"][0] == POST.text and made["candidates_by"] == "stereotypes"
    rules = ["It is rude to push.", "it is rude to push", ""]
    made, asked = drive(draft.draft(ETHICS, TEXTS), ["I pushed him.", QUESTION, "Fun.", *rules])
    assert [r.attempt for r in asked if r.stage == "rule"] == [0, 1, 2]
    assert made["candidates"] == rules[:1] and made["candidates_by"] == "model"
    made, _ = drive(draft.draft(ETHICS, TEXTS), ["I pushed him.", QUESTION, "Fun.", "", "", ""])
    assert made["candidates"] == [] and made["marks"] == ["no candidate rule of thumb"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Why?", "question of fewer than four words"),
        ("Why would you?", "question of fewer than four words"),
        ("But why, and how so?", "an interrogative alone"),
        ("", "empty answer"),
        ("I'm sorry, but I can't help with that request.", "refusal"),
        (Response("Why would you do this thing", "length"), "cut short"),
        (Response("", fault="reasoning used up max_tokens"), "reasoning used up max_tokens"),
        ("Farmers are what is wrong here!", "repeated utterance"),
    ],
)
def test_questions_that_are_asked_again(answer, reason):
    """Oracle: appendix A.2 (no short inquiry), and two further attempts, then quarantine."""
    made, asked = drive(draft.draft(POST, TEXTS), [answer] * 3)
    assert isinstance(made, Rejected) and made.reason == reason and made.stage == "draft: question"
    assert [request.attempt for request in asked] == [0, 1, 2]
    made, asked = drive(draft.draft(POST, TEXTS), [answer, QUESTION, "So what."])
    assert made["attempts"] == {"question": 2, "reason": 1}


def test_the_teacher_plays_both_speakers():
    """Oracle: each prompt gets a line of its kind, in both forms; CO3's prompts keep their own."""
    taught = voice.Voice(co3_prompts.load())
    fields = {
        "utterance": {"situation": SOCIAL.text},
        "question": {"dialogue": "A: I took my car."},
        "reason": {"dialogue": "A: I took my car.\nQ: Why is that so?"},
        "rule": {"situation": SOCIAL.text},
    }
    for stage, given in fields.items():
        asked = TEXTS.request(stage, "1", **given)
        messages = [{"role": role, "content": text} for role, text in asked.messages]
        for form, words in (("completion", asked.prompt), ("chat", messages)):
            text = taught.answer(form, words, 3).text.strip()
            assert text and text != "That is hard to say.", (stage, form)
            if stage == "utterance":
                assert text == "I'm not getting treatment for my sick child."
            if stage == "rule":
                assert text in self_chat._PHRASES["rules"]
    assert self_chat.second_person("I took my car. And left.") == "you took your car"
    human = co3_prompts.load().request("human", "1", speaker="Coach")
    assert taught.answer("completion", human.prompt, 3).text.strip() in ("Yes", "No")


def record(turns=3, **changes):
    """Return a dialogue as a draft makes it."""
    return {
        "id": "s-1", "source": "sbic", "split": "train", "etc": "", "candidates": ["One.", "Two."],
        "candidates_by": "stereotypes", "turns": [f"Turn {n}." for n in range(1, turns + 1)],
        "rounds": [], "validations": [], "marks": [], **changes,
    }  # fmt: skip


def given(answers, item="s-1", judge="ann"):
    return Answer("t", item, judge, answers, 30.0)


RESPONSE = "I see, but would it not be better to ask?"


@pytest.mark.parametrize(
    ("answers", "rots", "new", "chosen"),
    [
        ({"rule": "previous", "chosen_rules": [2, 1]}, ["Two.", "One."], 0, 2),
        ({"rule": "new", "new_rule": "Ask first. ; Be kind."}, ["Ask first.", "Be kind."], 2, 0),
        ({"rule": "none"}, [], 0, 0),
        (
            {"rule": "previous", "chosen_rules": [1], "rule_wrong": True, "better_rule": "Better."},
            ["Better."], 1, 0,
        ),
    ],
)  # fmt: skip
def test_a_round_is_put_into_the_dialogue(answers, rots, new, chosen):
    """Oracle: page P1's choices, by hand; edits are kept with what stood there before."""
    edited = people.proofread(record(), given({"changes": {"3": " New. "}}), 1, "salt")
    assert edited["turns"][2] == "New."
    assert edited["rounds"][0]["edits"] == [{"utterance": 3, "before": "Turn 3.", "after": "New."}]
    made = people.respond(edited, given({"response": RESPONSE, **answers}), "salt")
    done = made["rounds"][0]
    assert made["turns"][-1] == RESPONSE and done["rots"] == rots
    assert (len(done["new"]), len(done["chosen"])) == (new, chosen)
    assert done["writer"]["worker"] == people.pseudonym("ann", "salt") != "ann"
    assert done["writer"]["worker"] != people.pseudonym("ann", "pepper")
    # The next round shows what was used before the other candidates.
    assert people.shown_rules(made) == list(dict.fromkeys([*rots, "One.", "Two."]))


def votes(*labels):
    """Return three answers to the safety page: each of `labels` has a label for each context."""
    return [
        given({f"{q}.{2 * n + 1}": v for n, x in enumerate(one) for q, v in
               (("label", x), ("reason", "So it is."))}, judge=f"j{number}")
        for number, one in enumerate(labels)
    ]  # fmt: skip


def test_rows_are_as_the_hub_has_them():
    """Oracle: the fields and labels of the published rows (FORMATS.md), by hand."""
    done = record(6, rounds=[{"number": 1, "rots": ["One."]}, {"number": 2, "rots": []}])
    casual, caution, danger = "casual", "caution", "intervention"
    marked = people.labelled(
        done, votes([caution] * 3, [caution, casual, casual], [caution, danger, casual]), "salt"
    )
    made = list(rows.rows(marked, 4))
    assert [row["safety_label"] for row in made] == [
        "__needs_caution__", "__needs_intervention__", "__possibly_needs_caution__",
    ]  # fmt: skip
    assert [row["rots"] for row in made] == [["One."], ["One."], None]
    assert [(row["context"], row["response"]) for row in made] == [
        ("Turn 1.", "Turn 2."), ("Turn 3.", "Turn 4."), ("Turn 5.", "Turn 6."),
    ]  # fmt: skip
    assert [(r["dialogue_id"], r["response_id"], r["episode_done"]) for r in made] == [
        (4, 0, False), (4, 1, False), (4, 2, True),
    ]  # fmt: skip
    assert made[0]["safety_annotations"] == ["needs caution"] * 3
    assert made[0]["safety_annotation_reasons"] == ["So it is."] * 3
    with pytest.raises(DataError, match="5 utterances, expected pairs"):
        list(rows.rows(record(5), 0))


def test_statistics_by_hand(caplog):
    """Oracle: counting two dialogues; intervention before casual is warned of."""
    one = people.labelled(
        record(
            4,
            rounds=[{"number": 1, "rots": ["A b c.", "D."], "new": ["D."], "chosen": ["A b c."],
                     "rule": "new", "edits": [1, 2]}],
            validations=[{"number": 1, "reported": True, "reports": []}],
        ),
        votes(["intervention", "casual"], ["casual", "casual"], ["casual", "casual"]),
        "salt",
    )  # fmt: skip
    two = {**one, "id": "s-2", "source": "socialchemistry",
           "validations": [{"number": 1, "reported": False, "reports": []}]}  # fmt: skip
    made = statistics.count([(r, list(rows.rows(r, n))) for n, r in enumerate((one, two))])
    ours = made["ours"]
    assert (ours["dialogues"], ours["utterances"], ours["utterances a dialogue"]) == (2, 8, 4.0)
    assert (ours["rules of thumb"], ours["different rules"], ours["words a rule"]) == (8, 2, 2.0)
    assert ours["new rules, of those used"] == 0.5 and ours["edits a dialogue, round 1"] == 2.0
    assert ours["reported in validation 1"] == 0.5 and ours["votes"] == 12
    assert ours["intervention followed by casual"] == 2 and "the paper did not find" in caplog.text
    assert ours["share of SBIC"] == ours["share of Social Chemistry"] == 0.5
    assert made["labels_by_turn"][0]["__needs_intervention__"] == 2
    assert made["ended_after_four"] == 2 and made["workers"] == 3


@pytest.mark.parametrize("page", ["proofreading", "rots", "validation", "safety"])
def test_scripted_workers_obey_the_pages(page):
    """Oracle: `check_answer`, for 40 items and three judges each; the same answers twice."""
    shown = ("I took it.", "Why did you take it?", "You are right. I promise it.")
    items = tuple(
        Item(f"i{n}", context=shown[: 3 - n % 2], rots=("It is bad.", "Ask.") * (page == "rots"))
        for n in range(40)
    )
    task = Task(pages.load(page), items, judges_per_item=3)
    made = list(worker.answers(task, [], 4, "scripted-"))
    assert len(made) == 120 and made == list(worker.answers(task, [], 4, "scripted-"))
    assert len({(one.item, one.judge) for one in made}) == 120
    with pytest.raises(UserError, match="--workers=2"):
        list(worker.answers(task, [], 2, "scripted-"))


def flags(folder, url, *more):
    """Return the flags of a start."""
    return [
        "prosocial", "make", f"--situations={folder.parent}/s/situations.jsonl",
        f"--output={folder}", f"--base_url={url}", "--model=teacher", "--quiet", *more,
    ]  # fmt: skip


def prepared(folder, count=6):
    """Make situations of the sample, and fix the secret of pseudonyms."""
    sample = "data_pipeline/prosocial/sample"
    named = [f"--social_chemistry={sample}/social-chem-101.v1.0.tsv", f"--sbic={sample}/sbic"]
    more = [f"--ethics={sample}/ethics", f"--sample={count}", f"--output={folder.parent}/s"]
    assert command.main(["prosocial", "situations", *named, *more, "--quiet"]) == 0
    folder.mkdir()
    (folder / "pseudonyms.key").write_text("secret")


def work(folder):
    return command.main(["prosocial", "work", f"--output={folder}", "--quiet"])


def run_all(folder, url, *more, start=command.main, starts=20):
    """Start and work until all is done; return the codes."""
    codes = []
    for _ in range(starts):
        codes.append(start(flags(folder, url, *more)))
        if codes[-1] != 4:
            break
        assert work(folder) == 0
    return codes


def outputs(folder):
    """Return the bytes that depend on inputs, seed and answers alone."""
    names = ["data/train", "data/validation", "data/test", "provenance", "rejected"]
    return {name: (folder / f"{name}.jsonl").read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without disturbance: its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    prepared(folder)
    with teacher() as (url, _):
        codes = run_all(folder, url)
    assert codes[-1] == 0 and set(codes[:-1]) == {4}
    return folder


def test_the_whole_way(whole):
    """Oracle: the reader of the published corpus takes every row; votes make the labels."""
    data = whole / "data"
    found = [d for split in rows.SPLITS if (data / f"{split}.jsonl").stat().st_size
             for d in read_prosocial(f"{data}/{split}.jsonl", split)]  # fmt: skip
    assert len(found) == 6 and all(len(one.turns) >= 2 for one in found)
    assert all(turn.rots for one in found for turn in one.turns)
    provenance = [
        json.loads(line) for line in (whole / "provenance.jsonl").read_text().splitlines()
    ]
    assert all(len(one["validations"]) == 2 and one["rounds"][0]["edits"] for one in provenance)
    assert all(len(v["reports"]) == 3 for one in provenance for v in one["validations"])
    # No name of a worker leaves the folder of answers.
    assert "scripted-" not in (whole / "provenance.jsonl").read_text()
    card = (whole / "README.md").read_text()
    assert "A script stood in for the workers" in card and "| 36k |" in card and "13.9%" in card
    report = json.loads((whole / "report.json").read_text())
    assert report["ours"]["dialogues"] == 6 and report["about"]["scripted_workers"]


def test_a_finished_run_asks_nobody(whole, tmp_path):
    """Oracle: no server is there, and the bytes stay."""
    before = outputs(whole)
    assert command.main(flags(whole, "http://127.0.0.1:9/v1")) == 0
    assert outputs(whole) == before
    assert command.main(flags(whole, "http://127.0.0.1:9/v1", "--rounds=1")) == 1


def test_the_report_on_workers(whole, capsys, tmp_path):
    """Oracle: sums over the answer files."""
    names, table = tmp_path / "names.json", tmp_path / "table.json"
    more = [f"--names={names}", f"--report={table}", "--wage=36"]
    assert command.main(["prosocial", "workers", f"--output={whole}", *more]) == 0
    found = json.loads(table.read_text())
    given = [json.loads(line) for path in (whole / "answers").glob("*.jsonl")
             for line in path.read_text().splitlines()]  # fmt: skip
    assert sum(one["items"] for one in found.values()) == len(given)
    seconds = sum(one["seconds"] for one in given)
    assert sum(one["pay"] for one in found.values()) == pytest.approx(seconds / 100, abs=0.05)
    assert set(json.loads(names.read_text())) == set(found)
    assert "36 an hour" in capsys.readouterr().out


def test_the_survey_of_workers(tmp_path):
    """Oracle: by hand; a table and JSON lines give the same, blank answers count nowhere."""
    table = tmp_path / "survey.csv"
    table.write_text("age,gender,assertiveness\n34,Woman,2\n38,woman,4\n21,,\n")
    wanted = {"age": "33% 20s, 67% 30s", "gender": "100% woman", "assertiveness": "3.00 ± 1.41"}
    assert survey.count(table) == wanted
    lines = tmp_path / "survey.jsonl"
    lines.write_text(
        '{"age": 34, "gender": "woman", "assertiveness": 2}\n'
        '{"age": "38", "gender": "woman", "assertiveness": 4}\n{"age": 21, "gender": null}\n'
    )
    assert survey.count(lines) == wanted
    for text in ("age\n200\n", "assertiveness\n6\n", "age\nold\n", "name\nann\n", ""):
        table.write_text(text)
        with pytest.raises(DataError):
            survey.count(table)


def test_the_survey_page_is_answered_and_counted(tmp_path, capsys):
    """Oracle: by hand, from the task of the page to words; a page left blank counts nowhere."""
    path = tmp_path / "survey.jsonl"
    make = ["annotate", "make", "--page=survey", f"--output={path}", "--judges_per_item=212"]
    assert command.main(make) == 0
    made = read_task(path)
    assert [one.id for one in made.items] == ["survey"] and made.judges_per_item == 212
    asked = {question.id for question in made.page.questions}
    assert asked == set(survey.PAPER)
    answers = [
        {"age": "30s", "education": "high_school", "assertiveness": "2"},
        {"age": "20s", "assertiveness": "4"},
        {},
    ]
    lines = [Answer(made.fingerprint, "survey", f"j{n}", one) for n, one in enumerate(answers)]
    for one in lines:
        check_answer(made, one)
    append_answers(tmp_path / "a.jsonl", lines)
    wanted = {"age": "50% 20s, 50% 30s", "education": "100% high school"}
    assert survey.count(tmp_path / "a.jsonl") == {**wanted, "assertiveness": "3.00 ± 1.41"}
    assert command.main([*make, "--input=tasks/sample/prosocial"]) == 1
    assert "shows nothing" in capsys.readouterr().err
    assert command.main([*make[:2], "--page=safety", f"--output={path}"]) == 1
    assert "give --input" in capsys.readouterr().err


def test_the_survey_is_in_the_card(whole, tmp_path):
    """Oracle: a finished run, given its survey, has it beside the paper's."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.copytree(whole.parent / "s", tmp_path / "s")
    (tmp_path / "survey.csv").write_text("politics\nModerate\n")
    more = f"--survey={tmp_path}/survey.csv"
    assert command.main(flags(folder, "http://127.0.0.1:9/v1", more)) == 0
    assert "| politics | 100% moderate | 62% liberal-leaning" in (folder / "README.md").read_text()


class KilledError(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_every_step_loses_nothing(whole, tmp_path, monkeypatch, when):
    """Each step is broken off before or after its file is written. Oracle: the undisturbed bytes.

    Every answer of the model was journaled, so none is asked for twice.
    """
    folder = tmp_path / "run"
    prepared(folder)
    broken = set()
    write = Store.write

    def breaking(self, name, outcome):
        if when == "after":
            write(self, name, outcome)
        if name not in broken:
            broken.add(name)
            raise KilledError
        if when == "before":
            write(self, name, outcome)

    def start(arguments):
        while True:
            try:
                return command.main(arguments)
            except KilledError:
                continue

    monkeypatch.setattr(Store, "write", breaking)
    with teacher() as (url, _):
        assert run_all(folder, url, start=start)[-1] == 0
        asked = stats(url)
    assert len(broken) == len(make.steps())
    assert asked["completions"] == asked["distinct"]
    assert outputs(folder) == outputs(whole)


def test_a_cut_step_file_is_named(whole, tmp_path):
    """Oracle: the first line counts the others."""
    store = Store(tmp_path)
    (tmp_path / "steps").mkdir()
    text = (whole / "steps/01-draft.jsonl").read_text().splitlines(True)
    (tmp_path / "steps/01-draft.jsonl").write_text("".join(text[:-1]))
    with pytest.raises(DataError, match="the file is cut"):
        store.read("01-draft")


@pytest.fixture
def waiting(tmp_path):
    """A run that waits for proofreading: its folder, a function that starts it, its task."""
    folder = tmp_path / "run"
    prepared(folder, 3)
    with teacher() as (url, _):
        assert command.main(flags(folder, url)) == 4
        task = read_task(folder / "tasks/02-round1-proofreading.jsonl")
        yield folder, lambda *more: command.main(flags(folder, url, *more)), task


def test_answers_of_another_task_are_refused(waiting, capsys):
    """Oracle: one line that names both tasks."""
    folder, start, task = waiting
    (folder / "answers").mkdir(exist_ok=True)
    made = [worker.answer(task, item, "ann") for item in task.items]
    strange = [Answer("0" * 16, a.item, a.judge, a.answers, a.seconds) for a in made]
    append_answers(folder / "answers/02-round1-proofreading.jsonl", strange)
    assert start() == 1
    assert "the answers are of another task" in capsys.readouterr().err


def test_an_item_that_nobody_answered_is_waited_for_or_left_out(waiting, capsys):
    """Oracle: two of three are answered, one line is cut; the third item keeps its reason."""
    folder, start, task = waiting
    file = folder / "answers/02-round1-proofreading-site.jsonl"
    append_answers(file, [worker.answer(task, item, "ann") for item in task.items[:2]])
    with open(file, "a") as out:
        out.write('{"task": "')
    assert start() == 4
    assert not (folder / "steps/02-round1-proofreading.jsonl").exists()
    aside = (folder / "answers_quarantined/02-round1-proofreading.jsonl").read_text()
    assert "the line is cut or damaged" in aside
    # The following step has no answers at all: everything is quarantined there, and named.
    assert start("--leave_out_unanswered") == 1
    lost = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    reasons = {one["id"]: (one["stage"], one["reason"]) for one in lost if "turns" in one}
    assert len(reasons) == 3
    assert reasons[task.items[2].id] == ("02-round1-proofreading", "answered by nobody")
    assert reasons[task.items[0].id] == ("03-round1-rots", "answered by nobody")
    assert "no dialogue is left" in capsys.readouterr().err


def test_other_settings_do_not_spoil_a_waiting_task(waiting, capsys):
    """Oracle: the task file stays, and the error names it."""
    folder, start, task = waiting
    assert start("--consent=Yes, I am of age.") == 1
    assert "the file is of another task" in capsys.readouterr().err
    assert read_task(folder / "tasks/02-round1-proofreading.jsonl") == task


def test_a_worker_s_bad_answer_is_set_aside(waiting):
    """A text that is not changed, and an unknown item. Oracle: both with their reasons."""
    folder, start, task = waiting
    good = worker.answer(task, task.items[0], "ann")
    same = {"changes": {"1": task.items[0].context[0]}}
    file = folder / "answers/02-round1-proofreading.jsonl"
    append_answers(file, [
        Answer(good.task, good.item, "bob", same, 9.0),
        Answer(good.task, "nothing", "bob", good.answers, 9.0),
        good,
    ])  # fmt: skip
    assert start() == 4
    aside = (folder / "answers_quarantined/02-round1-proofreading.jsonl").read_text()
    assert "another text than utterance 1 has already" in aside and "unknown item" in aside


def test_a_server_that_fails_is_asked_again(tmp_path, capsys):
    """Oracle: the run stops with words, keeps no half step, and resumes."""
    folder = tmp_path / "run"
    prepared(folder, 2)
    with teacher(misbehave=1.0, kinds=("500",)) as (url, _):
        assert command.main(flags(folder, url, "--tries=1")) == 1
    assert not (folder / "steps/01-draft.jsonl").exists()
    with teacher() as (url, _):
        assert command.main(flags(folder, url)) == 4


def test_bad_answers_of_the_model_are_quarantined(tmp_path):
    """Half of the answers are refusals or empty. Oracle: every situation is in one of two files."""
    folder = tmp_path / "run"
    prepared(folder, 12)
    with teacher(misbehave=0.6, kinds=("refusal", "empty")) as (url, _):
        assert command.main(flags(folder, url)) == 4
    step = Store(folder).read("01-draft")
    assert len(step.records) + len(step.rejected) == 12 and step.rejected
    assert {one["reason"] for one in step.rejected} >= {"refusal", "empty answer"}


def test_a_qualification_comes_first(tmp_path, capsys):
    """Oracle: the items of the folder stand in the task, with its pass mark."""
    folder = tmp_path / "run"
    prepared(folder, 2)
    tests = tmp_path / "tests"
    tests.mkdir()
    line = {"id": "q1", "context": ["I hit him."], "expected": {"label.1": ["caution"]}}
    (tests / "safety.jsonl").write_text(json.dumps(line) + "\n")
    with teacher() as (url, _):
        assert run_all(folder, url, f"--qualification={tests}")[-1] == 0
        task = read_task(folder / "tasks/11-safety.jsonl")
        assert [item.id for item in task.of_role("qualification")] == ["q1"]
        assert task.qualification_pass == 0.8
        (tests / "strange.jsonl").write_text("")
        assert command.main(flags(folder, url, f"--qualification={tests}")) == 1
    assert "strange.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    """SIGKILL at random moments. Oracle: the bytes of an undisturbed run.

    Calls repeated are at most those in flight at the kills.
    """
    chance = random.Random(5)
    killed = 0

    def start(arguments):
        nonlocal killed
        while True:
            process = subprocess.Popen([sys.executable, "-m", "data_pipeline", *arguments])
            try:
                code = process.wait(0.8 + chance.random() * 1.5 if killed < 30 else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                continue
            return code

    parts = [tmp_path / name / "run" for name in ("whole", "killed")]
    for part in parts:
        part.parent.mkdir()
        prepared(part, 60)
    with teacher_process() as url:
        assert run_all(parts[0], url)[-1] == 0
    with teacher_process("--latency=0.15") as url:
        assert run_all(parts[1], url, "--concurrency=2", start=start)[-1] == 0
        time.sleep(0.5)
        asked = stats(url)
    # Two calls in flight at each kill, and the probe of a first start.
    assert killed == 30 and asked["completions"] - asked["distinct"] <= 3 * killed
    assert outputs(parts[0]) == outputs(parts[1])
