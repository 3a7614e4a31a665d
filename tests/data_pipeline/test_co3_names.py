# ruff: noqa: E501 -- one case, one line
"""Names replaced: which words are names, and that one name is one other throughout."""

import dataclasses
import json
import re

import pytest

from cosmo.tasks import namebook
from data_pipeline.co3 import names, schema

BOOK = namebook.load()


def replaced(text, x="Ann", y="", speakers=("Ann", "Coach"), record_id="7", seed=0):
    record = schema.Record(record_id, "PersonX runs", "xWant", "to win", f"{x} runs.", x, y)
    record = dataclasses.replace(
        record, narrative=text, dialogue=("Hi.", "Yes?"), speakers=tuple(speakers)
    )
    return names.replace(record, BOOK, seed)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Ann runs.", "@ runs."),
        ("Ann's car, and Ann\u2019s house", "@'s car, and @\u2019s house"),
        ("Hi, Ann! Ann? Ann: Ann; (Ann) \"Ann\" 'Ann' Ann\u2026", "Hi, @! @? @: @; (@) \"@\" '@' @\u2026"),
        ("ANN! Ann-", "@! @-"),
        # Within other words, addresses and names of two parts: no name.
        ("Annapolis, Anna, Mary-Ann, Ann-Marie, annual, JoAnn, O'Ann, Ann2, Annie", None),
        ("@Ann, ann@Ann.com, x.Ann", None),
        # Small letters are words.
        ("ann", None),
    ],
)  # fmt: skip
def test_where_a_name_is_one(text, wanted):
    """Oracle: by hand; @ is the new name of Ann."""
    found = replaced(text)
    assert found.x in BOOK and found.x != "Ann"
    if wanted is None:  # other names may have been replaced ("Anna"), what holds Ann may not
        kept = re.findall(r"[\w@.'-]*Ann[\w.@'-]*", text)
        assert [w for w in kept if w in ("Anna", "Annie") or w in found.narrative] == kept
        assert found.x not in found.narrative
    else:
        assert re.sub(found.x, "@", found.narrative, flags=re.IGNORECASE) == wanted


def test_names_that_end_with_s():
    """Oracle: James' car is Ann's car; a quotation mark stays one."""
    found = replaced("James' car, James's car, 'I am James'", x="James")
    new = found.x
    ending = "'" if new.endswith("s") else "'s"
    assert found.narrative == f"{new}{ending} car, {new}'s car, 'I am {new}'"


@pytest.mark.parametrize(
    "name, text, wanted",
    [
        ("Will", "Will goes home. Will you come? Will they? I will ask Will.", "@ goes home. Will you come? Will they? I will ask @."),
        ("Will", "Will, come here! Hey Will! Will's car. Will and Tess met.", "@, come here! Hey @! @'s car. @ and # met."),
        ("May", "May I come in May? May is here. On May 5 I saw May.", "May I come in May? @ is here. On May 5 I saw @."),
        ("Mark", "Mark my words, Mark. Mark said so.", "Mark my words, @. @ said so."),
        ("Hope", "Hope you are well, Hope. I hope so. Hope has come.", "Hope you are well, @. I hope so. @ has come."),
        ("Grace", "I asked Grace for a Grace period. Grace under pressure.", "I asked @ for a Grace period. Grace under pressure."),
        ("Paris", "Paris was in Paris with Paris.", "@ was in Paris with @."),
    ],
)  # fmt: skip
def test_words_that_are_names_too(name, text, wanted):
    """Oracle: by hand; @ is the new name where the word is the person."""
    found = replaced(text, x=name, speakers=(name, "Coach"))
    again = found.narrative.replace(found.x, "@")
    if "#" in wanted:
        again = re.sub(r"@ and \w+ met", "@ and # met", again)
    assert again == wanted


@pytest.mark.parametrize(
    "text", ["Will you come in May?", "Grace lasts. Mark my words", "Paris in June"]
)
def test_words_stay_where_nobody_has_that_name(text):
    """Oracle: no person of the triple, speaker or introduction has it."""
    assert replaced(text).narrative == text


def test_a_person_the_text_introduces():
    """Oracle: "my friend Grace" and "Uncle Will" are persons."""
    found = replaced("My friend Grace and Uncle Will came. Grace is nice. Will you stay, Will?")
    assert "Grace" not in found.narrative
    assert re.fullmatch(
        r"My friend (\w+) and Uncle (\w+) came\. \1 is nice\. Will you stay, \2\?", found.narrative
    )


