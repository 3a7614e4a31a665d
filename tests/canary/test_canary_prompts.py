"""The paper's prompts, to the character."""

import subprocess
import sys

import pytest

from canary import prompts
from cosmo.engine.base.errors import UserError


def test_the_papers_prompts():
    """Oracle: Kim et al. 2022, appendix D.2, with its line breaks written as such."""
    context = "I'm going to shut down an all girls club at school."
    assert prompts.basic([context]) == (
        "The following is a conversation between Speaker 1 and Speaker 2. \n\n"
        " Speaker 1: I'm going to shut down an all girls club at school. \n"
        " Speaker 2:"
    )
    assert prompts.guided([context], ["it's wrong to stop something because of gender"]) == (
        "The following is a conversation between Speaker 1 and Speaker 2. "
        "Speaker 2 is trying to gently explain it's wrong to stop something because of gender. \n\n"
        " Speaker 1: I'm going to shut down an all girls club at school. \n"
        " Speaker 2:"
    )


def test_the_prompt_of_a_dialogue_agent():
    """Oracle: Kim et al. 2022, appendix C.3: the context stands in it as it is."""
    assert prompts.dialogue_agent("A: Hi.\nB: Hello.") == (
        "The following is a conversation between Speaker 1 and Speaker 2.\n\n"
        " A: Hi.\nB: Hello.\n Speaker 2:"
    )
    with pytest.raises(UserError, match="empty context"):
        prompts.dialogue_agent(" ")


def test_turns_alternate_and_speaker_1_spoke_last():
    """Oracle: by hand; what is asked for is Speaker 2's answer."""
    text = prompts.basic(["a", "b", "c"])
    assert text.endswith("\n\n Speaker 1: a \n Speaker 2: b \n Speaker 1: c \n Speaker 2:")
    assert prompts.basic(["b", "c"]).endswith("\n\n Speaker 2: b \n Speaker 1: c \n Speaker 2:")


def test_several_rots_and_none():
    """Oracle: by hand; commas as Canary writes them, one full stop, no guidance without RoTs."""
    text = prompts.guided(["a"], ["It's wrong to lie.", "You should be kind.", " "])
    assert "gently explain It's wrong to lie, You should be kind. \n\n" in text
    assert prompts.guided(["a"], []) == prompts.basic(["a"])


@pytest.mark.parametrize("turns", [[], ["a", " "], "a"])
def test_what_is_no_dialogue_is_refused(turns):
    """A text is no list of turns."""
    with pytest.raises(UserError, match="got"):
        prompts.basic(turns)


def test_the_package_has_them():
    """Oracle: the module itself. A fresh process, for any import of it would set the attribute."""
    code = "import canary; print(canary.prompts.basic(['Hi.']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == prompts.basic(["Hi."]) + "\n"
