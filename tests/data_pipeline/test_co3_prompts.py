"""The prompts, to the character. Oracle: Kim et al. 2023, section 2, appendices A and B."""

import pytest

from data_pipeline.calls.requests import Sampling
from data_pipeline.co3 import prompts

OPEN = Sampling(1024, 0.9, 0.95, 1.0, 0.6)
NARRATIVE = "Madeleine took the first step towards her goal."


@pytest.fixture(scope="module")
def book():
    return prompts.load()


COMPLETIONS = {
    "narrative": (
        {"literal": "Madeleine took the first step. Madeleine moves a step closer to the goal."},
        "Madeleine took the first step. Madeleine moves a step closer to the goal. Rewrite this "
        "story with more specific details in two or three sentences:",
    ),
    "speaker": (
        {"narrative": NARRATIVE, "x": "Madeleine"},
        f"{NARRATIVE} The following is a conversation in the scene between Madeleine and",
    ),
    "dialogue": (
        {"narrative": NARRATIVE, "x": "Madeleine", "y": "her coach"},
        f"{NARRATIVE} The following is a long in-depth conversation happening in the scene between "
        "Madeleine and her coach with multiple turns.\nMadeleine:",
    ),
    "continuation": (
        {
            "narrative": NARRATIVE,
            "x": "Madeleine",
            "y": "her coach",
            "so_far": "Madeleine: Hi.",
            "next": "Coach",
        },
        f"{NARRATIVE} The following is a long in-depth conversation happening in the scene between "
        "Madeleine and her coach with multiple turns.\nMadeleine: Hi.\nCoach:",
    ),
    "human": ({"speaker": "Broomstick"}, "Q: Is Broomstick a person?\nA:"),
    "head": (
        {
            "context": NARRATIVE,
            "question": "Madeleine moves a step closer to the goal, is this true?",
        },
        f"{NARRATIVE}\nQ: Madeleine moves a step closer to the goal, is this true?\nA:",
    ),
    "head_alone": ({"question": "Is it?"}, "Q: Is it?\nA:"),
    "relation_tail": ({"context": "A: B", "question": "Is it?"}, "A: B\nQ: Is it?\nA:"),
    "relation_tail_alone": ({"question": "Is it?"}, "Q: Is it?\nA:"),
}


@pytest.mark.parametrize("stage", prompts.STAGES)
def test_completion_form(stage, book):
    """Oracle: the paper's prompts, copied."""
    fields, text = COMPLETIONS[stage]
    assert book.request(stage, "7", **fields).prompt == text


CHATS = {
    "narrative": [
        "user",
        "Madeleine took the first step. Madeleine moves a step closer to the goal. Rewrite this "
        "story with more specific details in two or three sentences. Answer with the story alone.",
    ],
    "speaker": [
        "system",
        'Complete the text with the person that fits best: a name, or a few words such as "her '
        'coach". Answer with these words alone.',
        "user",
        f"{NARRATIVE} The following is a conversation in the scene between Madeleine and",
    ],
    "dialogue": [
        "user",
        f"{NARRATIVE} Generate a long in-depth conversation happening in the scene between "
        "Madeleine and her coach with multiple turns. Begin every turn on a line of its own with "
        "the speaker's name and a colon. Answer with the conversation alone.\nMadeleine:",
    ],
    "continuation": [
        "user",
        f"{NARRATIVE} Generate a long in-depth conversation happening in the scene between "
        "Madeleine and her coach with multiple turns. Begin every turn on a line of its own with "
        "the speaker's name and a colon. Answer with the conversation alone.\nMadeleine:",
        "assistant",
        "Madeleine: Hi.",
        "user",
        "Go on with the conversation from there. Answer with the further turns alone.\nCoach:",
    ],
    "human": ["user", "Is Broomstick a person? Answer with one word: Yes or No."],
    "head": [
        "user",
        f"{NARRATIVE}\n\nMadeleine moves a step closer to the goal, is this true? Answer with one "
        "word: Yes, No or Unknown.",
    ],
    "head_alone": ["user", "Is it? Answer with one word: Yes, No or Unknown."],
    "relation_tail": ["user", "A: B\n\nIs it? Answer with one word: Yes, No or Unknown."],
    "relation_tail_alone": ["user", "Is it? Answer with one word: Yes, No or Unknown."],
}


@pytest.mark.parametrize("stage", prompts.STAGES)
def test_chat_form(stage, book):
    """Oracle: written down here, as it is sent."""
    request = book.request(stage, "7", **COMPLETIONS[stage][0])
    assert [part for message in request.messages for part in message] == CHATS[stage]


