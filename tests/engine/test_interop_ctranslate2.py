"""Fresh random models computed by us and by CTranslate2. Needs the extra `ct2`."""

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import lazy
from cosmo.engine.checkpoints.description import flat
from cosmo.engine.checkpoints.interop import ctranslate2_folder
from cosmo.engine.model import blenderbot, generate, models
from cosmo.engine.model.decoding import DecodingConfig

NETWORKS = {
    "t5_1_1": {},
    "tied_unscaled": {"logits_via_embedding": True, "scale_decoder_outputs": False},
    "t5_1_0": {"mlp_activations": ("relu",), "logits_via_embedding": True},
    "deeper_encoder": {"num_encoder_layers": 3, "num_decoder_layers": 2},
}
LENGTHS, NEW_TOKENS = (9, 8, 6, 5, 3, 1), 12


def write(folder: epath.Path, model, params, dtype: str) -> str:
    arrays = {path: lazy.from_array(np.asarray(a)) for path, a in flat(params).items()}
    folder.mkdir()
    ctranslate2_folder.write_folder(folder, arrays, model.network, dtype)
    return str(folder)


@pytest.mark.parametrize("name", NETWORKS)
def test_ctranslate2_answers_as_we_do(name, tmp_path, tiny_config, make_params):
    """Greedy answers in float32. Oracle: our own decoding, token by token, of every network."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    config = tiny_config(**{"num_decoder_layers": 2, **NETWORKS[name]})
    model = models.EncoderDecoderModel(config)
    params = make_params(model, seed=list(NETWORKS).index(name))
    tokens = np.random.default_rng(1).integers(2, 40, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    for row, length in enumerate(LENGTHS):
        tokens[row, length:] = 0
    decoding = DecodingConfig(max_new_tokens=NEW_TOKENS)
    ours = np.asarray(generate.predict(model, params, jnp.asarray(tokens), decoding).tokens)[:, 0]
    folder = write(epath.Path(tmp_path / "float32"), model, params, "float32")
    translator = ctranslate2.Translator(folder, compute_type="float32")
    texts = ctranslate2_folder.token_names(config.vocab_size, None)
    found = translator.translate_batch(
        [[texts[id] for id in row if id] for row in tokens],
        beam_size=1,
        max_decoding_length=NEW_TOKENS,
        return_end_token=True,
    )
    theirs = [[texts.index(token) for token in result.hypotheses[0]] for result in found]
    ends = [row.index(1) + 1 if 1 in row else NEW_TOKENS for row in ours.tolist()]
    assert theirs == [row[:end] for row, end in zip(ours.tolist(), ends, strict=True)]


def test_ctranslate2_int8_is_less_than_half_the_size(tmp_path, tiny_config, make_params):
    """Oracle: a byte for each number of a matrix, not four; norms and names stay as they are."""
    pytest.importorskip("ctranslate2")
    model = models.EncoderDecoderModel(tiny_config())
    params, sizes = make_params(model, seed=0), {}
    for dtype in ctranslate2_folder.DTYPES:
        folder = write(epath.Path(tmp_path / dtype), model, params, dtype)
        sizes[dtype] = (epath.Path(folder) / "model.bin").stat().length
    assert sizes["int8"] < sizes["float32"] / 2


def test_ctranslate2_refuses_other_networks(tiny_config):
    """Oracle: CTranslate2's T5 has one activation and a linear gate."""
    with pytest.raises(UserError, match="no T5"):
        ctranslate2_folder.check_network(
            blenderbot.BlenderbotConfig.__new__(blenderbot.BlenderbotConfig)
        )
    two = tiny_config(mlp_activations=("gelu", "relu"))
    with pytest.raises(UserError, match="mlp_activations"):
        ctranslate2_folder.check_network(two)
    with pytest.raises(UserError, match="in every layer"):
        ctranslate2_folder.check_network(tiny_config(relative_attention_per_layer=True))
