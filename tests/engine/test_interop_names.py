"""What every conversion stands on: names, arrays in pieces, and networks told apart."""

import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import lazy, run_checkpoints, streaming
from cosmo.engine.checkpoints.description import check_network, describe, flat
from cosmo.engine.checkpoints.interop import names, t5x
from cosmo.engine.model import models, t5


def test_names_cover_every_parameter(tiny_config):
    """Property: each parameter of each kind of network has one name of T5X's, none twice."""
    for changes in (
        {},
        {"mlp_activations": ("relu",), "logits_via_embedding": True},
        {"relative_attention_per_layer": True},
    ):
        config = tiny_config(**changes)
        parameters = names.parameters(config)
        leaves = flat(models.abstract_params(models.EncoderDecoderModel(config)))
        assert [p.path for p in parameters] == list(leaves)
        stored = [name for p in parameters for name in t5x.stored(p, None)]
        assert len(set(stored)) == len(stored)


def test_orbax_round_trip_in_pieces(tmp_path, monkeypatch):
    """Arrays larger than a piece. Oracle: the values that were written, and TrainState's reader."""
    monkeypatch.setattr(lazy, "PIECE_BYTES", 1000)
    rng = np.random.default_rng(0)
    values = {"a": rng.random((7, 5, 30), np.float32), "b": rng.random((1000,), np.float32)}
    values |= {"c": np.float32(3), "d": rng.random((3, 2), np.float32)}
    tree = {"params": {k: lazy.from_array(np.asarray(v)) for k, v in values.items()}}
    sizes = []
    streaming.write_checkpoint(str(tmp_path), 4, tree, {"network": "T5Config"}, sizes.append)
    assert max(sizes) <= 1000
    assert sum(sizes) == sum(np.asarray(v).nbytes for v in values.values())
    arrays, description = streaming.read_checkpoint(str(tmp_path), 4)
    assert description == {"network": "T5Config"}
    for name, value in values.items():
        np.testing.assert_array_equal(arrays["params", name].whole(), value)
        part = tuple(slice(n // 3, n) for n in np.shape(value))
        np.testing.assert_array_equal(arrays["params", name].read(part), np.asarray(value)[part])
    assert run_checkpoints.completed_steps(str(tmp_path)) == [4]
    with pytest.raises(UserError, match=r"already \(step 4\)"):
        streaming.write_checkpoint(str(tmp_path), 4, tree, {}, sizes.append)


def test_config_knows_the_scale_of_logits():
    """Oracle: T5 1.0 scales tied logits (Raffel et al.), T5 1.1 has untied ones and does not."""
    assert t5.T5Config(vocab_size=8, emb_dim=16, logits_via_embedding=True).logits_scale == 0.25
    assert t5.T5Config(vocab_size=8, emb_dim=16).logits_scale == 1.0
    tied = t5.T5Config(
        vocab_size=8, emb_dim=16, logits_via_embedding=True, scale_decoder_outputs=False
    )
    assert tied.logits_scale == 1.0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, None),
        ({"num_heads": 4, "head_dim": 4}, "num_heads"),
        ({"mlp_activations": ("silu", "linear")}, "mlp_activations"),
        ({"scale_decoder_outputs": True}, "scale_decoder_outputs"),
        ({"scale_decoder_outputs": False, "dropout_rate": 0.5, "scan_layers": False}, None),
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance"),
    ],
)
def test_networks_of_equal_shape_are_told_apart(tiny_config, changes, field):
    """What the shapes do not show. Oracle: the field that was changed; None: nothing computes
    differently."""
    saved = describe(models.EncoderDecoderModel(tiny_config()), None)
    wanted = describe(models.EncoderDecoderModel(tiny_config(**changes)), None)
    if field is None:
        check_network("here", saved, wanted)
        return
    with pytest.raises(UserError, match=field):
        check_network("here", saved, wanted)
