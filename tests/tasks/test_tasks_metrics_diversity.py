"""Oracles: lexical-diversity 0.1.1's recorded numbers, and hand calculations."""

import json
from pathlib import Path

import pytest

from cosmo.tasks.metrics import diversity

_SMALL = Path(__file__).resolve().parents[1] / "golden/statistics_small.json"


def test_mtld_equals_lexical_diversity():
    """Oracle: 8 token lists and their MTLD by lexical-diversity 0.1.1, to 1e-12."""
    for case in json.loads(_SMALL.read_text())["mtld"]:
        got = diversity.mtld(case["tokens"])
        assert got == pytest.approx(case["mtld_lexical_diversity"], rel=1e-12)


def test_mtld_equals_lexical_diversity_on_all_20_lists(shared):
    """Oracle: the same, all that were recorded."""
    cases = json.loads((shared / "golden/metrics.json").read_text())["mtld"]
    assert len(cases) == 20
    for case in cases:
        got = diversity.mtld(case["tokens"])
        assert got == pytest.approx(case["mtld_lexical_diversity"], rel=1e-12)


def test_mtld_by_hand():
    """Oracle: `a b` seven times. Forwards and backwards a cut comes after 10 tokens (2 of 10 are
    different; before, pieces are too short), and the last four have ratio 1/2 of the way from 1:
    (1 - 0.5) / 0.28 factors. 14 / (1 + 0.5 / 0.28) each way.
    """
    assert diversity.mtld(["a", "b"] * 7) == pytest.approx(14 / (1 + 0.5 / 0.28))


def test_a_text_without_repetition_has_none():
    """Oracle: no factor, no number."""
    assert diversity.mtld(["a", "b", "c"]) is None
    assert diversity.mtld([]) is None


def test_words():
    """Oracle: the form of the recorded lists."""
    assert diversity.words("I don't KNOW, 3 o'clock!") == [
        "i",
        "don",
        "t",
        "know",
        "3",
        "o",
        "clock",
    ]
