"""Answers of a tiny network: in order, and whatever else is in the batch or the shard."""

import json

import numpy as np
import pytest

from cosmo.engine.infer import answer_files, bulk, infer, record_sources
from cosmo.engine.model import models, partitioning
from cosmo.engine.model.decoding import DecodingConfig
from tests.engine import job_settings
from tests.engine.job_settings import Words, records

config = pytest.fixture(job_settings.config)


@pytest.fixture(scope="module")
def network(tiny_config, make_params):
    """(model, params) of one layer each side, small enough to compile for many batch sizes."""
    model = models.EncoderDecoderModel(tiny_config(num_encoder_layers=1, num_decoder_layers=1))
    return model, make_params(model)


def session(network, batch_size, **changes):
    model, params = network
    layout = partitioning.Layout(partitioning.Partitioner().mesh())
    lengths = {"inputs": 48, "targets": 16}
    return infer.Session(
        model, params, Words(), layout, batch_size, lengths, **{"bucketed": True, **changes}
    )


WAYS = {
    "greedy": dict(decoding=DecodingConfig(5)),
    "samples": dict(decoding=DecodingConfig(5, temperature=1.0, top_p=0.9, num_samples=2)),
    "beam": dict(decoding=DecodingConfig(5, beam_size=3)),
    "score": dict(mode="score"),
}


@pytest.mark.parametrize("way", WAYS)
def test_answers_depend_on_neither_batch_size_nor_shards(config, network, tmp_path, way):
    """Property: same seed and record, same answer; float32, so only the last digits of a score may
    vary with the shape of the batch."""
    found = {}
    for batch_size, num_shards in [(1, 1), (3, 1), (8, 1), (3, 2), (8, 5)]:
        folder = tmp_path / f"{batch_size}-{num_shards}"
        layout = answer_files.output_files(str(folder), num_shards)
        bulk.answer_source(
            config(batch_size, **WAYS[way]),
            records(13, bad=(4,)),
            layout,
            bulk.Sharding(num_shards, part_size=7),
            lambda batch_size=batch_size: (session(network, batch_size), 7),
        )
        files = sorted(folder.glob("predictions*"))
        text = "".join(p.read_text() for p in files)
        found[batch_size, num_shards] = [json.loads(line) for line in text.splitlines()]
    expected = found.pop((1, 1))
    assert len(expected) == 12
    for rows in found.values():
        for row, other in zip(rows, expected, strict=True):
            assert {**row, "score": 0, "scores": 0} == {**other, "score": 0, "scores": 0}
            for name in {"score", "scores"} & set(row):
                np.testing.assert_allclose(row[name], other[name], rtol=2e-5)


def test_answers_come_back_in_order_and_do_not_depend_on_neighbours(network):
    """Oracle: each row answered alone; and padded to the full length, not to its bucket."""
    decoding = DecodingConfig(5)
    (rows,) = records(20).read([record_sources.Span(0, 0, 20)])

    def generate(rows, **changes):
        opened = session(network, 3, **changes)
        return infer.answer(opened, rows, infer.generation(opened, decoding))

    together = generate(rows)
    assert [answer.row for answer in together] == rows
    assert len({answer.predictions for answer in together}) > 5
    for answer, row in zip(together, rows, strict=True):
        (alone,) = generate([row])
        assert alone.predictions == answer.predictions
        assert alone.scores == pytest.approx(answer.scores, rel=2e-5)
    full = generate(rows, bucketed=False)
    assert [a.predictions for a in full] == [a.predictions for a in together]
