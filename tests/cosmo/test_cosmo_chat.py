"""The terminal chat, with a scripted person."""

import pytest

from cosmo import chat
from cosmo.engine.base import config
from cosmo.tasks.formatting import Separators


@pytest.fixture(scope="module")
def talk(trained, tmp_path_factory):
    """`talk(lines, **kwargs)` -> (what was asked and said, last history)."""
    monkeypatch = pytest.MonkeyPatch()
    captured = {}

    def keep(session, separators, decoding, *rest):
        captured.update(session=session, decoding=decoding)
        return []

    monkeypatch.setattr(chat, "chat", keep)
    monkeypatch.setattr(chat, "warm_up", lambda *rest: None)
    config.load("gin/runs/infer.gin", [str(trained / "config.gin")])
    chat.talk(config.call(chat.ChatConfig))
    monkeypatch.undo()

    def run(lines, **kwargs):
        spoken, queue = [], list(lines)

        def read(prompt):
            spoken.append(prompt)
            if not queue:
                raise EOFError
            return queue.pop(0)

        history = chat.chat(
            captured["session"], Separators(), captured["decoding"], read=read, say=spoken.append,
            **kwargs,
        )  # fmt: skip
        return spoken, history

    run.decoding = captured["decoding"]
    return run


def test_samples_as_the_demo(talk):
    """Oracle: Cosmo's public demo: temperature 1.0, top-p 0.95."""
    assert (talk.decoding.temperature, talk.decoding.top_p) == (1.0, 0.95)


def test_asks_situation_and_role_first_with_defaults(talk):
    """Enter accepts the default; [END] leaves; the history alternates."""
    spoken, history = talk(["", "", "Hello!", "[END]"])
    assert chat.SITUATION in spoken[0]
    assert chat.ROLE in spoken[1]
    assert len(history) == 2
    assert history[0] == "Hello!"
    assert spoken[-2].startswith("Cosmo: ")


def test_reset_clears_the_history_and_keeps_situation_and_role(talk):
    """Oracle: chat_with_cosmo.py of the released code, whose loop goes on after clearing."""
    spoken, history = talk(["s", "r", "One.", "[RESET]", "Two.", "[END]"])
    assert history[0] == "Two."
    assert sum(line.startswith("Situation") for line in spoken) == 1


def test_small_letters_are_commands_too(talk):
    """Property: [reset] and [end] are no turns of the dialogue."""
    _, history = talk(["s", "r", "One.", "[reset]", "Two.", "[end]", "Three."])
    assert history[0] == "Two."
    assert len(history) == 2


def test_the_defaults_are_the_demos():
    """Oracle: chat_with_cosmo.py of the released code, to the character."""
    assert chat.SITUATION == "Cosmo is having a friendly conversation with a friend."
    assert chat.ROLE == "You are Cosmo and you are talking to a friend."


def test_end_of_file_leaves(talk):
    """Ctrl-D is as good as [END]; given situation and role are not asked for."""
    spoken, history = talk(["Hi."], situation="At sea.", role="You are a captain.")
    assert len(history) == 2
    assert not any(line.startswith("Situation") for line in spoken)


def test_a_line_that_is_no_text_costs_itself(talk):
    """Oracle: the talk without the line. It has a byte that is not UTF-8, as Python reads one."""
    spoken, history = talk(["Hi.", "caf\udce9", "Bye."], situation="At sea.", role="A captain.")
    assert "(field 'turns': not valid text (half a character))\n" in spoken
    assert history == talk(["Hi.", "Bye."], situation="At sea.", role="A captain.")[1]


def test_the_seed_makes_the_talk_repeatable(talk):
    """Property: same seed and lines, same answers; another seed, others."""
    script = ["", "", "Tell me something.", "And more.", "[END]"]
    assert talk(script, seed=3)[1] == talk(script, seed=3)[1]
    assert talk(script, seed=3)[1] != talk(script, seed=4)[1]