@pytest.mark.parametrize(
    "text, new",
    [
        ("I told Bob. Bob laughed.", True),
        ("Thanks, Bob.", True),
        ("Ask Will. Will you?", True),
        ("The Union Jack. Jack it up.", False),
        ("Frank Sinatra sang. To be frank.", False),
        ("Frank is here.", False),  # nothing tells it from "Frank talk is rare"
    ],
)
def test_a_capital_in_the_middle_of_a_sentence_tells(text, new):
    """Oracle: by hand."""
    found = replaced(text)
    assert (found.narrative != text) == new
    assert found.narrative.endswith(" Will you?") == text.endswith(" Will you?")


def test_third_persons_are_replaced_and_stay_apart():
    """Oracle: four names, four others, none of which was there before."""
    found = replaced("Ann, Michael, Emily and Bob. Michael!", y="Bob", speakers=("Ann", "Bob"))
    new = re.findall(r"\w+", found.narrative)
    assert len({*new} - {"and"}) == 4 and not {*new} & {"Ann", "Michael", "Emily", "Bob"}
    assert new[1] == new[-1] and new[0] == found.x == found.speakers[0]
    assert new[4] == found.y == found.speakers[1]


def test_labels():
    """Oracle: a name in a longer label is replaced, the rest stays."""
    found = replaced("Hi.", speakers=("Ann", "Aunt Emily"))
    assert found.speakers[1].startswith("Aunt ") and found.speakers[1] != "Aunt Emily"
    assert replaced("Hi.", speakers=("Ann", "Mrs. Zorblax")).speakers[1] == "Mrs. Zorblax"


def test_seed_and_id_decide():
    """Oracle: determinism; and a second time changes nothing."""
    one = replaced("Ann met Michael.")
    assert one == replaced("Ann met Michael.")
    assert one.x != replaced("Ann met Michael.", seed=1).x
    assert one.x != replaced("Ann met Michael.", record_id="8").x
    assert names.replace(one, BOOK, 5) == one


def test_the_real_rows_are_unharmed(shared):
    """Oracle: with the old names put back, every field is what it was, to the character."""
    for line in (shared / "data/soda_rows.jsonl").read_text().splitlines():
        old = schema.from_row(json.loads(line))
        new = names.replace(old, BOOK, 0)
        assert new.x != old.x and new.x in BOOK
        text = json.dumps(schema.soda_row(new))
        for ours, theirs in ((new.x, old.x), (new.y, old.y)):
            if ours:
                assert json.dumps(schema.soda_row(old)).count(theirs) == text.count(ours)
                text = text.replace(ours, theirs)
        assert json.loads(text) == json.loads(line)


def test_replacements_are_spread_over_the_list():
    """Oracle: 3,000 draws from about 9,400 names alike: the commonest comes seven times at most
    (the chance of eight in any is below 1e-3)."""
    drawn = [BOOK.replacements(str(i), 0, 1, set())[0] for i in range(3000)]
    assert max(drawn.count(name) for name in set(drawn)) <= 7 and len(set(drawn)) > 2300


def test_a_name_within_a_speakers_label_is_replaced():
    """Oracle: by hand; the label goes with the text, and a title or a role is no name."""
    found = replaced("Ann's mom saw the King.", speakers=("Ann's Mom", "King"))
    assert found.speakers == (f"{found.x}'s Mom", "King")
    assert found.narrative == f"{found.x}'s mom saw the King."
    assert replaced("Hi.", x="Ann", speakers=("Ann", "Dean")).speakers[1] != "Dean"


@pytest.mark.parametrize("x", ["\u00c9lodie", "\u092e\u0940\u0930\u093e", "\u674e\u660e"])
def test_a_person_whose_name_begins_with_another_letter_is_renamed_everywhere(x):
    """Oracle: the new name stands in the text, too; a longer word stays."""
    record = dataclasses.replace(
        schema.Record("7", "PersonX runs", "xWant", "to win", f"{x} runs.", x),
        narrative=f"{x} ran. Then {x}'s friend came.",
        dialogue=(f"Hi, {x}!", "\u00c9lodies runs."),
        speakers=(x, "Coach"),
    )
    found = names.replace(record, namebook.load(), 0)
    assert found.x != x and found.speakers == (found.x, "Coach")
    assert found.narrative == f"{found.x} ran. Then {found.x}'s friend came."
    assert found.dialogue == (f"Hi, {found.x}!", "\u00c9lodies runs.")
