"""Small tasks and answers for tests of data_pipeline.annotation."""

import random

from data_pipeline.annotation import pages
from data_pipeline.annotation.answers import Answer
from data_pipeline.annotation.assignment import shown_order
from data_pipeline.annotation.task_files import Item, Task

TURNS = ("I took my <b>brother's</b> car.", "Did you ask ${him}?", "No, & why 'should' I? 😀")


def item(name="i0", page="prosocial", **changes):
    """An item with all that a page shows."""
    given = {"context": TURNS}
    if page == "dialogues":
        given = {"options": (("Hello", "Hi there"), ("Good day", "Day", "Bye"))}
    elif page in ("responses", "prosocial"):
        given["options"] = ((f"First of {name}",), (f"Second of {name}",))
    elif page == "rots":
        given["rots"] = ("Ask before you borrow.", "It is rude to take things.", "Be kind.")
    elif page == "commonsense":
        texts = {"head": "PersonX takes a car?", "relation_tail": "Is PersonX sorry?"}
        given |= {"narrative": "Ann takes a car.", "texts": texts}
    return Item(name, **{**given, **changes})


def task(page="prosocial", items=4, **changes):
    """A task of a page with items i0, i1 ..."""
    made = pages.load(page)
    content = changes.pop("content", None) or [item(f"i{n}", page) for n in range(items)]
    systems = ("one", "two") if "options" in made.shows else ()
    return Task(made, tuple(content), **{"seed": 3, "systems": systems, **changes})


GOOD = {
    "dialogues": {
        **dict.fromkeys(("natural", "engaged", "consistent", "speakers", "specific"), "a2"),
        "overall": "b1",
        "aspect": "other",
        "aspect_other": "humour",
        "reasons": "It made me laugh more.",
    },
    "responses": {
        **dict.fromkeys(("natural", "consistent", "specific", "overall"), "b2"),
        "aspect": "natural",
        "reasons": "It sounds like a person.",
    },
    "prosocial": dict.fromkeys(
        ("prosocial", "engaged", "respectful", "coherent", "overall"), "tie"
    ),
    "rots": {
        "response": "Would he not be glad if you asked him first?",
        "rule": "previous",
        "chosen_rules": [1, 3],
        "rule_wrong": True,
        "better_rule": "Ask before you take a car.",
        "no_personal_data": True,
    },
    "proofreading": {"changes": {"3": "No. Should I have asked?"}},
    "safety": {
        "label.1": "caution",
        "reason.1": "It was theft.",
        "label.3": "casual",
        "reason.3": "A mere question.",
    },
    "validation": {"incoherent": [3], "harsh": []},
    "commonsense": {"head": "yes", "relation_tail": "unknown"},
    "survey": {"age": "30s", "education": "high_school", "assertiveness": "2"},
}


def answer(made, name="i0", judge="ann", answers=None, **changes):
    """An answer in the order that the judge would see."""
    order = shown_order(made, made.by_id[name], judge)
    given = GOOD[made.page.name] if answers is None else answers
    return Answer(made.fingerprint, name, judge, **{"answers": given, "order": order, **changes})


def voter(made, shares, seed=0, flip=0.0):
    """A function (item, judge) -> Answer: votes for first, tie, second with these shares.

    `flip` is the share of votes that take what is shown as A instead.
    """
    source = random.Random(seed)
    question = next(q for q in made.page.questions if q.compares)
    by_sign = {}
    for choice in question.choices:
        by_sign.setdefault((choice.value > 0) - (choice.value < 0), []).append(choice.id)

    def vote(name, judge):
        order = shown_order(made, made.by_id[name], judge)
        answers = {}
        for one in made.page.questions:
            if one.compares:
                sign = source.choices((-1, 0, 1), shares)[0]
                sign = -sign if order == (1, 0) else sign
                sign = -1 if source.random() < flip else sign
                answers[one.id] = source.choice(by_sign[sign])
            elif one.id in ("aspect", "reasons"):
                answers[one.id] = {"aspect": "natural"}.get(one.id, "Because it is so.")
        return Answer(made.fingerprint, name, judge, answers, 10.0, "", order)

    return vote
