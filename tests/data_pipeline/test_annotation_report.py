"""Reports. Oracles: votes counted by hand, known preferences of simulated judges, the papers."""

import json

import pytest

from cosmo.engine.base.errors import DataError
from data_pipeline.__main__ import main
from data_pipeline.annotation import report, report_text, statistics
from data_pipeline.annotation.answers import (
    ORDERS,
    Answer,
    Answers,
    Quarantined,
    append_answers,
)
from data_pipeline.annotation.task_files import write_task
from tests.data_pipeline.annotation_samples import GOOD, answer, item, task, voter

QUESTIONS = ("prosocial", "engaged", "respectful", "coherent", "overall")


def given(made, votes, judge="ann", order=(0, 1)):
    """Answers of a judge: "a", "tie" or "b" for i0, i1 ..., the same for every question."""
    return [
        Answer(made.fingerprint, f"i{n}", judge, dict.fromkeys(QUESTIONS, v), 5.0, "", order)
        for n, v in enumerate(votes)
        if v
    ]


def built(made, *answers, **more):
    return report.build(made, Answers(tuple(x for group in answers for x in group), **more))


def test_votes_are_turned_back_and_counted():
    """Oracle: by hand. The second judge saw the second system as A, so that judge's a is for it.

    Items: first/first, first/second (undecided), tie/tie, second alone.
    """
    made = task(items=4)
    one = given(made, ["a", "a", "tie", "b"])
    two = given(made, ["b", "a", "tie", None], "bob", (1, 0))
    found = built(made, one, two)["people"]
    overall = found["questions"]["overall"]
    assert overall["counts"] == {"first": 3, "tie": 2, "second": 2} and overall["votes"] == 7
    assert overall["majority"] == {"first": 1, "tie": 1, "second": 1, "none": 1}
    assert overall["choices"] == {"a": 3, "tie": 2, "b": 2}
    assert overall["win_rate"]["ties_out"] == 2 / 5 and overall["win_rate"]["ties_halved"] == 3 / 7
    assert overall["position"] | {"wilson": 0} == {
        "a": 3, "b": 2, "share_a": 3 / 5, "wilson": 0, "p": 1.0,
    }  # fmt: skip
    tests = overall["tests"]
    assert tests["paper_z"] == pytest.approx(statistics.two_proportion_z(2, 3, 7))
    assert tests["sign_test_items"] == 1.0 and tests["sign_test_votes"] == 1.0
    assert tests["bootstrap"]["difference"] == pytest.approx(-1 / 7)
    # Two items agree, one does not: alpha of three pairs by hand, 1 - observed / expected.
    assert overall["alpha"]["nominal"] == pytest.approx(1 - (1 / 3) / ((36 - 14) / 30))
    assert found["seconds"]["median"] == 5.0 and found["judges"] == 2
    ann = found["by_judge"]["ann"]
    assert ann["agreement"] == {"agreed": 10, "of": 15, "share": 10 / 15}  # five questions


def test_a_models_votes_are_never_added_to_peoples():
    """Oracle: the report without the model."""
    made = task(items=4)
    people = given(made, ["a", "b", "tie", "b"])
    model = [x for order in ORDERS for x in given(made, "aaaa", "model:x", order)]
    both, alone = built(made, people, model), built(made, people)
    assert both["people"] == alone["people"] and list(both["models"]) == ["model:x"]
    by_order = both["models"]["model:x"]["by_order"]["overall"]
    # It prefers A always: half of its votes for each system, never the same in both orders.
    assert (by_order["share_a"], by_order["consistent"], by_order["both_orders"]) == (1.0, 0.0, 4)
    assert by_order["p"] == pytest.approx(2 / 2**8)
    counts = both["models"]["model:x"]["questions"]["overall"]["counts"]
    assert counts == {"first": 4, "tie": 0, "second": 4}
    only = built(made, model)
    assert only["people"] is None and "a model" in report_text.text(only)


def test_agreement_of_a_model_with_people():
    """Oracle: by hand; of 4 items people have a majority in 3, the model agrees in 2."""
    made = task(items=4)
    people = [*given(made, ["a", "b", "b", "a"]), *given(made, ["a", "b", "b", "b"], "bob")]
    model = [
        *given(made, ["a", "b", "a", "a"], "model:x"),
        *given(made, ["b", "a", "b", "b"], "model:x", (1, 0)),
    ]
    found = built(made, people, model)["models"]["model:x"]["agreement_with_people"]["overall"]
    assert (found["units"], found["share"]) == (3, 2 / 3)
    pairs = [("first", "first"), ("second", "second"), ("first", "second")]
    assert found["kappa"] == pytest.approx(statistics.kappa(pairs))


