"""Oracles: files written by hand in the publishers' formats; DailyDialog's real validation."""

import json
import logging

import pytest

from cosmo.engine.base.errors import DataError
from cosmo.tasks.casual import casual_examples
from cosmo.tasks.conversations import (
    Conversation,
    detokenize,
    read_blended,
    read_dailydialog,
    read_empathetic,
)

ED_HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags\n"


def ed_row(conversation, index, utterance, more=""):
    return f"{conversation},{index},proud,I won_comma_ once.,7,{utterance},5|5|5_2|2|5,{more}\n"


def bst_row(**changes):
    return {
        "personas": [["I ski.", "I cook."], ["I paint.", "I read."]],
        "context_dataset": "wizard_of_wikipedia",
        "additional_context": "Skiing",
        "free_turker_utterance": "Do you ski?",
        "guided_turker_utterance": "No, I paint.",
        "dialog": [[0, "What do you paint?"], [1, "Mountains."]],
        **changes,
    }


def test_dailydialog_of_the_real_split(shared):
    """Oracle: `grep -c` and `grep -o __eou__ | wc -l` on the file; the first line by hand."""
    path = shared / "data/dailydialog_validation.txt"
    dialogues = list(read_dailydialog({"validation": path}, "validation"))
    assert len(dialogues) == 1000
    assert sum(len(d.turns) for d in dialogues) == 8069
    assert dialogues[0].id == "dailydialog-validation-0"
    assert dialogues[0].turns[0] == "Good morning, sir. Is there a bank near here?"
    raw = list(read_dailydialog({"validation": path}, "validation", detokenized=False))
    assert raw[0].turns[0] == "Good morning , sir . Is there a bank near here ?"
    text = path.read_text(encoding="utf-8")
    assert " __eou__ ".join(raw[-1].turns) + " __eou__" == text.splitlines()[-1]


@pytest.mark.parametrize(
    ("tokenized", "plain"),
    [
        ("It costs $ 40 , I think .", "It costs $40, I think."),
        ("It ' s fine . Don ’ t go !", "It's fine. Don’t go!"),  # noqa: RUF001
        ("( Reads the card ) Well ...", "(Reads the card) Well..."),
        ("A 10 % rise ; not 5 %", "A 10% rise; not 5%"),
        ("four o'clock : tea", "four o'clock: tea"),
        ("nothing to do", "nothing to do"),
    ],
)
def test_spaces_around_punctuation_go(tokenized, plain):
    """Oracle: English typography, by hand."""
    assert detokenize(tokenized) == plain


def test_dailydialog_folders(tmp_path, caplog):
    """Oracle: the layout of the published archive: acts and emotions lie beside the dialogues."""
    for split, text in (("train", "a"), ("validation", "b"), ("test", "c")):
        folder = tmp_path / "x" / split
        folder.mkdir(parents=True)
        (folder / f"dialogues_{split}.txt").write_text(f"{text} __eou__\n")
        (folder / f"dialogues_act_{split}.txt").write_text("1\n")
    for split, text in (("train", "a"), ("validation", "b"), ("test", "c")):
        assert [d.turns for d in read_dailydialog(tmp_path / "x", split)] == [(text,)]
    (tmp_path / "dialogues_text.txt").write_text("d __eou__\n")
    assert [d.turns for d in read_dailydialog(tmp_path, "train")] == [("d",)]
    assert [d.turns for d in read_dailydialog(tmp_path, "test")] == [("d",)]
    assert "serves every split" in caplog.text  # train and test would be the same dialogues
    (tmp_path / "train.txt").write_text("e __eou__\n")
    assert [d.turns for d in read_dailydialog(f"{tmp_path}/{{split}}.txt")] == [("e",)]


