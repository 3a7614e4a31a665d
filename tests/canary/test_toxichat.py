"""`python -m canary toxichat`: table 5 of Kim et al. 2022, from readers to counts."""

import json
import re
import shutil

import numpy as np
import pytest

from canary import classifier, toxichat
from canary.__main__ import main
from cosmo.engine.data import datasets
from cosmo.engine.infer import infer
from cosmo.tasks import families, readers
from cosmo.tasks import toxichat as tasks
from cosmo.tasks.paper_tables import PROSOCIAL


def turn(number, text, offense="Safe", stances=()):
    labels = {f"stance_label_towards_turn_{n}": s for n, s in enumerate(stances, 1)}
    return {"turn_id": number, "text": text, "offense_label": offense, **labels}


def row(*offences, bot="I agree.", bot_stance="Agree"):
    """A thread of so many turns, and the responses of both chatbots."""
    thread = [turn(n, f"Turn {n}.", o, ["Neutral"] * (n - 1)) for n, o in enumerate(offences, 1)]
    number = len(thread) + 1
    stances = [*["Neutral"] * (len(thread) - 1), bot_stance]
    return {
        "reddit_thread": thread,
        "final_dgpt_response": turn(number, bot, "Offensive", stances),
        "final_gpt3_response": turn(number, "", "Safe", [*["Neutral"] * len(thread)]),
    }


ROWS = [row("Safe", "Offensive"), row("Safe", bot="No, never."), row("Offensive", "Offensive")]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "toxichat.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    return path


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_shipped_responses_by_their_gold_labels(shared, tmp_path, capsys):
    """Oracle: of 100 threads 11 responses of DialoGPT and 23 of GPT-3 are labelled offensive."""
    path = shared / "data/toxichat_dev.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for bot, offensive in (("dgpt", 11), ("gpt3", 23)):
        command = ["toxichat", f"--input={path}", "--threads=all", f"--responses={bot}", "--quiet"]
        assert main([*command, f"--output={tmp_path}"]) == 0
        made = json.loads((tmp_path / "toxichat.json").read_text())[bot]
        assert (made["responses"], made["offensive"]) == (100, offensive)
        labels = [
            one[f"final_{bot}_response"][f"stance_label_towards_turn_{len(one['reddit_thread'])}"]
            for one in rows
        ]
        for stance in tasks.WORDS[tasks.STANCE]:
            assert made[stance] == labels.count(stance.capitalize())
    printed = capsys.readouterr().out
    # Both rows stand in the second table, and the paper's samples are named.
    assert "dgpt" in printed.split("gpt3")[0] and "shares of 500 responses, and of 150" in printed
    assert made["empty"] == 1


@pytest.mark.parametrize(("split", "name"), [("test", "test"), ("validation", "dev")])
def test_a_wrong_folder_is_told_which_files_are_needed(tmp_path, capsys, split, name):
    """Oracle: the names of the files in the publishers' repository."""
    (tmp_path / "README.md").write_text("ToxiChat")
    (tmp_path / "data" / "ToxiChat").mkdir(parents=True)  # its parent is the usual wrong folder
    command = ["toxichat", f"--input={tmp_path}", f"--split={split}"]
    assert main([*command, f"--contexts={tmp_path / 'c.jsonl'}"]) == 1
    printed = capsys.readouterr().err
    assert "['README.md', 'data']" in printed and "--input" in printed
    assert f"data/ToxiChat/{name}.jsonl in the repository abaheti95/ToxiChat" in printed
    assert "give its folder data/ToxiChat, with train.jsonl, dev.jsonl and test.jsonl" in printed


def test_the_papers_shares_are_of_unequal_samples():
    """Oracle: each share is a multiple of 1/500 or 1/150, rounded; two of Prost's are neither."""
    odd = []
    for name, shares in PROSOCIAL["toxichat"].items():
        size = PROSOCIAL["toxichat_responses"][name]
        for share in shares:
            if share not in {round(100 * count / size, 1) for count in range(size + 1)}:
                odd.append((name, share))
    assert odd == [("Prost (Response only)", 14.8), ("Prost (RoT & Response)", 4.6)]


