"""Narrative, speakers and dialogue: what is asked again, what is kept. Oracle: FORMATS.md's account
of the published code, and the paper's appendix A."""

import pytest

from data_pipeline.calls.requests import Rejected, Response
from data_pipeline.co3 import dialogue, narrative, prompts, speakers, texts
from tests.data_pipeline.co3_script import conversation, drive

BOOK = prompts.load()
LITERAL = "Ann took the first step. Ann moves on."
GOOD = "Ann took her first step on Monday. Her coach cheered."
LONG = "One is here. Two is here. Three is here. Four is here."
REFUSAL = "I'm sorry, but I can't help with that request."


def narrate(*answers):
    return drive(narrative.narrate("7", LITERAL, BOOK), answers)


def test_a_good_narrative_is_taken_at_once():
    found, requests = narrate(f"\n\n{GOOD}\n")
    assert found == narrative.Narrative(GOOD, 1)
    assert [(r.stage, r.attempt, r.record_id) for r in requests] == [("narrative", 0, "7")]


@pytest.mark.parametrize(
    "text, fault",
    [
        (LONG, "four or more sentences"),
        ("One is. Two is. Three is.", ""),
        (LITERAL, "unchanged"),
        (LITERAL.upper().rstrip("."), "unchanged"),
        ("Ann runs. Ann runs. Bob sleeps.", "repeated sentence"),
        ("Ann runs. Ann sleeps.", ""),
    ],
)
def test_what_is_asked_again(text, fault):
    assert narrative.fault(text, LITERAL) == fault


def test_asked_again_twice_at_most_and_the_shortest_is_kept_and_marked():
    found, requests = narrate(LONG, LITERAL, f"{LONG} Five is here.")
    assert [r.attempt for r in requests] == [0, 1, 2]
    assert found == narrative.Narrative(LITERAL, 3, "unchanged")


def test_asked_again_until_good():
    found, requests = narrate(LONG, GOOD)
    assert found == narrative.Narrative(GOOD, 2) and len(requests) == 2


@pytest.mark.parametrize("answer", ["", "  \n", "...", "\u2026"])
def test_no_narrative_at_all(answer):
    found, requests = narrate(answer, answer, answer)
    assert isinstance(found, Rejected) and found.reason == "empty narrative"
    assert len(requests) == 3


def test_a_refusal_is_no_narrative_however_short():
    found, _ = narrate(REFUSAL, LONG, "As an AI language model, I cannot do this.")
    assert found.text == LONG
    found, _ = narrate(REFUSAL, REFUSAL, REFUSAL)
    assert found.reason == "refusal"


@pytest.mark.parametrize(
    "text",
    [
        f"Sure! Here is the story:\n\n{GOOD}",
        f"Sure! Here's a rewritten version: {GOOD}",
        f'"{GOOD}"',
        f"\u201c{GOOD}\u201d",
        f"**{GOOD}**",
        f"## Story\n{GOOD}".replace("## Story", "Story:"),
        GOOD.replace(". ", ".\n\n"),
    ],
)
def test_what_stands_around_a_narrative(text):
    assert narrate(text)[0].text == GOOD


def test_a_narrative_cut_short_is_asked_again():
    found, _ = narrate(Response("Ann took", finish_reason="length"), GOOD)
    assert found == narrative.Narrative(GOOD, 2)


@pytest.mark.parametrize(
    "answer, person, label",
    [
        (" a friend", "a friend", "Friend"),
        (" her mother", "her mother", "Mother"),
        (" Bob", "Bob", "Bob"),
        ("the teacher.", "the teacher", "Teacher"),
        (" her coach, who is proud of her", "her coach", "Coach"),
        (" his best friend", "his best friend", "Best Friend"),
        (" Mrs. Smith, the owner", "Mrs. Smith", "Mrs. Smith"),
        (" Mrs", "Mrs", "Mrs"),
        ("**Her boss**", "Her boss", "Boss"),
        ("Her mother.\n\nHer mother fits because she is kind.", "Her mother", "Mother"),
        ("Ann and her father", "her father", "Father"),
        ("and a stranger", "a stranger", "Stranger"),
        ("The other person is her dad", "her dad", "Dad"),
        ('"a barista"', "a barista", "Barista"),
        (" a friend of hers in the park", "a friend of hers", "Friend"),
        (" a classmate:\n\nAnn: Hi", "a classmate", "Classmate"),
        ("", "", None),
        (" ...", "", None),
        (" I do not know whom she may speak with here", "", None),
    ],
)
def test_interlocutors(answer, person, label):
    """Oracle: by hand."""
    assert speakers.parse(answer, "Ann") == person
    assert label is None or speakers.label(person) == label


