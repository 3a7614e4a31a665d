"""Holl-E's dialogues, and DailyDialog's emotions. Oracle: files written by hand."""

import json

import pytest

from cosmo.tasks import conversations, recognize


def test_holle(tmp_path):
    """Oracle: by hand: a query that repeats the response before it is one utterance."""
    rows = [
        {"chat_id": 1, "query": "Hi", "response": "Hello"},
        {"chat_id": 1, "query": "Hello", "response": "Seen it?"},
        {"chat_id": 1, "query": "What?", "response": "The film"},
        {"chat_id": 2, "query": "Hi", "response": "Hello"},
    ]
    for name in ("train_data.json", "raw_test_data.json"):
        (tmp_path / name).write_text(json.dumps(rows))
    for split in ("train", "test"):
        found = list(conversations.read_holle(tmp_path, split))
        assert [one.id for one in found] == [f"holle-{split}-0", f"holle-{split}-1"]
        assert found[0].turns == ("Hi", "Hello", "Seen it?", "What?", "The film")
    (tmp_path / "train_data.json").write_text(json.dumps([{"chat_id": 1, "query": "Hi"}]))
    with pytest.raises(ValueError, match="response"):
        list(conversations.read_holle(tmp_path, "train"))


def test_holle_in_its_publishers_forms(tmp_path):
    """Oracle: by hand: a whole chat is its utterances, once, with those that no example has."""
    chat = ["Hi", "Hello", "Seen it?", "Yes, twice."]
    spans = {"spans": ["", "", "", "twice"], "labels": [4, 4, 4, 2], "documents": {"plot": "p"}}
    raw = {"query": "Hi", "response": "Hello", "span": "Hello", "all_documents": {"plot": "p"}}
    forms = {
        "main": [{"chat_id": "a", "chat": chat, **spans}, {"chat_id": "b", "chat": chat[:2]}],
        "raw": [{"chat_id": "a", "chat": chat, **raw}] * 2 + [{"chat_id": "b", **raw}],
    }
    for name, rows in forms.items():
        path = tmp_path / name / "train_data.json"
        path.parent.mkdir()
        path.write_text(json.dumps(rows))
        assert recognize.looks_like(path) == "Holl-E"
        found = [one.turns for one in conversations.read_holle(path.parent, "train")]
        assert found == [tuple(chat), tuple(chat[:2])]
    path.write_text(json.dumps([{"chat_id": "a", "chat": "Hi", **spans}]))
    with pytest.raises(ValueError, match="field 'chat' has a wrong shape"):
        list(conversations.read_holle(path, "train"))


@pytest.mark.parametrize(
    ("text", "emotion"),
    [
        ("dialogues_text", "dialogues_emotion"),
        ("train/dialogues_train", "train/dialogues_emotion_train"),
    ],
)
def test_dailydialogs_emotions(tmp_path, text, emotion):
    """Oracle: by hand, in the archive's two forms; what does not match is an error."""
    (tmp_path / "train").mkdir()
    (tmp_path / f"{text}.txt").write_text("Hi __eou__ Oh ! __eou__\nNo . __eou__\n")
    numbers = tmp_path / f"{emotion}.txt"
    numbers.write_text("0 4 \n 6\n")
    found = list(conversations.read_dailydialog_emotions(tmp_path, "train"))
    assert [(one.turns, given) for one, given in found] == [
        (("Hi", "Oh!"), (0, 4)),
        (("No.",), (6,)),
    ]
    for content, says in (
        ("0 4\n", "do not match"),
        ("0\n6\n", "do not match"),
        ("0 4\n6\n1\n", "do not match"),
        ("0 7\n6\n", "numbers from 0 to 6"),
    ):
        numbers.write_text(content)
        with pytest.raises(ValueError, match=says):
            list(conversations.read_dailydialog_emotions(tmp_path, "train"))
    numbers.unlink()
    with pytest.raises(ValueError, match="no file of emotions"):
        list(conversations.read_dailydialog_emotions(tmp_path, "train"))