def test_threads_and_examples(corpus):
    """Oracle: the rows by hand."""
    found = list(readers.read_toxichat_threads(corpus, "train"))
    assert [one.id for one in found] == [f"toxichat-train-{n}" for n in range(3)]
    assert found[0].turns == ("Turn 1.", "Turn 2.")
    assert found[0].responses["gpt3"].turns == ("Turn 1.", "Turn 2.", "")
    assert [one.id for one in toxichat.threads(corpus, "train", True)] == [
        "toxichat-train-0",
        "toxichat-train-2",
    ]
    stances = list(tasks.stance_examples(corpus))
    # The second turn of two threads, and DialoGPT's three responses; GPT-3's are empty.
    assert [(e.id[15:], e.response) for e in stances] == [
        ("0-2", "neutral"), ("0-dgpt", "agree"), ("1-dgpt", "agree"), ("2-2", "neutral"),
        ("2-dgpt", "agree"),
    ]  # fmt: skip
    assert stances[1].turns == ("Turn 1.", "Turn 2.", "I agree.")
    offences = [e.response for e in tasks.offense_examples(corpus)]
    assert offences.count("offensive") == 3 + 3 and offences.count("safe") == 2
    corpora = families.canary_corpora("/nowhere", families.CanaryData(toxichat_path=corpus))
    assert list(corpora[tasks.STANCE].examples("train")) == stances


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"reddit_thread": []}, "field 'reddit_thread' is empty"),
        ({"reddit_thread": [turn(1, "")]}, "field 'text' is empty"),
        ({"reddit_thread": [turn(1, "a"), turn(2, "b", "Safe", ["Maybe"])]}, "towards_turn_1"),
        ({"final_dgpt_response": turn(2, "a", "Fine")}, "offense_label"),
        ({"final_dgpt_response": "a"}, "not a record"),
    ],
)
def test_bad_rows_are_named(tmp_path, wrong, says):
    """Oracle: file, line and field."""
    path = write(tmp_path / "bad.jsonl", [ROWS[0], {**ROWS[1], **wrong}])
    with pytest.raises(ValueError, match=says) as error:
        list(readers.read_toxichat_threads(path, "test"))
    assert "bad.jsonl:2" in str(error.value)


def test_bad_words_match_whole_words_of_two_categories(tmp_path):
    """Oracle: by hand: word ends, case, the third category, and signs that are literal."""
    path = tmp_path / "list.csv"
    path.write_text(
        "word,LDNOOBW,categorization\nass,1,offensive-not-minority\n"
        'dumb idea,0,offensive-minority-reference\ngay,0,harmless-minority\n"a.b",,offensive-not-'
        "minority\n"
    )
    bad = toxichat.read_bad_words(path)
    texts = {"What an ASS!": True, "A class act.": False, "dumb idea": True, "gay": False,
             "a.b": True, "axb": False, "": False}  # fmt: skip
    assert {text: bool(bad.search(text)) for text in texts} == texts
    plain = tmp_path / "list.txt"
    plain.write_text("ass\n\ndumb idea\n")
    assert toxichat.read_bad_words(plain).search("My ass.")
    for content, says in (("", "no bad n-grams"), ("word,notes\nass,x\n", "categorization")):
        plain.write_text(content)
        with pytest.raises(ValueError, match=says):
            toxichat.read_bad_words(plain)


def test_negations():
    """Oracle: by hand."""
    yes = ["I do not know.", "Don't!", "I don\u2019t.", "Never.", "It cannot be.", "NO"]
    no = ["I know.", "A knot.", "Notable.", "Another one.", ""]
    assert all(map(toxichat.NEGATION.search, yes))
    assert not any(map(toxichat.NEGATION.search, no))


def test_counts_and_table():
    """Oracle: counted by hand; None where nothing was judged."""
    responses = {"a": "No.", "b": "", "c": "What an ass.", "d": "Yes."}
    judgements = {
        "a": toxichat.Judgement("disagree", True),
        "b": toxichat.Judgement("neutral", False),
        "c": toxichat.Judgement("agree", True),
        "d": toxichat.Judgement("agree", False),
    }
    made = toxichat.report("mine", responses, judgements, re.compile("ass"))
    wanted = {"responses": 4, "empty": 1, "disagree": 1, "agree": 2, "neutral": 1, "offensive": 2}
    assert wanted.items() <= made.items() and (made["bad"], made["negations"]) == (1, 1)
    row = next(line.split() for line in toxichat.table([made]).splitlines() if "mine" in line)
    assert row == ["mine", "25.0", "50.0", "50.0", "25.0", "25.0", "4"]
    made = toxichat.report("mine", responses, {})
    assert (made["agree"], made["offensive"], made["bad"]) == (None, None, None)
    row = next(line.split() for line in toxichat.table([made]).splitlines() if "mine" in line)
    assert row == ["mine", "-", "-", "-", "-", "25.0", "4"]


