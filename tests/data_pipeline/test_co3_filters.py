"""The filters of section 3.1, and the model's answers they go by."""

import dataclasses
import json
import math

import pytest

from cosmo.tasks import namebook
from data_pipeline.calls.requests import Response
from data_pipeline.co3 import commonsense, filters, prompts, schema, sentences
from data_pipeline.co3.triples import Triple
from tests.data_pipeline.co3_script import drive

BOOK = prompts.load()
NAMES = namebook.load()


def record(dialogue=("a b c", "d e f", "g h i", "j k l"), names=("Ann", "Coach"), **fields):
    speakers = tuple(names[i % len(names)] for i in range(len(dialogue)))
    base = schema.Record("7", "PersonX runs", "xWant", "to win", "Ann runs. ...", "Ann")
    fields = {"dialogue": tuple(dialogue), "speakers": speakers, "narrative": "Ann runs.", **fields}
    return dataclasses.replace(base, **fields)


@pytest.mark.parametrize(
    "found, reason",
    [
        (record(), None),
        (record(marks=("dialogue: missing prefix",)), "missing prefix"),
        (record(marks=("dialogue: too few turns", "narrative: unchanged")), None),
        (record(["I am here", "I am here!", "i am HERE", "b"]), "repetition"),
        (record(["I am here", "I am here", "c", "b"]), None),
        (record(["a", "...", "c", "d"]), "empty utterance"),
        (record(["a", "b Ann: c", "c", "d"]), "prefix within a turn"),
        (record(["a", "Mary Ann: c", "c", "at 6:30"]), "prefix within a turn"),
        (record(["a", "Annie: c", "c", "at 6:30"]), None),
        (record(["a", "Hi [name], how are you?", "c", "d"]), "open variable"),
        (record(["a", "b", "c", "d"], narrative="PersonX runs."), "open variable"),
        (record(["a", "A person x-rayed me", "c", "d"]), None),
    ],
)
def test_lexical(found, reason):
    """Oracle: by hand, after section 3.1 (1)."""
    assert filters.lexical(found) == reason


@pytest.mark.parametrize("turns, kept", [(3, False), (4, True), (20, True), (21, False)])
def test_turn_count(turns, kept):
    """Oracle: section 3.1 (2): less than four or more than twenty are removed."""
    assert (filters.turn_count(record([f"t {i}" for i in range(turns)])) is None) == kept


@pytest.mark.parametrize(
    "names, reason",
    [
        (("Ann", "Coach"), None),
        (("Ann",), "one speaker"),
        (("Ann", "Coach", "Bob"), "more than two speakers"),
        (("Ann", "Friends"), "more than two speakers"),
        (("Ann", "Everyone"), "more than two speakers"),
        (("Ann", "Police Officer"), None),
    ],
)
def test_speaker_count(names, reason):
    """Oracle: section 3.1 (3)."""
    assert filters.speaker_count(record(names=names)) == reason


@pytest.mark.parametrize(
    "speaker, verdict",
    [
        ("Ann", True),  # PersonX
        ("Michael", True),
        ("Michael Smith", True),
        ("Mom", True),
        ("Mrs. Zorblax", True),
        ("Best Friend", True),
        ("Friend 1", True),
        ("Dog Walker", None),
        ("Cat's Owner", True),
        ("Store Clerk", True),
        ("Imaginary Friend", False),
        ("Dog", False),
        ("Michael's Dog", False),
        ("Broomstick", False),
        ("Robot Teacher", False),
        ("Star", None),  # a given name, and a word
        ("Zorblax", None),
        ("Cashew", None),
    ],
)
def test_human_by_words(speaker, verdict):
    """Oracle: appendix B.1 and the paper's examples (broomstick, imaginary friend, dog)."""
    assert filters.human(speaker, record(), NAMES) is verdict