def test_all_ties_one_judge_and_items_without_answers():
    """Oracle: nothing is preferred, so p is 1 and shares of wins are undefined."""
    made = task(items=4)
    found = built(made, given(made, ["tie", "tie", None, None]))
    overall = found["people"]["questions"]["overall"]
    assert overall["win_rate"]["ties_out"] is None and overall["win_rate"]["ties_halved"] == 0.5
    tests = overall["tests"]
    assert tests["paper_z"] is None and tests["one_sample_z"] is None
    assert tests["sign_test_items"] == tests["sign_test_items_holm"] == 1.0
    assert overall["alpha"] == {"nominal": None, "ordinal": None}
    assert found["people"]["items_without_answer"] == ["i2", "i3"]
    assert found["people"]["items_with_too_few"] == 2
    printed = report_text.text(found)
    assert "one judge only" in printed and "2 items have no answer (i2, i3)" in printed
    assert "undefined" in printed
    json.dumps(found, allow_nan=False)


def test_nothing_to_report_is_an_error():
    """Oracle: the first reason is quoted."""
    made = task(content=[item("g", role="gold", expected={"overall": ["tie"]}), item("i")])
    with pytest.raises(DataError, match="nothing to report"):
        built(made, [answer(made, "g")])
    bad = Quarantined("f", 1, "cut", "{")
    with pytest.raises(DataError, match="the first: cut"):
        built(made, quarantined=(bad,))


def test_gold_is_reported_and_left_out_of_votes():
    """Oracle: 1 of 2 right; two votes on the one item."""
    gold = [
        item(f"g{n}", role="gold", expected={"overall": [e]})
        for n, e in enumerate(("tie", "first"))
    ]
    made = task(content=[*gold, item("i0")])
    answers = [answer(made, name, judge) for name in ("g0", "g1", "i0") for judge in ("ann", "bob")]
    found = built(made, answers)["people"]
    assert found["by_judge"]["ann"]["gold"] == {"right": 1, "total": 2, "share": 0.5}
    assert found["questions"]["overall"]["votes"] == 2 and not found["items_without_answer"]


def screened_task():
    """A task of two items and two gold items, and the answers of three people and a model.

    ann knows both gold answers, bob one of them, cy none; dee met no gold item.
    """
    gold = [item(f"g{n}", role="gold", expected={"overall": ["first"]}) for n in range(2)]
    made = task(content=[*gold, item("i0"), item("i1")])

    def of(judge, golds, vote):
        named = [*((f"g{n}", v) for n, v in enumerate(golds)), ("i0", vote), ("i1", vote)]
        return [
            Answer(made.fingerprint, n, judge, dict.fromkeys(QUESTIONS, v), 5.0, "", (0, 1))
            for n, v in named
        ]

    people = [of("ann", "aa", "b"), of("bob", "ab", "b"), of("cy", "bb", "a"), of("dee", "", "a")]
    return made, Answers(tuple(x for own in [*people, of("model:x", "bb", "a")] for x in own))


@pytest.mark.parametrize(("least", "names", "second"), [
    (0.0, [], 4 / 8), (0.5, ["cy"], 4 / 6), (0.51, ["bob", "cy"], 2 / 4),
])  # fmt: skip
def test_judges_below_a_share_of_gold_are_left_out(least, names, second):
    """Oracle: by hand: gold 2/2, 1/2, 0/2 and none; each has two votes, ann's and bob's are b."""
    made, answers = screened_task()
    found = report.build(made, answers, min_gold=least)
    screening = found["screening"]
    assert [one["judge"] for one in screening["left_out"]] == names
    assert screening["answers_left_out"] == 2 * len(names) and screening["unmeasured"] == ["dee"]
    before, after = screening["before"]["questions"]["overall"], found["people"]["questions"]
    assert before["shares"]["second"] == 4 / 8 and before["votes"] == 8
    assert after["overall"]["shares"]["second"] == second
    assert {*found["people"]["by_judge"]} == {"ann", "bob", "cy", "dee"} - {*names}
    # A model's votes are apart, and stay.
    assert found["models"]["model:x"]["questions"]["overall"]["votes"] == 2
    printed = report_text.text(found)
    assert f"left out: {len(names)} judges with {2 * len(names)} answers" in printed
    assert ("cy: 2 answers, gold 0/2 right" in printed) == ("cy" in names)
    assert "kept without a gold or qualification answer: 'dee'" in printed
    json.dumps(found, allow_nan=False)