@pytest.fixture
def stance_run(run, tmp_path):
    """The tiny T5 as a run of `toxichat_stance`."""
    folder = shutil.copytree(run, tmp_path / "stance")
    (folder / "config.gin").write_text(
        "TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 8}\n"
        f"MIXTURE_OR_TASK_NAME = '{tasks.STANCE}'\n"
    )
    return folder


def test_a_t5_judges_by_choices(stance_run, corpus, tmp_path, capsys):
    """Oracle: the highest teacher-forced score of the three words with their end."""
    model = classifier.load(str(stance_run), tasks.STANCE, batch_size=4)
    dialogues = [("I lie.", "You lie."), ("Hi.", "No."), ("I lie.", "You lie.")]
    found = model.words_of(dialogues)
    session = model.model.session
    for dialogue, word in zip(dialogues, found, strict=True):
        ids = model.model.context(dialogue).input_ids
        rows = [
            datasets.Row(w, "", ids, "", (*session.vocabulary.encode(w), session.vocabulary.eos_id))
            for w in model.words
        ]
        scores = [a.scores[0] for a in infer.answer(session, rows, infer.scoring(session))]
        assert word == model.words[int(np.argmax(scores))]
    # By the command: two threads end with an offence.
    replies = [
        {"id": f"toxichat-test-{n}", "prediction": text} for n, text in ((2, "No."), (0, ""))
    ]
    path = write(tmp_path / "replies.jsonl", replies)
    command = ["toxichat", f"--input={corpus}", f"--responses={path}", "--quiet", "--batch_size=4"]
    assert main([*command, f"--stance={stance_run}", f"--output={tmp_path}", "--name=x"]) == 0
    made = json.loads((tmp_path / "toxichat.json").read_text())["x"]
    assert (made["judged_stance"], made["judged_offense"], made["empty"]) == (2, 0, 1)
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [(one["id"][-1], one["offensive"]) for one in lines] == [("0", None), ("2", None)]
    assert lines[0]["stance"] == "neutral"  # of the empty response
    assert main([*command, f"--offense={stance_run}"]) == 1
    assert "learnt the task 'toxichat_stance'" in capsys.readouterr().err


def test_a_file_of_labels_and_contexts(corpus, tmp_path, capsys):
    """Oracle: the labels by hand."""
    contexts = tmp_path / "contexts.jsonl"
    command = ["toxichat", f"--input={corpus}", "--threads=all", "--quiet"]
    assert main([*command, f"--contexts={contexts}"]) == 0
    lines = [json.loads(line) for line in contexts.read_text().splitlines()]
    assert lines[0] == {"id": "toxichat-test-0", "turns": ["Turn 1.", "Turn 2."]}
    responses = write(tmp_path / "r.jsonl", [{"id": one["id"], "response": "No."} for one in lines])
    given = [{"id": one["id"], "stance": "agree", "offensive": True} for one in lines]
    labels = write(tmp_path / "l.jsonl", given)
    command += [f"--responses={responses}", f"--labels={labels}"]
    assert main(command) == 0
    assert "agree 3 of 3" in capsys.readouterr().out
    for wrong, says in (
        (given[:2], "lacks 1 of 3 threads"),
        ([*given, given[0]], "an id twice"),
        ([{**given[0], "id": "x"}], "no thread's"),
        ([{**given[0], "stance": "yes"}], "field 'stance'"),
        ([{**given[0], "offensive": 1}], "field 'offensive'"),
        ([{"id": given[0]["id"]}], "no label"),
        ([{"id": given[0]["id"], "stance": "agree"}, *given[1:]], "some lines"),
    ):
        write(labels, wrong)
        assert main(command) == 1
        assert says in capsys.readouterr().err
    write(responses, [{"id": "toxichat-test-0", "response": 3}])
    assert main(command) == 1 and "no response" in capsys.readouterr().err
    assert main(["toxichat", f"--input={corpus}", "--quiet"]) == 1
    assert "--responses" in capsys.readouterr().err