def test_the_interlocutor_is_asked_for_only_where_the_triple_names_none():
    found, requests = drive(speakers.interlocutor("7", GOOD, "Ann", "Bob", BOOK), [])
    assert found == "Bob" and not requests
    found, requests = drive(speakers.interlocutor("7", GOOD, "Ann", "", BOOK), [" her coach"])
    assert found == "her coach" and requests[0].stage == "speaker"
    assert requests[0].sampling.temperature == 0 and requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize(
    "answer, reason",
    [("", "no interlocutor"), (" Ann", "speaks with oneself"), (REFUSAL, "no interlocutor")],
)
def test_nobody_to_speak_with(answer, reason):
    found, _ = drive(speakers.interlocutor("7", GOOD, "Ann", "", BOOK), [answer])
    assert found.reason == reason


def converse(*answers):
    return drive(dialogue.converse("7", GOOD, "Ann", "her coach", BOOK), answers)


def stages(requests):
    return [(request.stage, request.attempt) for request in requests]


def test_a_good_conversation_is_taken_at_once():
    found, requests = converse(conversation(8))
    assert stages(requests) == [("dialogue", 0)]
    assert found.turns.speakers == ("Ann", "Coach") * 4 and not found.fault
    assert found.turns.dialogue[0] == "This is what I say in turn number 1."


def test_a_speaker_who_says_sorry_is_no_refusal():
    """Paid for, and a conversation. Oracle: it is taken at the first answer."""
    said = conversation(8).replace("This is", "I'm sorry, but I can't help you move. This is", 1)
    found, requests = converse(said)
    assert stages(requests) == [("dialogue", 0)] and len(found.turns) == 8


def test_one_that_broke_off_is_continued_once():
    more = " Turn four is mine.\nAnn: And five.\nCoach: And six it is.\nAnn: Seven."
    found, requests = converse(conversation(3), more)
    assert stages(requests) == [("dialogue", 0), ("continuation", 0)]
    assert requests[1].prompt.endswith("Ann: This is what I say in turn number 3.\nCoach:")
    assert requests[1].messages[1] == (
        "assistant",
        "Ann: " + conversation(3).strip(),
    )
    assert len(found.turns) == 7 and found.continuations == 1 and not found.fault
    assert found.turns.speakers[3:] == ("Coach", "Ann", "Coach", "Ann")


def test_the_token_limit_takes_the_cut_turn_and_is_continued():
    cut = Response(conversation(8) + "\nAnn: And then I wa", finish_reason="length")
    found, requests = converse(cut, " I see.\nAnn: Bye.")
    assert requests[1].prompt.endswith("turn number 8.\nAnn:")
    assert found.turns.dialogue[8:] == ("I see.", "Bye.")


def test_a_continuation_that_says_it_all_again_adds_what_is_new():
    whole = "Ann: " + conversation(8).strip()
    found, _ = converse(conversation(3), whole)
    assert len(found.turns) == 8 and found.turns.dialogue[-1].endswith("number 8.")


def test_too_few_turns_are_asked_again_and_the_longest_is_kept_and_marked():
    found, requests = converse(
        conversation(2), "", conversation(4), "", conversation(3), "Nothing more. "
    )
    assert [stage for stage, _ in stages(requests)] == ["dialogue", "continuation"] * 3
    assert [attempt for _, attempt in stages(requests)] == [0, 0, 1, 1, 2, 2]
    assert (len(found.turns), found.attempts, found.fault) == (4, 3, "too few turns")


def test_one_repetition_is_let_pass_and_two_are_not():
    once = conversation(6) + "\nAnn: Well, I never did.\nCoach: Well, I never did."
    assert not converse(once)[0].fault
    twice = once + "\nAnn: Well, I never did."
    found, requests = converse(twice, twice, twice)
    assert found.fault == "repetition" and len(requests) == 3
    # Short utterances come twice in any conversation.
    short = conversation(6) + "\nAnn: Yes.\nCoach: Yes.\nAnn: Yes."
    assert not converse(short)[0].fault
    endless = conversation(6) + "\nAnn: Yes.\nCoach: Yes." * 4
    assert converse(endless, endless, endless)[0].fault == "repetition"
    loop = conversation(6) + "\nAnn:" + " I do not know." * 5
    assert converse(loop, loop, loop)[0].fault == "repetition"
    assert not converse(conversation(6) + "\nAnn: I do not know. I do not know.")[0].fault


@pytest.mark.parametrize(
    "one, other",
    [
        ("\u0915\u0940", "\u0915\u093e"),  # ka with another vowel sign
        ("\u0b95\u0bbf", "\u0b95\u0bc1"),
        ("re\u0301sume\u0301", "resume"),
        ("\U0001f600", "\U0001f622"),
        ("Fine \U0001f44d\U0001f3fb", "Fine \U0001f44d\U0001f3ff"),
        ("It is 5\u20ac", "It is 5\u00a3"),
    ],
)
def test_utterances_that_differ_in_marks_or_emoji_are_no_repetition(one, other):
    """Oracle: they are different texts; spellings, case and punctuation make no difference."""
    assert texts.same(one) != texts.same(other) and texts.words(one) != texts.words(other)
    assert texts.same("Jose\u0301, \u2764\ufe0f!") == texts.same("jos\u00c9 \u2764")
    assert texts.words("Jose\u0301's x!") == ["Jos\u00e9", "s", "x"]
    assert dialogue.repetitions(tuple(f"{word} {word} {word}" for word in (one, other))) == 0
    assert dialogue.repetitions((f"{one} a b",) * 2) == 1


