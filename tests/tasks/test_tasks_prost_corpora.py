"""Prost's examples of its seven corpora.

Oracles: ParlAI 1.7.2's own teachers, run on the bundled samples and recorded in
tests/golden/prost_examples.json; small files written by hand and read by ParlAI's rules. How many
examples the published corpora give is known from ParlAI alone, and cannot be checked offline.
"""

import hashlib
import json
from pathlib import Path

import pytest

from cosmo.engine.base.errors import DataError
from cosmo.tasks import conversations, prost_corpora
from cosmo.tasks.conversations import Conversation
from cosmo.tasks.prost_text import ProstExample
from tests.tasks.tasks_samples import prosocial_row, write_lines
from tests.tasks.test_tasks_casual import ED_HEADER, bst_row, ed_row

SAMPLE = Path(__file__).resolve().parents[2] / "tasks/sample"
GOLDEN = Path(__file__).resolve().parents[1] / "golden/prost_examples.json"
READ = {
    "prost_dailydialog": (prost_corpora.dailydialog_examples, "dailydialog"),
    "prost_persona_chat": (prost_corpora.persona_chat_examples, "persona_chat"),
    "prost_wizard": (prost_corpora.wizard_examples, "wizard_of_wikipedia"),
    "prost_empathetic": (prost_corpora.empathetic_examples, "empathetic_dialogues"),
    "prost_blended": (prost_corpora.blended_examples, "blended_skill_talk"),
}


def pairs(examples):
    """(turns, response) of each example, without its id."""
    return [(list(example.turns), example.response) for example in examples]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("task", READ)
def test_the_samples_as_parlai_reads_them(task, split):
    """Oracle: ParlAI's History after each example of its default teachers, in any order.

    Of these, "__SILENCE__" was removed, and with it DailyDialog's examples that answer nothing.
    """
    golden = json.loads(GOLDEN.read_text())[f"{task}/{split}"]
    read, folder = READ[task]
    examples = list(read(SAMPLE / folder, split))
    found = sorted(map(list, pairs(examples)))
    assert len(found) == golden["examples"]
    assert golden["first"] in found
    digest = hashlib.sha256(json.dumps(found, ensure_ascii=False).encode()).hexdigest()
    assert digest == golden["sha256"]
    assert len({example.id for example in examples}) == len(examples)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_prosocial_sample(split):
    """Oracle: the rows themselves: an example each, joined where `response_id` is 0."""
    rows = [json.loads(line) for line in (SAMPLE / f"prosocial/{split}.jsonl").open()]
    expected, history = [], []
    for row in rows:
        history = [*(history if row["response_id"] else []), row["context"]]
        rots = row["rots"] if row["safety_label"] != "__casual__" else None
        expected.append((history, row["response"], rots or []))
        history = [*history, row["response"]]
    examples = prost_corpora.prosocial_examples(SAMPLE / "prosocial", split)
    assert [(list(e.turns), e.response, list(e.rots)) for e in examples] == expected


def test_prosocial_rots_are_of_contexts_against_norms(tmp_path):
    """Oracle: Kim et al. 2022, section 4.2: otherwise responses without RoTs."""
    rows = [
        prosocial_row(0, 0, rots=["Be kind.", "Be honest."]),
        prosocial_row(0, 1, True, rots=["Be kind."], safety_label="__casual__"),
        prosocial_row(1, 0, True, rots=None),
    ]
    path = write_lines(tmp_path / "train.jsonl", rows)
    first, second, third = prost_corpora.prosocial_examples(path)
    turns = ("I was rude today 0 0",)
    response = "how are people today 0 0"
    assert first == ProstExample(turns, response, ("Be kind.", "Be honest."), "prosocial-train-0-0")
    assert (second.turns, second.rots) == ((*turns, response, "I was rude today 0 1"), ())
    assert third.rots == ()  # published without: a response alone


def test_dailydialog_by_hand(tmp_path):
    """Oracle: by hand: every utterance but the opener, spaces before punctuation kept."""
    (tmp_path / "train.txt").write_text("Hi . __eou__ Yes ? __eou__ No . __eou__\n")
    assert list(prost_corpora.dailydialog_examples(tmp_path)) == [
        ProstExample(("Hi .",), "Yes ?", (), "dailydialog-train-0-1"),
        ProstExample(("Hi .", "Yes ?"), "No .", (), "dailydialog-train-0-2"),
    ]


