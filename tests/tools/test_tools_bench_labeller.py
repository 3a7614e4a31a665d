"""The benchmark of single labels, on a tiny network."""

import argparse

from tests import tiny_models
from tools import bench_labeller, bench_sides


def test_every_kind_of_label_is_timed(tmp_path, monkeypatch):
    """Oracle: the kinds that are named, by hand, each with its calls."""
    monkeypatch.setattr(bench_labeller, "CONTEXTS", (32, 48))
    monkeypatch.setattr(bench_labeller, "CALLERS", (2,))
    monkeypatch.setattr(bench_labeller, "ROT_TOKENS", 2)
    network = tiny_models.t5_1_0(2048)
    weights = str(tmp_path / "weights")
    bench_sides.write_weights(weights, network, "tasks/sample/vocabulary.model")
    found = bench_labeller.ours(argparse.Namespace(weights=weights, dtypes="float32", calls=4))
    kinds = ("label", "label and 2 tokens of RoTs")
    # Calls are shared among callers, and of longer contexts there are half as many.
    assert {name: len(times) for name, times in found.items()} == {
        "float32, warm-up of all shapes": 1,
        **{f"float32, 32 tokens, 2 at once, {kind}": 4 for kind in kinds},
        **{f"float32, 48 tokens, 2 at once, {kind}": 2 for kind in kinds},
    }
    assert all(time > 0 for times in found.values() for time in times)