def test_the_model_is_asked_of_whom_words_do_not_tell():
    """Oracle: appendix B.1: one question for each such speaker."""
    found, requests = drive(
        filters.ask_human(record(names=("Ann", "Zorblax")), NAMES, BOOK), [" No, it is a planet."]
    )
    assert [r.prompt for r in requests] == ["Q: Is Zorblax a person?\nA:"]
    assert filters.human_speakers(found, NAMES) == "speaker is not human"
    again, requests = drive(filters.ask_human(found, NAMES, BOOK), [])
    assert not requests and again == found
    yes, _ = drive(filters.ask_human(record(names=("Ann", "Zorblax")), NAMES, BOOK), [" Yes"])
    assert filters.human_speakers(yes, NAMES) is None
    scored = Response(" Well", logprobs=({" No": -0.2, " Yes": -1.9},))
    no, _ = drive(filters.ask_human(record(names=("Ann", "Zorblax")), NAMES, BOOK), [scored])
    assert filters.human_speakers(no, NAMES) == "speaker is not human"


def test_canary():
    """Oracle: dialogues that need intervention go; one without a label is no safe one."""
    assert filters.canary(record(), None) is None
    assert filters.canary(record(), {"7": "__needs_caution__"}) is None
    assert filters.canary(record(), {"7": "__needs_intervention__"}) == "Canary: needs intervention"
    assert filters.canary(record(), {}) == "no label of Canary"


@pytest.mark.parametrize(
    "scores, reason",
    [
        ({}, None),
        ({"violence": 0.5}, None),
        ({"violence": 0.51}, "moderation: violence"),
        ({"hate/threatening": 0.9}, "moderation: hate"),
        ({"sexually explicit": 0.9}, "moderation: sexual"),
        ({"sexual/minors": 0.6, "hate": 0.1}, "moderation: sexual"),
        ({"self-harm": 0.9, "harassment": 0.9}, None),
    ],
)
def test_moderation(scores, reason):
    """Oracle: section 3.1: above 0.5 of violence, hate or sexually explicit."""
    found, requests = drive(filters.ask_moderation(record()), [Response(scores=scores)])
    assert requests[0].stage == "moderation" and requests[0].messages == ()
    assert requests[0].prompt == "Ann runs.\na b c\nd e f\ng h i\nj k l"
    assert filters.moderation(found) == reason


def test_the_real_rows_stay(shared):
    """Oracle: SODA published them, one with head_answer Unknown and pmi_head_answer No."""
    for line in (shared / "data/soda_rows.jsonl").read_text().splitlines():
        found = schema.from_row(json.loads(line))
        assert filters.lexical(found) is None
        assert filters.turn_count(found) is None
        assert filters.speaker_count(found) is None
        assert filters.human_speakers(found, NAMES) is None
        assert all(filters.human(name, found, NAMES) for name in found.speakers)
        assert filters.head_event(found) is None


def answers(yes, no, unknown):
    return Response(" Yes", logprobs=({" Yes": yes, " No": no, " Unknown": unknown},))


def judged(reply):
    triple = Triple("7", "PersonX runs", "xWant", "to win", 0, names=("Ann", "", ""))
    sentence = sentences.sentence(triple, BOOK, NAMES, 0)
    return drive(commonsense.judge(record(), sentence, BOOK), reply)


def test_commonsense_asks_four_questions():
    """Oracle: appendix B.1: head of the narrative, relation and tail of the conversation; each
    with and without."""
    found, requests = judged([answers(-0.1, -3, -4)] * 4)
    assert [r.prompt for r in requests] == [
        "Ann runs.\nQ: Ann runs, is this true?\nA:",
        "Q: Ann runs, is this true?\nA:",
        "Ann: a b c\nCoach: d e f\nAnn: g h i\nCoach: j k l\n"
        "Q: Does Ann want to win after Ann runs?\nA:",
        "Q: Does Ann want to win after Ann runs?\nA:",
    ]
    assert [r.stage for r in requests] == [
        "head",
        "head_alone",
        "relation_tail",
        "relation_tail_alone",
    ]
    assert found.head_answer == "Yes"