def test_samplings(book):
    """Oracle: appendix A.1 and A.2; of the questions, ours."""
    made = {stage: book.request(stage, "7", **COMPLETIONS[stage][0]) for stage in prompts.STAGES}
    assert {s: r.sampling for s, r in made.items() if s in ("narrative", "dialogue")} == {
        "narrative": OPEN,
        "dialogue": OPEN,
    }
    assert made["continuation"].sampling == OPEN
    assert made["speaker"].sampling == Sampling(16, 0.0, 1.0, 0.0, 0.0, stop=(".",))
    for stage in ("human", "head", "head_alone", "relation_tail", "relation_tail_alone"):
        assert made[stage].sampling == Sampling(8, 0.0, 1.0, 0.0, 0.0, top_logprobs=5)


FIELDS = {"head": "Ann runs", "tail": "TAIL", "tail_past": "PAST", "x": "Ann"}


@pytest.mark.parametrize(
    "relation, sentence, question",
    [
        ("xReact", "Ann runs. Now Ann feels TAIL.", "Does Ann feel TAIL after Ann runs?"),
        ("xIntent", "Ann runs because Ann wants TAIL.", "Does Ann intend TAIL when Ann runs?"),
        ("xAttr", "Ann is TAIL. Ann runs.", "Can Ann be considered TAIL when Ann runs?"),
        (
            "xEffect",
            "Ann runs. Now Ann TAIL.",
            "Ann runs. As a result, Ann TAIL. Is this true?",
        ),
        ("xWant", "Ann runs. Now Ann wants TAIL.", "Does Ann want TAIL after Ann runs?"),
        ("xNeed", "Ann PAST. Ann runs.", "Ann PAST. Is this true when Ann runs?"),
    ],
)
def test_templates(relation, sentence, question, book):
    """Oracle: tables 8 and 9."""
    assert book.sentence(relation, **FIELDS) == sentence
    assert book.question(relation, **FIELDS) == question


def test_the_published_codes_prompts(book):
    """Oracle: co3.py and agents/gpt.py of the released code. Chat calls have no sampling there."""
    published = prompts.load(prompts.PUBLISHED)
    for stage in ("narrative", "dialogue"):
        made = published.request(stage, "7", **COMPLETIONS[stage][0])
        assert made.prompt == COMPLETIONS[stage][1]
        assert made.sampling == Sampling(1024, 0.9, 0.95, 1.0, 0.6, completion_only=True)
        chat = made.prompt.replace("The following is a long", "Generate an")
        assert made.messages == (("user", chat),)
    # Stages that the code does not have are ours, and so are their keys in the journal.
    for stage in ("human", "speaker", "head"):
        made = published.request(stage, "7", **COMPLETIONS[stage][0])
        assert made == book.request(stage, "7", **COMPLETIONS[stage][0])


def test_head_question(book):
    """Oracle: the example of appendix B.1."""
    asked = book.head_question("Madeleine moves a step closer to the goal")
    assert asked == "Madeleine moves a step closer to the goal, is this true?"


def test_braces_in_a_text_are_text(book):
    """Oracle: what is filled in is not filled in again."""
    request = book.request("speaker", "7", narrative="{x} {0} {", x="{narrative}")
    assert request.prompt.startswith("{x} {0} { The following")
    assert request.prompt.endswith("between {narrative} and")


def test_version_changes_with_a_word_and_not_with_a_comment(tmp_path, book):
    """Oracle: the version is of the content."""
    text = prompts.DEFAULT.read_text()
    same, other = tmp_path / "same.toml", tmp_path / "other.toml"
    same.write_text("# A note.\n" + text)
    other.write_text(text.replace("two or three", "three or two"))
    assert prompts.load(same).version == book.version != prompts.load(other).version


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[speaker]", "[speakers]", r"no \[speaker\]"),
        ("[relations.xNeed]", "[relations.xNeeds]", r"no \[relations.xNeed\]"),
        ("top_p = 0.95", "topp = 0.95", "topp"),
        ("{literal} Rewrite", "{litteral} Rewrite", r"\[narrative\]: no 'litteral'"),
        ("Q: Is {speaker} a", "Q: Is {speaker a", r"\[human\]"),
        ('sampling = "speaker"', 'sampling = "spoken"', r"\[speaker\]: no 'spoken'"),
        ("Does {x} feel", "Does {y} feel", r"\[relations.xReact\]: no 'y'"),
    ],
)
def test_errors_name_the_part(old, new, message, tmp_path):
    """Oracle: the part that was spoilt."""
    path = tmp_path / "prompts.toml"
    path.write_text(prompts.DEFAULT.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        prompts.load(path)
