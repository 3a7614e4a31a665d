"""What a judge gets next. Oracles: the rules as properties, and the browser's coin."""

import pathlib
import random
import shutil
import subprocess
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.annotation import assignment as s
from data_pipeline.annotation.answers import Answer
from tests.data_pipeline.annotation_samples import answer, item, task

SCRIPT = pathlib.Path(s.__file__).parent / "exchange/page.js"


def study(items, judges, golds=0, tests=0, **changes):
    content = [
        *(item(f"q{n}", role="qualification", expected={"overall": ["tie"]}) for n in range(tests)),
        *(item(f"g{n}", role="gold", expected={"overall": ["tie"]}) for n in range(golds)),
        *(item(f"i{n}") for n in range(items)),
    ]
    return task(content=content, judges_per_item=judges, **changes)


@settings(max_examples=40, deadline=None)
@given(
    items=st.integers(1, 7), per_item=st.integers(1, 3), people=st.integers(1, 5),
    golds=st.integers(0, 3), tests=st.integers(0, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_rules_of_assignment(items, per_item, people, golds, tests, seed):
    """Judges come in any order, hold pages, and some go away with one: every rule holds."""
    made = study(items, per_item, golds, tests, seed=seed, gold_every=2, qualification_pass=0.5)
    source, answers, held, orders = random.Random(seed), [], {}, {}
    names = [f"judge {n}" for n in range(people)]
    for _ in range(people * (items + golds + tests) * 4):
        judge = source.choice(names)
        found = s.assign(made, answers, judge, held)
        if found.item is None:
            continue
        name = found.item.id
        # Given again until it is answered, always in the same order.
        assert s.assign(made, answers, judge, {name: {judge}}).item == found.item
        assert orders.setdefault((name, judge), found.order) == found.order
        held.setdefault(name, set()).add(judge)
        if source.random() < 0.7:
            held[name].discard(judge)
            answers.append(answer(made, name, judge))
    pairs = Counter((x.judge, x.item) for x in answers)
    assert set(pairs.values()) <= {1}
    votes = Counter(x.item for x in answers if x.item.startswith("i"))
    assert all(count <= per_item for count in votes.values())
    for judge in names:
        own = [x.item[0] for x in answers if x.judge == judge]
        assert own[:tests] == ["q"] * min(tests, len(own)) and "q" not in own[tests:]
        # One gold item in each block of two items.
        regular = own.count("i")
        assert own.count("g") <= min(golds, regular // 2 + 1)
    # Whoever is left finishes, once nobody holds a page.
    for judge in names:
        while (found := s.assign(made, answers, judge)).item is not None:
            answers.append(answer(made, found.item.id, judge))
        assert found.reason == s.DONE
    votes = Counter(x.item for x in answers if x.item.startswith("i"))
    assert set(votes.values()) == {min(per_item, people)} and len(votes) == items


def test_who_fails_the_qualification_gets_nothing_more():
    """Oracle: 1 of 2 right is below 0.8."""
    made = study(3, 3, tests=2, qualification_pass=0.8)
    wrong = dict.fromkeys(("prosocial", "engaged", "respectful", "coherent", "overall"), "a")
    answers = [answer(made, "q0"), answer(made, "q1", answers=wrong)]
    assert s.assign(made, answers, "ann") == s.Next(None, reason=s.NOT_QUALIFIED)
    assert s.assign(made, [*answers[:1], answer(made, "q1")], "ann").item.id.startswith("i")


def test_models_take_no_places_and_held_pages_do():
    """Oracle: one judge an item; a model's answer leaves it open, another's open page does not."""
    made = study(1, 1)
    model = Answer(made.fingerprint, "i0", "model:x", {}, order=(0, 1))
    assert s.assign(made, [model], "ann").item.id == "i0"
    assert s.assign(made, [], "ann", {"i0": {"bob"}}).reason == s.TAKEN


def test_gold_is_judged_in_terms_of_the_options():
    """Oracle: "second" is right as B in one order and as A in the other."""
    made = task(content=[item("g", role="gold", expected={"overall": ["second"]}), item("i")])
    votes = dict.fromkeys(("prosocial", "engaged", "respectful", "coherent"), "tie")
    for order, right in (((0, 1), "b"), ((1, 0), "a")):
        for choice in ("a", "tie", "b"):
            given_ = answer(made, "g", answers={**votes, "overall": choice}, order=order)
            assert s.is_right(made, given_) is (choice == right)


def test_the_coin_is_even_and_the_browsers():
    """Oracle: half of 10,000, within 4 standard deviations; node runs the page's own script."""
    texts = [f"3/ü😀{n % 100}/w{n // 100}" for n in range(10_000)]
    assert abs(sum(map(s.coin, texts)) - 5000) < 200
    if shutil.which("node") is None:
        pytest.skip("no node")
    code = (
        f"const {{coin}} = require({str(SCRIPT)!r});"
        "let s = ''; for (let n = 0; n < 300; n++)"
        "s += coin(`3/ü😀${n % 100}/w${Math.floor(n / 100)}`); console.log(s)"
    )
    run = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "".join(str(s.coin(text)) for text in texts[:300])