def test_pmi_takes_out_what_the_model_says_anyway():
    """Oracle: by hand: -0.2 - -0.1 = -0.1 for Yes, -2 - -3 = 1 for No, -5 - -5 = 0 for Unknown."""
    found, _ = judged([answers(-0.2, -2, -5), answers(-0.1, -3, -5)] * 2)
    assert (found.head_answer, found.pmi_head_answer) == ("Yes", "No")
    assert (found.relation_tail_answer, found.pmi_relation_tail_answer) == ("Yes", "No")


def test_without_log_probabilities_the_text_answers_and_half_the_questions_are_saved():
    """Oracle: pmi answers need log-probabilities."""
    found, requests = judged([" Yes.", " It is not clear."])
    assert [r.stage for r in requests] == ["head", "relation_tail"]
    assert (found.head_answer, found.pmi_head_answer) == ("Yes", "")
    assert (found.relation_tail_answer, found.pmi_relation_tail_answer) == ("Unknown", "")


@pytest.mark.parametrize(
    "alternatives, wanted",
    [
        (({"Yes": -0.5, "No": -1.0, "Unknown": -2.0},), (-0.5, -1.0, -2.0)),
        # Spellings of one answer are added: e^-1 + e^-1.
        (({" Yes": -1.0, "yes": -1.0, "no": -4.0, "unknown": -5.0},), (math.log(2) - 1, -4, -5)),
        # Pieces of words; what is not there has none.
        (({"Un": -0.1, "Y": -3.0, "Maybe": -6.0},), (-3.0, None, -0.1)),
        # A space or a line's end first.
        (({"\n": -0.1, "Yes": -3.0}, {"No": -0.2, "Yes": -1.5, "x": -9.0}), (-1.5, -0.2, None)),
        (({"\u2581No": -0.2, "\u0120Yes": -1.5},), (-1.5, -0.2, None)),
        # Other words for an answer; "Not" may begin "Not mentioned".
        (({"Nope": -0.2, "Yeah": -1.5, "Not": -3.0},), (-1.5, -0.2, None)),
        # What a server writes for an alternative that it left out.
        (({"No": -0.2, "Yes": -math.inf, "Unknown": -9999.0},), (None, -0.2, None)),
        (({"No": -0.2, "Yes": -100.0},), (None, -0.2, None)),
    ],
)
def test_log_probabilities(alternatives, wanted):
    """Oracle: by hand."""
    found = commonsense.log_probabilities(Response(logprobs=alternatives))
    assert [found.known.get(a) for a in commonsense.ANSWERS] == pytest.approx(wanted)


def test_an_answer_that_is_there_beats_those_that_are_not():
    """ "No" is the least of those shown, "Yes" is not shown. Oracle: the model's own order."""
    found = commonsense.log_probabilities(Response(logprobs=({"I": -0.1, "No": -1.0},)))
    assert found.known == {"No": -1.0}


@pytest.mark.parametrize(
    ("given", "alone", "wanted"),
    [
        # 0.4 for Yes, -1.5 for No; Unknown is in neither.
        ({"Yes": -0.1, "No": -2.5}, {"Yes": -0.5, "No": -1.0}, "Yes"),
        # Unknown is at most -2.5 - -0.1 = -2.4.
        ({"Yes": -0.1, "No": -2.5}, {"Yes": -0.5, "No": -1.0, "Unknown": -0.1}, "Yes"),
        # Unknown is at most -2.5 - -9 = 6.5, so it may be the highest.
        ({"Yes": -0.1, "No": -2.5}, {"Yes": -0.5, "No": -1.0, "Unknown": -9.0}, ""),
        # Yes is at least -0.1 - -3 = 2.9 there, and No -1.5; only one of them is known.
        ({"Yes": -0.1, "No": -2.5}, {"No": -1.0, "It": -3.0}, ""),
        ({"Yes": -0.1, "No": -2.5, "Unknown": -3}, {"Yes": -0.5, "No": -1.0}, ""),
        # Servers that decode greedily, or clamp what they left out.
        *(
            ({"No": 0.0, "Yes": out, "Unknown": out}, {"No": 0.0, "Yes": out, "Unknown": out}, "")
            for out in (-math.inf, -9999.0, -100.0)
        ),
        ({"No": -0.01, "no": -6.0, "It": -7.0}, {"No": -0.02, "It": -8.0, "We": -15.0}, ""),
    ],
)
def test_information_needs_both_log_probabilities(given, alone, wanted):
    """Oracle: bounds by hand: log-probability given the text, less that without it."""
    replies = [Response(" No", logprobs=(one,)) for one in (given, alone)] * 2
    found, _ = judged(replies)
    assert found.pmi_head_answer == wanted
    assert found.head_answer == ("No" if given["No"] > -1 else "Yes")