def test_who_failed_the_qualification_is_left_out():
    """Oracle: exports let everybody in; 7 of 100 right is 0.07, although 0.07 * 100 is above 7."""
    tests = [
        item(f"q{n}", role="qualification", expected={"overall": ["first"]}) for n in range(100)
    ]
    made = task(content=[*tests, item("i0")], qualification_pass=0.07)

    def of(judge, right):
        votes = [*((f"q{n}", "a" if n < right else "b") for n in range(100)), ("i0", "a")]
        return [
            Answer(made.fingerprint, n, judge, dict.fromkeys(QUESTIONS, v), 5.0, "", (0, 1))
            for n, v in votes
        ]

    found = report.build(made, Answers((*of("ann", 7), *of("bob", 6))), min_gold=0)
    assert [one["judge"] for one in found["screening"]["left_out"]] == ["bob"]
    assert "bob: 1 answers, qualification 6/100 right" in report_text.text(found)


def test_nothing_to_screen_by_is_one_error(tmp_path, capsys):
    """Oracle: one line that names the flag; nothing is written."""
    made, answers = screened_task()
    few = [x for x in answers.kept if x.judge == "cy"]
    plain = task(items=1)
    for number, (one, given_answers, share, problem) in enumerate([
        (made, few, 0.5, "nobody is left of 1 judges, such as 'cy'"),
        (made, few, 1.5, "got 1.5: give a share from 0 to 1"),
        (plain, [answer(plain)], 0.5, "the task has no gold and no qualification items"),
    ]):  # fmt: skip
        task_path, path = tmp_path / f"t{number}.jsonl", tmp_path / f"a{number}.jsonl"
        write_task(task_path, one)
        append_answers(path, given_answers)
        command = ["annotate", "report", f"--task={task_path}", "--answers", str(path)]
        assert main([*command, f"--min_gold={share}", f"--output={tmp_path / 'out'}"]) == 1
        printed = capsys.readouterr().err
        assert problem in printed and "min_gold" in printed
        assert not (tmp_path / "out").exists()


def test_safety_votes_become_labels():
    """Oracle: appendix A.4: one vote for intervention decides, else votes for caution count."""
    made = task("safety", items=1)
    votes = {"ann": ("caution", "casual"), "bob": ("casual", "casual"), "cy": ("casual", "casual")}
    answers = [
        answer(made, judge=judge, answers=GOOD["safety"] | {"label.1": one, "label.3": two})
        for judge, (one, two) in votes.items()
    ]
    found = built(made, answers)["people"]
    assert found["safety_labels"]["__possibly_needs_caution__"] == 1
    assert found["safety_labels"]["__casual__"] == 1
    label = found["questions"]["label"]
    assert label["counts"] == {"caution": 1, "intervention": 0, "casual": 5}
    assert set(label["alpha"]) == {"nominal", "ordinal"}
    assert "possibly_needs_caution" in report_text.text(built(made, answers))


def test_reports_of_validation_and_edits():
    """Oracle: one of two dialogues is reported by one judge; edits of 1 and 1 utterances."""
    made = task("validation", items=2)
    clean = {"incoherent": [], "harsh": []}
    answers = [
        answer(made, "i0"),
        answer(made, "i0", "bob", clean),
        answer(made, "i1", "bob", clean),
    ]
    found = built(made, answers)["people"]["questions"]["incoherent"]
    assert found["items_reported"] == {"count": 1, "share": 0.5}
    assert found["counts"] == {"False": 8, "True": 1}
    proof = task("proofreading", items=2)
    edits = built(proof, [answer(proof, "i0"), answer(proof, "i1")])["people"]["questions"]
    assert edits["changes"] == {"kind": "edits", "given": 2, "mean_length": 1.0}
    assert "13.9%" in report_text.text(built(made, answers))


def test_commonsense_answers_are_measured_against_peoples_majority():
    """Oracle: table 10's measures, by hand: 3 yes of which 2 are found, 1 no found as yes."""
    truth, found = ["yes", "yes", "yes", "no"], ["yes", "yes", "no", "yes"]
    content = [
        item(f"i{n}", "commonsense", predicted={"head": f, "head/pmi": "Yes"})
        for n, f in enumerate(found)
    ]
    made = task("commonsense", content=content)
    answers = [
        answer(made, f"i{n}", judge, {"head": gold, "relation_tail": "yes"})
        for n, gold in enumerate(truth)
        for judge in ("ann", "bob")
    ]
    measured = built(made, answers)["people"]["predicted"]
    yes = measured["head"]["labels"]["yes"]
    assert (yes["precision"], yes["recall"], yes["f1"]) == (2 / 3, 2 / 3, 2 / 3)
    assert measured["head"]["overall"]["recall"] == pytest.approx(0.5)
    assert measured["head/pmi"]["labels"]["yes"]["recall"] == 1.0
    printed = report_text.text(built(made, answers))
    assert "98.9 / 94.8 / 96.8" in printed  # the paper's table stands below


