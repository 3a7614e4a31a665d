# ruff: noqa: E501 -- one case, one line
"""What models return for a conversation, and the turns read from it. Oracle: written by hand."""

import pytest

from data_pipeline.co3 import turns

WANTED = [("Veda", "Hi, Father."), ("Priest", "Hello, Veda."), ("Veda", "How are you?")]
# Each of these is the same conversation.
SHAPES = {
    "completion: the first prefix stands in the prompt": (
        " Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?"
    ),
    "all prefixes": "Veda: Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?",
    "blank lines": "Veda: Hi, Father.\n\nPriest: Hello, Veda.\n\n\nVeda: How are you?\n",
    "blank lines, first prefix missing": "Hi, Father.\n\nPriest: Hello, Veda.\n\nVeda: How are you?",
    "windows lines": "Veda: Hi, Father.\r\nPriest: Hello, Veda.\r\nVeda: How are you?\r\n",
    "bold names": "**Veda:** Hi, Father.\n**Priest:** Hello, Veda.\n**Veda:** How are you?",
    "bold names, colon outside": "**Veda**: Hi, Father.\n**Priest**: Hello, Veda.\n**Veda**: How are you?",
    "italic names": "*Veda:* Hi, Father.\n*Priest:* Hello, Veda.\n*Veda:* How are you?",
    "underlined names": "__Veda__: Hi, Father.\n__Priest__: Hello, Veda.\n__Veda__: How are you?",
    "names in brackets": "[Veda]: Hi, Father.\n[Priest]: Hello, Veda.\n[Veda]: How are you?",
    "capitals": "VEDA: Hi, Father.\nPRIEST: Hello, Veda.\nVEDA: How are you?",
    "numbered": "1. Veda: Hi, Father.\n2. Priest: Hello, Veda.\n3. Veda: How are you?",
    "numbered with brackets": "1) Veda: Hi, Father.\n(2) Priest: Hello, Veda.\n3) Veda: How are you?",
    "numbered and bold": "1. **Veda**: Hi, Father.\n2. **Priest**: Hello, Veda.\n3. **Veda**: How are you?",
    "turn numbers": "Turn 1: Veda: Hi, Father.\nTurn 2: Priest: Hello, Veda.\nTurn 3: Veda: How are you?",
    "bullets": "- Veda: Hi, Father.\n- Priest: Hello, Veda.\n* Veda: How are you?",
    "quoted": '> Veda: Hi, Father.\n> Priest: Hello, Veda.\n> Veda: How are you?',
    "quotation marks": 'Veda: "Hi, Father."\nPriest: "Hello, Veda."\nVeda: "How are you?"',
    "curly quotation marks": (
        "Veda: \u201cHi, Father.\u201d\nPriest: \u201cHello, Veda.\u201d\nVeda: \u201cHow are you?\u201d"
    ),
    "a quotation mark without its partner": 'Veda: Hi, Father."\nPriest: Hello, Veda.\nVeda: "How are you?',
    "code fence": "```\nVeda: Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?\n```",
    "announced": (
        "Sure! Here is the conversation:\n\nVeda: Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?"
    ),
    "announced at length": (
        "Here's a long, in-depth conversation between Veda and the priest:\n\n"
        "Veda: Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?"
    ),
    "announced, first prefix missing": (
        "Here is the conversation:\n\nHi, Father.\n\nPriest: Hello, Veda.\n\nVeda: How are you?"
    ),
    "title": "### The Church\n\nVeda: Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?",
    "scene": "Scene: a church.\n\nVeda: Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?",
    "commentary after": (
        "Veda: Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?\n\n"
        "This conversation shows how Veda opens up.\nLet me know if you want more!"
    ),
    "note after": (
        "Veda: Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?\n\nNote: both are fictional."
    ),
    "the end": "Veda: Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?\nThe end.\nVeda: More.",
    "end in brackets": "Veda: Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?\n[End of conversation]",
    "rule": "Veda: Hi, Father.\nPriest: Hello, Veda.\n---\nVeda: How are you?\n***",
    "narration": (
        "Veda: Hi, Father.\nVeda sits down in the first row.\nPriest: Hello, Veda.\n\n"
        "The priest smiles at her.\n\nVeda: How are you?"
    ),
    "narrator": (
        "Narrator: It is Sunday.\nVeda: Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?"
    ),
    "directions on lines": (
        "(Veda enters)\nVeda: Hi, Father.\n[The priest turns around]\nPriest: Hello, Veda.\n"
        "*They shake hands*\nVeda: How are you?"
    ),
    "directions by the name": (
        "Veda (shyly): Hi, Father.\nPriest [smiling]: Hello, Veda.\nVeda *nods*: How are you?"
    ),
    "directions in the turn": (
        "Veda: (shyly) Hi, Father.\nPriest: Hello, Veda. (smiles)\nVeda: *sits down* How are you?"
    ),
    "a turn of a direction alone": (
        "Veda: Hi, Father.\nPriest: Hello, Veda.\nPriest: (smiles)\nVeda: How are you?"
    ),
    "name and surname": (
        "Veda Smith: Hi, Father.\nPriest: Hello, Veda.\nVeda: How are you?"
    ),
    "article": "Veda: Hi, Father.\nThe priest: Hello, Veda.\nVeda: How are you?",
    "spaces around the colon": "Veda : Hi, Father.\n  Priest :Hello, Veda.\nVeda:   How are you?",
    "wide colon": "Veda\uff1a Hi, Father.\nPriest\uff1a Hello, Veda.\nVeda\uff1a How are you?",
    "sentence over two lines": "Veda: Hi,\nFather.\nPriest: Hello,\nVeda.\nVeda: How are\nyou?",
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_one_conversation(shape):
    """Oracle: WANTED, by hand."""
    found = turns.parse(SHAPES[shape], "Veda", ("Priest",))
    assert list(zip(found.speakers, found.dialogue, strict=True)) == WANTED
    assert found.unprefixed == 0


@pytest.mark.parametrize(
    "text, wanted",
    [
        # A colon within a turn makes no speaker.
        (
            "I have one question: may I come in?\nPriest: Remember this: all may.\nLook: they do.",
            [
                ("Veda", "I have one question: may I come in?"),
                ("Priest", "Remember this: all may."),
                ("Look", "they do."),  # capitalised and alone: taken for a name, and filtered later
            ],
        ),
        ("Yes.\nPriest: At 6:30 then.", [("Veda", "Yes."), ("Priest", "At 6:30 then.")]),
        (
            "See https://a.b/c: good.\nPriest: No.",
            [("Veda", "See https://a.b/c: good."), ("Priest", "No.")],
        ),
        ("Sure!\nPriest: Good.", [("Veda", "Sure!"), ("Priest", "Good.")]),
        # Emphasis stays as words, quotations within a turn stay quotations.
        (
            'I *really* said "no" to him.\nPriest: "Yes" is what I said.',
            [("Veda", 'I really said "no" to him.'), ("Priest", '"Yes" is what I said.')],
        ),
        # A third speaker is read, and filtered later.
        ("Hi.\nPriest: Yes?\nMrs. O'Neil: Me too.", [("Veda", "Hi."), ("Priest", "Yes?"), ("Mrs. O'Neil", "Me too.")]),
        ("", []),
        ("   \n\n", []),
        ("...", []),
        ("\u4f60\u597d", [("Veda", "\u4f60\u597d")]),
    ],
)  # fmt: skip
def test_turns_of_other_texts(text, wanted):
    """Oracle: by hand."""
    found = turns.parse(text, "Veda", ("Priest",))
    assert list(zip(found.speakers, found.dialogue, strict=True)) == wanted


@pytest.mark.parametrize(
    "name",
    [
        "Jos\u00e9", "Jose\u0301", "Zoe\u0308", "\u674e\u660e", "\u041c\u0430\u0440\u0438\u044f", "\u0645\u062d\u0645\u062f",
        "\u092e\u0940\u0930\u093e", "\u0e2a\u0e21\u0e0a\u0e32\u0e22", "\u0b95\u0bb5\u0bbf\u0ba4\u0bbe", "\u1006\u1014\u103a\u1038", "Ng\u1ecdc", "\u0130lker",
        "Dr. Smith", "Mr. and Mrs. Lee", "\U0001f600 Leo", "Leo \U0001f600", "\u2764\ufe0f Ann", "Leo \U0001f468\u200d\U0001f469\u200d\U0001f467", "O\u2019Brien", "Agent 47",
        "Anne-Marie d'Arc", "Leo (smiling)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("expected", [True, False])
def test_names_in_any_script(name, expected):
    """Marks, emoji, other scripts. Oracle: four turns of two speakers, none swallowed."""
    if not expected and name == "Anne-Marie d'Arc":
        pytest.skip("a small letter within an unexpected name makes it a phrase")
    text = f" Hi!\n{name}: Hello.\nMia: How are you?\n{name}: Fine. \U0001f600"
    found = turns.parse(text, "Mia", (name,) if expected else ())
    assert found.dialogue == ("Hi!", "Hello.", "How are you?", "Fine. \U0001f600")
    assert len(set(found.speakers)) == 2 and not found.unprefixed and not found.dropped


def test_an_emoji_alone_is_an_utterance():
    """Oracle: by hand; a line of it belongs to the turn before."""
    found = turns.parse(
        " \U0001f600\nPriest: \u2764\ufe0f\n\U0001f622\nVeda: Hm.", "Veda", ("Priest",)
    )
    assert found.dialogue == ("\U0001f600", "\u2764\ufe0f \U0001f622", "Hm.")


def test_forgotten_names_are_counted():
    """Oracle: two lines of the middle have no name and are no narration."""
    text = (
        "Hi there.\nPriest: Hello.\n\nI would like to talk.\n\nOf course, go on.\n\nVeda: Thanks."
    )
    assert turns.parse(text, "Veda").unprefixed == 2


@pytest.mark.parametrize(
    "text", ["```", "**", ": : :", "1.", "Veda:", "Veda:\nPriest:", "(((", "*_*", "-\n-\n", "\x00"]
)
def test_rubbish_makes_no_turns(text):
    """Oracle: nobody says a word with letters in it; and no exception."""
    found = turns.parse(text, "Veda", ("Priest",))
    assert not any(c.isalpha() for said in found.dialogue for c in said)
