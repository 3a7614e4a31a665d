"""Holl-E's dialogues, and DailyDialog's emotions. Oracle: files written by hand."""

import json

import pytest

from cosmo.tasks import conversations


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