@pytest.mark.parametrize(("page", "line"), [
    ("prosocial", "GPT-3 : Prost (RoT & Response)"), ("responses", "ChatGPT : Cosmo-11B (SODA)"),
])  # fmt: skip
def test_the_papers_numbers_stand_beside_ours(page, line):
    """Oracle: rows of tables 4 and 7."""
    made = task(page, items=6)
    vote = voter(made, (1, 0, 3) if page == "responses" else (1, 1, 1))
    printed = report_text.text(built(made, [vote(f"i{n}", "ann") for n in range(6)]))
    assert line in printed and "ours: one : two" in printed
    assert "the paper's form): " in printed and "900 votes: 0.170" in printed


def test_a_known_preference_is_recovered():
    """Oracle: simulated judges who prefer the second in 60 of 100, the first in 25, and tie in 15.

    Their bias for what is shown as A cancels, because sides are tossed.
    """
    made = task(items=200)
    vote = voter(made, (0.25, 0.15, 0.6), seed=4, flip=0.2)
    answers = [vote(f"i{n}", judge) for n in range(200) for judge in ("ann", "bob", "cy")]
    found = built(made, answers)["people"]["questions"]
    for one in found.values():
        # A fifth of the votes is A's, half of them for either system.
        assert one["shares"]["second"] == pytest.approx(0.8 * 0.6 + 0.1, abs=0.05)
        assert one["shares"]["first"] == pytest.approx(0.8 * 0.25 + 0.1, abs=0.05)
        low, high = one["tests"]["bootstrap"]["low"], one["tests"]["bootstrap"]["high"]
        assert low < 0.28 < high
        assert one["tests"]["sign_test_items_holm"] < 0.001
        assert one["position"]["share_a"] > 0.55 and one["position"]["p"] < 0.01
        assert abs(one["alpha"]["nominal"]) < 0.08  # votes are independent: chance agreement


def rejections(share, decided, studies, seed=0):
    """Shares of simulated studies in which the sign test, and the paper's z, find a difference."""
    import numpy as np

    wins = np.random.default_rng(seed).binomial(decided, share, studies)
    exact = [statistics.sign_test(int(w), int(decided - w)) < 0.05 for w in wins]
    z = [statistics.two_proportion_z(int(w), int(decided - w), decided) for w in wins]
    return sum(exact) / studies, sum(abs(one) > 1.96 for one in z) / studies


def test_power_is_as_promised():
    """Oracle: 2,000 studies of the promised size; without a difference 5% at most are wrong.

    The paper's z finds one in 16.6%: P(|Z| > 1.96 / sqrt 2).
    """
    decided = statistics.items_for_share(0.6)
    exact, _ = rejections(0.6, decided, 2000)
    assert exact == pytest.approx(0.95, abs=0.02)
    exact, z = rejections(0.5, decided, 2000, seed=1)
    assert exact <= 0.06 and z == pytest.approx(0.166, abs=0.03)


@pytest.mark.slow
def test_power_of_whole_studies():
    """Oracle: power of the sign test on items that three independent judges decide by majority."""
    share = 0.6
    by_majority = share**3 + 3 * share**2 * (1 - share)
    items = statistics.items_for_share(by_majority, power=0.8)
    found = []
    for seed in range(300):
        made = task("responses", items=items)
        vote = voter(made, (1 - share, 0, share), seed)
        answers = [vote(f"i{n}", judge) for n in range(items) for judge in ("ann", "bob", "cy")]
        one = report.build(made, Answers(tuple(answers)), details=False)["people"]["questions"]
        found += [one[q]["tests"]["sign_test_items"] < 0.05 for q in ("natural", "overall")]
    assert sum(found) / len(found) == pytest.approx(0.8, abs=0.05)


def test_plots_are_drawn(tmp_path):
    """Oracle: the signature of a PNG; with ties and without, light and dark."""
    from data_pipeline.annotation import plots

    for page, shares in (("prosocial", (1, 1, 2)), ("responses", (1, 0, 2))):
        made = task(page, items=3)
        vote = voter(made, shares)
        drawn = plots.draw(built(made, [vote(f"i{n}", "ann") for n in range(3)]), tmp_path)
        assert [p.name for p in drawn] == ["people.png", "people_dark.png"]
        assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)