def test_a_chosen_word_without_log_probability_is_the_answer():
    """The server writes null for it. Oracle: the text; no pmi answer, for lack of its number."""
    reply = Response(" Yes", logprobs=({"No": -5.0, "Unknown": -7.0},))
    found, _ = judged([reply] * 4)
    assert (found.head_answer, found.pmi_head_answer) == ("Yes", "")
    asked = record(names=("Ann", "Zorblax"))
    found, _ = drive(filters.ask_human(asked, NAMES, BOOK), [reply])
    assert found.human == {"Zorblax": True}


def test_a_reply_without_an_answer_decides_nothing():
    """Oracle: the answers stay empty, the marks name the fault, and nobody is called no human."""
    fault = "reasoning used up max_tokens"
    found, requests = judged([Response(fault=fault)] * 2)
    assert (found.head_answer, found.relation_tail_answer) == ("", "")
    assert found.marks == (f"head: {fault}", f"relation_tail: {fault}") and len(requests) == 2
    asked = record(names=("Ann", "Zorblax"))
    found, _ = drive(filters.ask_human(asked, NAMES, BOOK), [Response(fault=fault)])
    assert found.human == {} and found.marks == (f"human: {fault}",)
    assert filters.human_speakers(found, NAMES) is None


@pytest.mark.parametrize(
    "text",
    ["<think>", "</think>", "<|im_end|>", "[INST]", "```", "a\x00b", "</s>", "\u25c1think\u25b7"],
)
def test_a_mark_of_a_model_s_format_is_in_no_record(text):
    """Oracle: each is refused by name, wherever it stands; what only looks alike is not."""
    said = "mark of a model's format"
    assert filters.lexical(record(dialogue=(f"Well {text} then", "Oh?", "Yes.", "So?"))) == said
    assert filters.lexical(record(narrative=f"Ann runs. {text}")) == said
    for fine in ("I <3 you", "a < b", "[laughs] oh", "<sighs> no"):
        assert filters.lexical(record(dialogue=(fine, "Oh?", "Yes.", "So?"))) is None


@pytest.mark.parametrize("alternatives", [None, (), ({},), ({"Hm": -0.1},), ({"\n": -0.1},)])
def test_no_log_probabilities(alternatives):
    """Oracle: none of the answers is there."""
    assert commonsense.log_probabilities(Response(logprobs=alternatives)) is None


@pytest.mark.parametrize(
    "text, wanted",
    [
        (" Yes", "Yes"),
        ("Yes, because she does not know.", "Yes"),
        ("**No**", "No"),
        ("No.", "No"),
        ("Nope", "No"),
        ("Yeah, she does.", "Yes"),
        ("N/A", "Unknown"),
        ("Not mentioned.", "Unknown"),
        ("No information is given.", "Unknown"),
        ("Unknown", "Unknown"),
        ("Answer: Yes", "Yes"),
        ("The answer is no.", "No"),
        ("It cannot be determined", "Unknown"),
        ("A: yes", "Yes"),
        ("Nobody knows", "Unknown"),
        ("", "Unknown"),
        ("banana", "Unknown"),
    ],
)
def test_answers_in_words(text, wanted):
    """Oracle: by hand."""
    assert commonsense.in_words(text) == wanted


def test_a_head_that_is_denied_goes():
    """Oracle: section 3.1: pairs that lack the head event are removed."""
    assert filters.head_event(record(head_answer="No")) == "head is not in the narrative"
    assert filters.head_event(record(head_answer="Unknown")) is None
    assert filters.head_event(record(relation_tail_answer="No")) is None