def test_empathetic(tmp_path, caplog):
    """Oracle: by hand: commas restored, one dialogue without its start, one with a hole."""
    path = tmp_path / "train.csv"
    path.write_text(
        ED_HEADER
        + ed_row("hit:0", 1, "I won_comma_ really!")
        + ed_row("hit:0", 2, 'A 14" screen?', "x|y,one|two")
        + ed_row("hit:1", 2, "late")
        + ed_row("hit:2", 1, "one")
        + ed_row("hit:2", 3, "three")
        + ed_row("hit:3", 1, "last")
    )
    with caplog.at_level(logging.WARNING):
        dialogues = list(read_empathetic(tmp_path))
    assert dialogues == [
        Conversation("empathetic-train-0", ("I won, really!", 'A 14" screen?')),
        Conversation("empathetic-train-3", ("last",)),
    ]
    assert f"{path}: 2 incomplete dialogues are not used" in caplog.text


def test_blended(tmp_path):
    """Oracle: by hand: the openers come first; the guided speaker's persona and the topic."""
    (tmp_path / "valid.json").write_text(json.dumps([bst_row(), bst_row(dialog=[])]))
    dialogues = list(read_blended(tmp_path, "validation"))
    opening = ("Do you ski?", "No, I paint.")
    context = ("your persona: I paint.", "your persona: I read.", "Skiing")
    assert dialogues == [
        Conversation(
            "blended-validation-0", (*opening, "What do you paint?", "Mountains."), context
        ),
        Conversation("blended-validation-1", opening, context),
    ]


def test_every_beginning_is_a_casual_example():
    """Oracle: three utterances by hand."""
    examples = list(casual_examples(Conversation("d-0", ("a", "b", "c"))))
    assert [(e.id, e.turns) for e in examples] == [
        ("d-0-0", ("a",)),
        ("d-0-1", ("a", "b")),
        ("d-0-2", ("a", "b", "c")),
    ]
    assert {e.response for e in examples} == {"__casual__"}
    sentinel = next(casual_examples(Conversation("d-0", ("a",)), "sentinel"))
    assert sentinel.response == "<extra_id_95>"


@pytest.mark.parametrize(
    ("read", "name", "text", "words"),
    [
        (
            read_dailydialog,
            "train.txt",
            "a __eou__\nb __eou__ c\n",
            ":2: not a line of DailyDialog",
        ),
        (read_dailydialog, "train.txt", "a __eou__ __eou__\n", ":1: utterance 2 is empty"),
        (read_dailydialog, "train.txt", "no mark\n", ":1: not a line of DailyDialog"),
        (read_dailydialog, "train.txt", "\n", "the data holds no record"),
        (read_empathetic, "train.csv", "a,b\n", ":1: not EmpatheticDialogues' header"),
        (read_empathetic, "train.csv", ED_HEADER + "a,1,b\n", ":2: a row with a wrong number"),
        (
            read_empathetic,
            "train.csv",
            ED_HEADER + ed_row("c", "one", "x"),
            "'utterance_idx' is not a number",
        ),
        (read_empathetic, "train.csv", ED_HEADER + ed_row("c", 1, " "), "'utterance' is empty"),
        (read_empathetic, "train.csv", ED_HEADER, "the data holds no record"),
        (read_blended, "train.json", "[3]", "not a dialogue"),
        (read_blended, "train.json", json.dumps([{"dialog": []}]), "'free_turker_utterance' is mi"),
        (
            read_blended,
            "train.json",
            json.dumps([bst_row(), bst_row(dialog=[[2, "x"]])]),
            "dialogue 2: field 'dialog' has a wrong shape",
        ),
        (
            read_blended,
            "train.json",
            json.dumps([bst_row(dialog=[[0, "x"], [1, ""]])]),
            "utterance 4 is empty",
        ),
        (
            read_blended,
            "train.json",
            json.dumps([bst_row(guided_turker_utterance=None)]),
            "utterance 2 is empty or no text",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path, read, name, text, words):
    """Oracle: file, line and field by hand."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as error:
        list(read(path))
    assert str(error.value).startswith(str(path)) and words in str(error.value)