def test_forgotten_names_are_asked_again():
    bad = conversation(6) + "\n\nI forgot who I am.\n\nAnn: Good bye then."
    found, _ = converse(bad, conversation(7))
    assert found.attempts == 2 and not found.fault
    assert converse(bad, bad, bad)[0].fault == "missing prefix"


def test_replies_without_an_answer_are_asked_again_and_named():
    """Oracle: the fault of the last reply is the reason; a good one is taken."""
    fault = Response(fault="reasoning used up max_tokens")
    found, requests = converse(fault, fault, fault)
    assert found.reason == fault.fault and len(requests) == 3
    assert not converse(fault, conversation(8))[0].fault
    found, _ = converse(conversation(3), fault, fault, fault)
    assert len(found.turns) == 3  # no answer continues it
    found, requests = narrate(fault, fault, fault)
    assert found.reason == fault.fault and len(requests) == 3
    assert narrate(fault, GOOD)[0].text == GOOD
    found, _ = drive(speakers.interlocutor("7", GOOD, "Ann", "", BOOK), [fault])
    assert (found.stage, found.reason) == ("speaker", fault.fault)


def as_published(*answers, z="", x="Ann", y="Bob"):
    book = prompts.load(prompts.PUBLISHED)
    asking = dialogue.converse("7", GOOD, x, y, book, retries=1, as_published=True, z=z)
    return drive(asking, answers)


def test_as_published_keeps_a_repetition_and_a_forgotten_name_and_marks_them():
    """Oracle: co3.py of the released code: repetition_tolerance 1, so no second answer."""
    once = conversation(6, y="Bob") + "\nAnn: Well, I never did.\nBob: Well, I never did."
    found, requests = as_published(once)
    assert (len(found.turns), len(requests), found.fault) == (8, 1, "repetition")
    nameless = conversation(6, y="Bob") + "\nI forgot who I am.\nAnn: Good bye then."
    found, requests = as_published(nameless)
    assert (len(requests), found.fault) == (1, "missing prefix")


def test_as_published_makes_two_attempts_and_keeps_the_longest_by_characters():
    """Oracle: co3.py of the released code: generation_attempt_count 2, sorted by len."""
    many, long = conversation(3, y="Bob"), f" Hi.\nBob: {'I see. ' * 40}"
    for answers in ((many, "", long, ""), (long, "", many, "")):
        found, requests = as_published(*answers)
        assert stages(requests) == [(s, a) for a in (0, 1) for s in ("dialogue", "continuation")]
        assert (len(found.turns), found.attempts, found.fault) == (2, 2, "too few turns")


def test_as_published_continues_after_a_blank_line_and_not_at_the_token_limit():
    """Oracle: co3.py of the released code, which adds a continuation of two turns or more."""
    cut = Response(conversation(7, y="Bob") + " And then I wa", finish_reason="length")
    found, requests = as_published(cut)
    assert len(requests) == 1 and found.turns.dialogue[-1].endswith("And then I wa")
    blank = conversation(7, y="Bob").replace("\nBob", "\n\nBob", 1)
    found, requests = as_published(blank, "Bob: One.\nAnn: This is what I say in turn number 7.")
    assert len(found.turns) == 9
    # The first name comes twice there, and no next speaker.
    assert "with multiple turns.\nAnn:Ann: This is" in requests[1].prompt
    assert requests[1].prompt.endswith("turn number 7.\n")
    assert requests[1].messages[0][1].startswith(f"{GOOD} Generate an in-depth conversation")
    assert len(as_published(blank, "Bob: One.")[0].turns) == 7


def test_as_published_names_the_third_person():
    """Oracle: co3.py of the released code: `and Z with` in the place of `with`."""
    three = " Hi.\nBob: Hi.\nCarl: Hello." + "\nAnn: What?\nBob: No.\nCarl: It is true."
    found, requests = as_published(three, z="Carl")
    assert "scene between Ann and Bob and Carl with multiple turns.\nAnn:" in requests[0].prompt
    assert set(found.turns.speakers) == {"Ann", "Bob", "Carl"}
    _, requests = drive(
        dialogue.converse("7", GOOD, "Ann", "Bob", BOOK, z="Carl"), [conversation(8)]
    )
    assert "between Ann and Bob with" in requests[0].prompt


def test_as_published_takes_a_narrative_that_was_cut_short():
    """Oracle: co3.py of the released code, which does not look at the reason of the end."""
    cut = Response("Ann took", finish_reason="length")
    asking = narrative.narrate("7", LITERAL, BOOK, retries=1, as_published=True)
    assert drive(asking, [cut])[0] == narrative.Narrative("Ann took", 1)


def test_no_conversation_at_all():
    found, requests = converse("", "", "")
    assert found.reason == "empty dialogue" and len(requests) == 3
    assert converse(REFUSAL, REFUSAL, REFUSAL)[0].reason == "refusal"
    assert not converse(REFUSAL, conversation(8))[0].fault
