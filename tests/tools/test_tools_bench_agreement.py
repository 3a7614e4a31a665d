"""The comparison of two engines' answers."""

import pytest

from cosmo.engine.base.errors import UserError
from tools import bench_agreement


def test_shares():
    """Oracle: counted by hand: 1 of 2 answers, 5 of 8 tokens before a difference, 6 of 8 in all."""
    found = bench_agreement.shares([[1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3], [4, 5, 9, 7, 8]])
    assert found == {
        "answers": 1 / 2,
        "tokens before the first difference": 5 / 8,
        "tokens": 6 / 8,
    }


def test_beginnings(tmp_path):
    """Oracle: by hand; a dialogue of one turn is its own beginning."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"turns": ["a", "b", "c"]}\n{"dialogue": ["d"]}\n')
    assert list(bench_agreement.beginnings(str(file))) == [["a"], ["a", "b"], ["d"]]
    file.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="no turns and no dialogue"):
        list(bench_agreement.beginnings(str(file)))
