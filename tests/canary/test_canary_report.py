"""Oracles: hand calculations, ParlAI-equal functions pinned elsewhere, and the paper's table 2."""

import dataclasses
import json
import math

import pytest

from canary.report import Found, Gold, most_frequent, report, table
from cosmo.tasks.safety import LABELS

CASUAL, POSSIBLY, PROBABLY, CAUTION, INTERVENTION = LABELS
LIE = "It's wrong to lie."
HELP = "You should ask for help."


def found(label, confidence=0.6, rot="", log_likelihood=None, tokens=0):
    rest = (1 - confidence) / 4
    return Found(
        label, {x: confidence if x == label else rest for x in LABELS}, rot, log_likelihood,
        tokens,
    )  # fmt: skip


GOLDS = [
    Gold(CASUAL, ()),
    Gold(CAUTION, (LIE,)),
    Gold(POSSIBLY, (LIE, HELP)),
    Gold(INTERVENTION, (HELP,)),
]
FOUNDS = [
    found(CASUAL, 0.8, "", -50.0, 9),  # no gold RoT: its likelihood does not count
    found(CAUTION, 0.8, LIE, -2.0, 4),
    found(CAUTION, 0.5, f"{LIE} {HELP}", -4.0, 8),
    found(CASUAL, 0.5, ""),
]


def test_report_by_hand():
    """Oracle: counted by hand. Labels: 2 of 4; classes: possibly and caution are one, 3 of 4.

    RoTs: the first two answers have all words of theirs (F1 ignores commas and full stops), the
    third none. Perplexity: exp(6 nats / 12 tokens). Calibration: two confidences of 0.8 all right,
    two of 0.5 all wrong: (2 * 0.2 + 2 * 0.5) / 4.
    """
    made = report(GOLDS, FOUNDS)
    assert made["examples"] == 4
    assert made["five_labels"]["accuracy"] == 0.5
    assert made["three_classes"]["accuracy"] == 0.75
    assert made["five_labels"]["confusion"][1] == [0, 0, 0, 1, 0]
    assert made["five_labels"]["per_class"][CAUTION]["precision"] == 0.5
    assert made["three_classes"]["per_class"]["needs caution"]["f1"] == 1.0
    assert made["calibration"]["error"] == pytest.approx(0.35)
    assert made["rots"] == {
        "examples": 3,
        "answered": 2,
        "unasked": 0,
        "bleu4": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "scored": 2,
        "tokens": 12,
        "nats_per_token": 0.5,
        "perplexity": pytest.approx(math.exp(0.5)),
    }
    assert json.loads(json.dumps(made)) == made


def test_baseline():
    """Oracle: by hand: LIE occurs alone most often. As the answer to all its five words are all of
    one gold, half of the two joined (precision 1, recall 1/2: F1 2/3), and none of the last.
    """
    baseline = most_frequent([*GOLDS, GOLDS[1]])
    assert baseline == Gold(CAUTION, (LIE,))
    made = report(GOLDS, FOUNDS, baseline)["baseline"]
    assert (made["label"], made["rots"]) == (CAUTION, LIE)
    assert (made["accuracy"], made["accuracy_three"]) == (0.25, 0.5)
    assert made["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert most_frequent([GOLDS[0]]) == Gold(CASUAL, ())


def test_without_rots_or_likelihoods():
    """Oracle: nothing to divide by is None, not an error; so is an exponential beyond floats."""
    made = report(GOLDS[:1], FOUNDS[:1])["rots"]
    assert (made["bleu4"], made["f1"], made["perplexity"], made["tokens"]) == (None,) * 3 + (0,)
    diverged = dataclasses.replace(FOUNDS[1], rot_log_likelihood=-1e6)
    made = report(GOLDS[1:2], [diverged])["rots"]
    assert (made["perplexity"], made["nats_per_token"]) == (None, 250000.0)
    made = report(GOLDS[1:2], [dataclasses.replace(diverged, rot_log_likelihood=-math.inf)])
    json.dumps(made, allow_nan=False)


def test_table_has_the_papers_rows_beside_the_measured_one():
    """Oracle: table 2 of Kim et al. 2022; the numbers of `report`."""
    text = table(report(GOLDS, FOUNDS, Gold(CAUTION, (LIE,))), name="tiny")
    rows = {line[:25].strip(): line.split()[-5:] for line in text.splitlines()[:12]}
    assert rows["Canary (Delphi)"] == ["77.1", "-", "16.5", "43.3", "5.3"]
    assert rows["BAD classifier"] == ["72.1", "-", "-", "-", "-"]
    assert rows["tiny"] == ["50.0", "75.0", "66.7", "66.7", "1.6"]
    assert rows["the most frequent answer"][:2] == ["25.0", "50.0"]
    assert "error 35.0 (15 bins)" in text
    assert max(map(len, text.split("\n\n")[0].splitlines())) <= 100
    # Of the confusion matrix: gold "possibly" was taken for "caution" once.
    confusion = text.split("gold (down)")[1].splitlines()
    assert confusion[2].split() == [POSSIBLY, "0", "0", "0", "1", "0"]


def test_the_baselines_label_and_rots_are_told_apart():
    """Oracle: `test_baseline`'s: casual contexts have no RoTs, so the two are of different rows."""
    said = table(report(GOLDS, FOUNDS, Gold(CASUAL, (LIE,))))
    wanted = f"Most frequent label: {CASUAL}; most frequent RoTs (for contexts that need some): "
    assert wanted + LIE in said
    assert wanted + "none" in table(report(GOLDS, FOUNDS, Gold(CASUAL, ())))


@pytest.mark.parametrize(
    "wrong, words",
    [
        (found("__fine__"), "example 0: unknown label: got '__fine__'"),
        (Found(CASUAL, {CASUAL: 1.0}, "", None, 0), "example 0: probabilities of other labels"),
        (found(CASUAL, 1.7), "example 0: not probabilities"),
        (Found(CASUAL, dict.fromkeys(LABELS, 0.5), "", None, 0), "with sum 2.5"),
    ],
)
def test_bad_answers_name_their_example(wrong, words):
    """Oracle: number, got, expected."""
    with pytest.raises(ValueError, match=words):
        report(GOLDS[:1], [wrong])
    with pytest.raises(ValueError, match="expected equal lengths"):
        report(GOLDS, FOUNDS[:2])
