"""Answers of a tiny network: in order, and whatever else is in the batch or the shard."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
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
    "parlai": dict(
        decoding=DecodingConfig(
            5,
            beam_size=3,
            search="parlai",
            min_length=2,
            block_ngram=2,
            context_block_ngram=2,
            banned_ids=(7, 9),
        )
    ),
    "score": dict(mode="score"),
}


# Batch size and shards. A program is compiled for each batch size and bucket of lengths.
FEW = [(1, 1), (3, 1), (3, 2)]
MANY = [*FEW, (8, 1), (8, 5)]


@pytest.mark.parametrize("sizes", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
def test_answers_depend_on_neither_batch_size_nor_shards(config, network, tmp_path, way, sizes):
    """Property: same seed and record, same answer; float32, so only the last digits of a score may
    vary with the shape of the batch."""
    found = {}
    for batch_size, num_shards in sizes:
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


def test_a_row_s_answer_begins_with_its_prefix(network):
    """Prefixes of 0 to 20 tokens in one batch. Oracle: each row alone through the whole network.

    Greedy: every token is the likeliest after the prefix and the tokens before it.
    """
    (rows,) = records(6).read([record_sources.Span(0, 0, 6)])
    rng = np.random.default_rng(1)
    lengths = (0, 3, 20, 1, 0, 16)
    rows = [
        dataclasses.replace(row, prefix_ids=tuple(rng.integers(2, 40, n).tolist()))
        for row, n in zip(rows, lengths, strict=True)
    ]
    opened = session(network, 4)
    model, params = network
    answers = infer.answer(opened, rows, infer.generation(opened, DecodingConfig(4)))
    logits_of = jax.jit(models.logits, static_argnums=0)
    for row, answer in zip(rows, answers, strict=True):
        tokens = [int(word) for word in answer.predictions[0].split()]
        whole = np.zeros((1, 25), np.int32)
        whole[0, 1 : 1 + len(row.prefix_ids) + len(tokens)] = [*row.prefix_ids, *tokens]
        inputs = np.zeros((1, 48), np.int32)
        inputs[0, : len(row.input_ids)] = row.input_ids
        batch = {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": whole,
            "decoder_target_tokens": np.ones_like(whole),
        }
        logits = np.asarray(logits_of(model, params, batch))[0, len(row.prefix_ids) :]
        logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        taken = [*tokens, 1][:4]
        np.testing.assert_array_equal(np.argmax(logp[:4], axis=-1)[: len(taken)], taken)
        wanted = sum(logp[place, token] for place, token in enumerate(taken))
        assert answer.scores[0] == pytest.approx(wanted, rel=1e-4)
        assert answer.num_tokens == len(taken)


@pytest.mark.parametrize("token", [0, 1, 40])
def test_a_prefix_with_a_wrong_token_is_refused(network, token):
    """Oracle: 40 tokens, of which 0 pads and 1 is EOS."""
    (rows,) = records(1).read([record_sources.Span(0, 0, 1)])
    row = dataclasses.replace(rows[0], prefix_ids=(5, token))
    opened = session(network, 1)
    words = f"record '0': its prefix has token {token}; a prefix has tokens 1 to 39, but not 1"
    with pytest.raises(UserError, match=words):
        infer.answer(opened, [row], infer.generation(opened, DecodingConfig(4)))


def test_a_banned_token_outside_the_vocabulary_is_refused(network):
    """Oracle: the vocabulary has 40 tokens."""
    with pytest.raises(UserError, match="banned_ids has 40; ids of this vocabulary are 0 to 39"):
        infer.generation(session(network, 1), DecodingConfig(4, banned_ids=(40,)))


def test_the_manifest_names_limits_only_where_they_are_set():
    """An output that was begun before there were limits continues. Oracle: the fields of then."""
    assert DecodingConfig(9).settings() == {
        "max_new_tokens": 9, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "num_samples": 1,
        "beam_size": 1, "length_penalty": 0.6,
    }  # fmt: skip
    found = DecodingConfig(9, banned_ids=(3,), min_length=2, search="parlai").settings()
    assert {name: found[name] for name in found.keys() - DecodingConfig(9).settings().keys()} == {
        "banned_ids": [3], "min_length": 2, "search": "parlai",
    }  # fmt: skip


def test_rows_with_other_prefixes_are_another_source():
    """Oracle: the fingerprint of rows without prefixes is as before, and each prefix its own."""
    (rows,) = records(2).read([record_sources.Span(0, 0, 2)])
    with_prefix = [[dataclasses.replace(row, prefix_ids=p) for row in rows] for p in [(5,), (6,)]]
    found = [record_sources.rows_source("x", r).identity["sha256"] for r in [rows, *with_prefix]]
    assert len(set(found)) == 3
    assert found[0] == hashlib.sha256("".join(map(repr, rows)).encode()).hexdigest()
