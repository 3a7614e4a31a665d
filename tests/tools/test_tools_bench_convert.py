"""Conversions of a checkpoint that is larger than the memory they may take."""

import pytest

from tools import bench_convert


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(capsys):
    """T5 1.1 large, 3.1 GB. Oracle: 1.5 times the largest tensor plus 1 GiB, 1.2 GiB in all."""
    assert bench_convert.main(["--size=large"]) == 0
    assert capsys.readouterr().out.count("peak") == 4