def test_empathetic_by_hand(tmp_path):
    """Oracle: by hand: in training the speaker's own responses forget the first utterance."""
    rows = "".join(ed_row("hit:0", i + 1, text) for i, text in enumerate("abcd"))
    for split in ("train", "valid"):
        (tmp_path / f"{split}.csv").write_text(ED_HEADER + rows)
    listener = [(["a"], "b"), (["a", "b", "c"], "d")]
    found = pairs(prost_corpora.empathetic_examples(tmp_path))
    assert found == [listener[0], (["b"], "c"), listener[1]]
    assert pairs(prost_corpora.empathetic_examples(tmp_path, "validation")) == listener


def test_blended_by_hand(tmp_path):
    """Oracle: by hand: the guided speaker alone; a topic only from Wizard of Wikipedia."""
    dialog = [[0, "c"], [1, "d"], [0, "e"], [1, "f"], [0, "g"]]
    rows = [bst_row(dialog=dialog), bst_row(dialog=dialog[:2], context_dataset="convai2")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    personas = "your persona: I paint.\nyour persona: I read.\n"
    first = f"{personas}Skiing\nDo you ski?\nNo, I paint.\nc"
    assert pairs(prost_corpora.blended_examples(tmp_path)) == [
        ([first], "d"),
        ([first, "d", "e"], "f"),
        ([f"{personas}Do you ski?\nNo, I paint.\nc"], "d"),
    ]


def wizard_row(first, texts):
    second = {"Wizard": "Apprentice", "Apprentice": "Wizard"}[first]
    names = (f"0_{first}", f"1_{second}")
    dialog = [{"speaker": names[i % 2], "text": text} for i, text in enumerate(texts)]
    return {"chosen_topic": "Skiing", "dialog": dialog}


def test_wizard_by_hand(tmp_path):
    """Oracle: by hand: a wizard who begins answers the topic, and the last response is missing."""
    rows = [wizard_row("Apprentice", "abcd"), wizard_row("Wizard", "abcde")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert pairs(prost_corpora.wizard_examples(tmp_path)) == [
        (["Skiing\na"], "b"),
        (["Skiing\na", "b", "c"], "d"),
        (["Skiing"], "a"),
        (["Skiing", "a", "b"], "c"),
    ]


PERSONAS = "1 your persona: i ski.\n2 your persona: i cook.\n"


def test_persona_chat_by_hand(tmp_path):
    """Oracle: by hand: the second text of a line is learnt; `__SILENCE__` is no text."""
    (tmp_path / "train.txt").write_text(
        PERSONAS
        + "3 a\tb\t\tx|b\n4 c\td\n"
        + PERSONAS
        + "3 __SILENCE__\ta\n4 b\tc \\n c\n"
        + "1 a\tb\n2 c\n"
        + "1 __SILENCE__\ta\n2 b\tc\n"
    )
    personas = "your persona: i ski.\nyour persona: i cook."
    assert pairs(prost_corpora.persona_chat_examples(tmp_path)) == [
        ([f"{personas}\na"], "b"),
        ([f"{personas}\na", "b", "c"], "d"),
        ([personas], "a"),
        ([personas, "a", "b"], "c \n c"),
        (["a"], "b"),
        # An opening without a persona answers nothing.
        (["a", "b"], "c"),
    ]


def test_topical_chat_by_hand(tmp_path):
    """Oracle: by hand: both sides, nothing before the first turn."""
    content = [{"message": text, "agent": "agent_1"} for text in ("a ", "b", "c")]
    (tmp_path / "train.json").write_text(json.dumps({"t_1": {"content": content}}))
    assert list(prost_corpora.topical_chat_examples(tmp_path)) == [
        ProstExample(("a",), "b", (), "topical-train-0-1"),
        ProstExample(("a", "b"), "c", (), "topical-train-0-2"),
    ]


def test_the_splits_of_topical_chat_and_wizard(tmp_path):
    """Oracle: the publishers' names: frequent entities and seen topics, unless a path asks."""
    folder = tmp_path / "conversations"
    folder.mkdir()
    for name in ("train", "valid_freq", "valid_rare"):
        content = [{"message": name}] * 2
        (folder / f"{name}.json").write_text(json.dumps({"t": {"content": content}}))
    for path in (tmp_path, folder):
        for split, name in (("train", "train"), ("validation", "valid_freq")):
            found = list(conversations.read_topical_chat(path, split))
            assert [dialogue.turns[0] for dialogue in found] == [name]
    rare = {"validation": folder / "valid_rare.json"}
    assert next(conversations.read_topical_chat(rare, "validation")).turns[0] == "valid_rare"
    rare = f"{folder}/{{split}}_rare.json"
    assert next(conversations.read_topical_chat(rare, "validation")).turns[0] == "valid_rare"
    for name in ("train", "test_random_split", "test_topic_split", "data"):
        (tmp_path / f"{name}.json").write_text(json.dumps([wizard_row("Wizard", [name])]))
    assert [d.turns for d in conversations.read_wizard(tmp_path, "test")] == [
        ("test_random_split",)
    ]
    assert [d.turns for d in conversations.read_wizard(tmp_path)] == [("train",)]


def test_the_splits_of_persona_chat(tmp_path):
    """Oracle: ConvAI2's names; its test split was never published, so that valid serves."""
    for name in ("valid_self_original", "valid_self_original_no_cands", "valid_both_revised"):
        (tmp_path / f"{name}.txt").write_text(f"1 {name}\tb\n")
    for split in ("validation", "test"):
        found = list(conversations.read_persona_chat(tmp_path, split))
        turns = ("valid_self_original", "b")
        assert found == [Conversation(f"persona-{split}-0", turns)]
    (tmp_path / "valid_self_original.txt").unlink()
    name = "valid_self_original_no_cands"
    assert next(conversations.read_persona_chat(tmp_path, "test")).turns[0] == name


def test_a_persona_chat_dialogue_with_a_hole_is_not_used(tmp_path, caplog):
    """Oracle: by hand: line 2 of the first dialogue is missing; the second is whole."""
    (tmp_path / "train.txt").write_text("1 a\tb\n3 c\td\n1 e\tf\n")
    with caplog.at_level("WARNING"):
        found = list(conversations.read_persona_chat(tmp_path))
    assert found == [Conversation("persona-train-1", ("e", "f"))]
    assert "1 incomplete dialogues are not used" in caplog.text


@pytest.mark.parametrize(
    ("read", "name", "text", "words"),
    [
        ("persona_chat", "train.txt", "a\tb\n", ":1: not a numbered line"),
        ("persona_chat", "train.txt", "1 a\n2 b\tc\n", ":1: an exchange lacks an utterance"),
        ("persona_chat", "train.txt", "1 a\tb\n2 \tc\n", ":2: an exchange lacks an utterance"),
        ("persona_chat", "train.txt", "1 a\tb\n2 __SILENCE__\tc\n", ":2: an exchange lacks an"),
        ("persona_chat", "train.txt", "1 your persona: x\n", ":1: a dialogue is empty"),
        ("persona_chat", "train.txt", f"{'1' * 5000} a\tb\n", ":1: not a numbered line"),
        ("topical_chat", "train.json", "[]", ":1: not a JSON object: got []"),
        ("topical_chat", "train.json", '{"t": ', ":1: not a JSON object: got not JSON"),
        ("topical_chat", "train.json", '{"t": 3}', ":1: entry t: not a dialogue"),
        ("topical_chat", "train.json", '{"t": {}}', "entry t: field 'content' is missing"),
        ("topical_chat", "train.json", '{"t": {"content": "ab"}}', "'content' has a wrong shape"),
        ("topical_chat", "train.json", '{"t": {"content": [{"message": ""}]}}', "utterance 1 is e"),
        ("topical_chat", "train.json", "{}", "the data holds no record"),
        ("wizard", "train.json", '[{"dialog": [{"text": "a"}]}]', "'chosen_topic' is missing"),
        (
            "wizard",
            "train.json",
            '[{"chosen_topic": "x", "dialog": [{"text": "a", "speaker": "Bob"}]}]',
            "dialogue 1: field 'speaker' of utterance 1 names no speaker: got 'Bob'",
        ),
        ("blended", "train.json", json.dumps([bst_row(personas=[["a", "b"]])]), "'personas' has a"),
        ("blended", "train.json", json.dumps([bst_row(personas=["a", "b"])]), "are no list"),
        ("blended", "train.json", json.dumps([bst_row(additional_context=3)]), "no text: got 3"),
    ],
)
def test_a_bad_record_is_named(tmp_path, read, name, text, words):
    """Oracle: file, line and field by hand."""
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        list(getattr(conversations, f"read_{read}")(tmp_path))
    assert str(error.value).startswith(str(tmp_path / name)) or "no record" in words
    assert words in str(error.value)
