"""Oracles: sums and repetitions that the papers' own tables must have."""

import pytest

from cosmo.tasks.paper_tables import PROSOCIAL, SODA, STATISTICS


def test_shares_add_up():
    """Oracle: a hundred percent, but for the papers' rounding."""
    for first, tie, second in (
        shares for name, shares in PROSOCIAL["head_to_head"].items() if name != "columns"
    ):
        assert [sum(v) for v in zip(first, tie, second, strict=True)] == pytest.approx(
            [100] * 5, abs=0.25
        )
    for name, shares in PROSOCIAL["steering"].items():
        if name != "columns":  # read from a drawing
            sums = [sum(three) for three in zip(*shares, strict=True)]
            assert sums == pytest.approx([100] * 5, abs=0.6)
    for *_, first, second in SODA["head_to_head"]["rows"]:
        assert [a + b for a, b in zip(first, second, strict=True)] == [100] * 4
    assert sum(share for share, _ in SODA["relations"].values()) == 101
    for column in zip(*SODA["emotions"].values(), strict=True):
        assert sum(column) == pytest.approx(100, abs=0.2)


def test_numbers_that_stand_in_two_tables():
    """Oracle: table 8's column of ProsocialDialog is table 3's: perplexity and F1."""
    for name in ("Prost (Response only)", "Prost (RoT & Response)"):
        _, f1, perplexity = PROSOCIAL["responses"][name]
        assert PROSOCIAL["corpora"][name][:2] == [perplexity, f1]
    widths = {name: len(row) for name, row in PROSOCIAL["corpora"].items()}
    assert widths.pop("columns") == 7 and set(widths.values()) == {14}
    assert {len(row) for row in STATISTICS.values()} == {5, 8}
