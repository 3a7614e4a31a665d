"""BlenderBot's network against recorded numbers of transformers 5.23 and ParlAI 1.7.2."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import decoding, generate, losses, models
from cosmo.engine.model.blenderbot import BlenderbotConfig
from cosmo.engine.model.decoding import DecodingConfig

SIZES = {"emb_dim": 64, "num_heads": 4, "num_encoder_layers": 2, "num_decoder_layers": 3}
SIZES |= {"mlp_dim": 128, "max_positions": 64, "dtype": "float32"}
# Of a layer: ours, ParlAI's and HuggingFace's. "+" stands for weight and bias.
LAYER = {
    "encoder": [
        ("attention", "attention.{}_lin", "self_attn.{}_proj"),
        ("pre_attention_layer_norm", "norm1", "self_attn_layer_norm"),
        ("pre_mlp_layer_norm", "norm2", "final_layer_norm"),
    ],
    "decoder": [
        ("self_attention", "self_attention.{}_lin", "self_attn.{}_proj"),
        ("encoder_decoder_attention", "encoder_attention.{}_lin", "encoder_attn.{}_proj"),
        ("pre_self_attention_layer_norm", "norm1", "self_attn_layer_norm"),
        ("pre_cross_attention_layer_norm", "norm2", "encoder_attn_layer_norm"),
        ("pre_mlp_layer_norm", "norm3", "final_layer_norm"),
    ],
}
LETTERS = {"query": "q", "key": "k", "value": "v", "out": "out"}

# Jitted: operation by operation JAX compiles a program for each shape of each operation.
logits_of = jax.jit(models.logits, static_argnums=0)
score = jax.jit(models.score, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, inputs):
    return models.bind(model, params).encode(inputs)


def params_of(tensors, *, parlai):
    """Return our parameters from a state dict of ParlAI or HuggingFace, by the table above."""
    which = 1 if parlai else 2
    ffn = ("ffn.lin1", "ffn.lin2") if parlai else ("fc1", "fc2")

    def stacked(side, count, name):
        return np.stack([tensors[f"{side}.layers.{i}.{name}"] for i in range(count)])

    out = {"token_embedder": tensors["embeddings.weight" if parlai else "shared.weight"]}
    for side, count in (("encoder", 2), ("decoder", 3)):
        layers = {}
        for row in LAYER[side]:
            ours, theirs = row[0], row[which]
            if "{}" not in theirs:
                layers[ours] = {
                    "scale": stacked(side, count, f"{theirs}.weight"),
                    "bias": stacked(side, count, f"{theirs}.bias"),
                }
                continue
            layers[ours] = {}
            for name, letter in LETTERS.items():
                kernel = stacked(side, count, f"{theirs.format(letter)}.weight")
                layers[ours][name] = kernel.swapaxes(1, 2)
                layers[ours][f"{name}_bias"] = stacked(side, count, f"{theirs.format(letter)}.bias")
        layers["mlp"] = {}
        for ours, theirs in zip(("wi", "wo"), ffn, strict=True):
            layers["mlp"][ours] = stacked(side, count, f"{theirs}.weight").swapaxes(1, 2)
            layers["mlp"][f"{ours}_bias"] = stacked(side, count, f"{theirs}.bias")
        positions, norm = "embed_positions", "layer_norm"
        if parlai:
            positions, norm = "position_embeddings", "norm_embeddings"
        out[side] = {
            "layers": layers,
            "position_embeddings": tensors[f"{side}.{positions}.weight"],
            f"{side}_norm": {
                "scale": tensors[f"{side}.{norm}.weight"],
                "bias": tensors[f"{side}.{norm}.bias"],
            },
        }
    return jax.tree.map(jnp.asarray, out)


@pytest.fixture(scope="module")
def huggingface(golden):
    """Return (model, parameters, recorded arrays) of HuggingFace's tiny BlenderBot."""
    folder = golden / "hf" / "blenderbot"
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): array for name, array in tensors.items()}
    network = BlenderbotConfig(vocab_size=384, forbidden_ids=(), logits_bias=True, **SIZES)
    params = params_of(tensors, parlai=False)
    params["decoder"]["logits_bias"] = jnp.asarray(tensors["final_logits_bias"][0])
    return models.EncoderDecoderModel(network), params, dict(np.load(folder / "golden.npz"))


@pytest.fixture(scope="module")
def parlai(golden):
    """Return (model, parameters, the folder) of ParlAI's tiny BlenderBot."""
    tensors = dict(np.load(golden / "parlai" / "params.npz"))
    model = models.EncoderDecoderModel(BlenderbotConfig(vocab_size=504, **SIZES), z_loss=0.0)
    return model, params_of(tensors, parlai=True), golden / "parlai"


def test_engine_blenderbot_parameters_have_the_names_of_the_network(huggingface):
    """Oracle: the shapes of HuggingFace's file under our names."""
    model, params, _ = huggingface
    wanted = jax.tree.map(lambda leaf: leaf.shape, models.abstract_params(model))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == wanted


def test_engine_blenderbot_logits_equal_huggingface(huggingface):
    """Oracle: logits that transformers computed, to 1e-4."""
    model, params, found = huggingface
    batch = {
        "encoder_input_tokens": found["input_ids"] * found["attention_mask"],
        "decoder_input_tokens": found["decoder_input_ids"],
        "decoder_target_tokens": np.ones_like(found["decoder_input_ids"]),
    }
    logits = logits_of(model, params, batch)
    np.testing.assert_allclose(logits, found["logits"], atol=1e-4)


def teacher_forced(case):
    """Return the batch of one of ParlAI's recorded dialogues."""
    labels = np.array([case["label_vec"]])
    return {
        "encoder_input_tokens": np.array([case["text_vec"]]),
        "decoder_input_tokens": np.pad(labels, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": labels,
    }


@pytest.mark.parametrize("number", range(3))
def test_engine_blenderbot_equals_parlai(parlai, number):
    """Encoder, logits and token losses. Oracle: what ParlAI computed, to 1e-4."""
    model, params, folder = parlai
    case = json.loads((folder / "teacher_forced.json").read_text())[number]
    found = np.load(folder / f"logits_{number}.npz")
    inputs, targets = len(case["text_vec"]), len(found["logits"])
    # Padded, so that all cases are one program.
    batch = {name: padded(array, 64) for name, array in teacher_forced(case).items()}
    encoded = encode(model, params, batch["encoder_input_tokens"])
    np.testing.assert_allclose(encoded[0, :inputs], found["encoder"], atol=1e-4)
    logits = logits_of(model, params, batch)[:, :targets]
    real = found["logits"] > -1e19
    np.testing.assert_allclose(logits[0][real], found["logits"][real], atol=1e-4)
    assert np.all(logits[0][~real] < -1e19)
    per_token, _ = losses.cross_entropy(logits, batch["decoder_target_tokens"][:, :targets])
    np.testing.assert_allclose(per_token[0], case["token_losses"], atol=1e-4)


def test_engine_blenderbot_packed_rows_equal_rows_of_their_own(parlai):
    """Positions start anew in every segment. Oracle: the same examples, one to a row."""
    model, params, _ = parlai
    rng = np.random.default_rng(0)
    lengths = [(9, 5), (7, 8)]
    parts = [[rng.integers(4, 500, n) for n in pair] for pair in lengths]
    packed = {
        "encoder_input_tokens": np.concatenate([p[0] for p in parts])[None],
        "decoder_target_tokens": np.concatenate([p[1] for p in parts])[None],
        "encoder_segment_ids": np.repeat([1, 2], [9, 7])[None],
        "decoder_segment_ids": np.repeat([1, 2], [5, 8])[None],
    }
    # As SeqIO shifts: a zero begins each segment.
    shifted = np.concatenate([np.pad(p[1], (1, 0))[:-1] for p in parts])[None]
    together = logits_of(model, params, {**packed, "decoder_input_tokens": shifted})[0]
    begin = 0
    for inputs, targets in parts:
        alone = {
            "encoder_input_tokens": padded(inputs[None], 9),
            "decoder_target_tokens": padded(targets[None], 8),
            "decoder_input_tokens": padded(np.pad(targets, (1, 0))[None, :-1], 8),
        }
        wanted = logits_of(model, params, alone)[0, : len(targets)]
        np.testing.assert_allclose(together[begin : begin + len(targets)], wanted, atol=1e-4)
        begin += len(targets)


def test_engine_blenderbot_cached_steps_equal_teacher_forcing(parlai):
    """Oracle: the log-likelihood of the generated tokens by `models.score`."""
    model, params, _ = parlai
    inputs = np.random.default_rng(1).integers(4, 500, (2, 12))
    config = DecodingConfig(max_new_tokens=10, temperature=1.0)
    keys = jax.random.split(jax.random.key(3), 2)
    found = jax.jit(generate.predict, static_argnums=(0, 3))(model, params, inputs, config, keys)
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": found.tokens[:, 0],
        "decoder_input_tokens": jnp.pad(found.tokens[:, 0], ((0, 0), (1, 0)))[:, :-1],
    }
    wanted = score(model, params, batch)["score"]
    np.testing.assert_allclose(found.scores[:, 0], wanted, atol=1e-4)


def test_engine_blenderbot_choices_and_what_follows_equal_scores(parlai):
    """Nodes of a tree and what follows have absolute positions. Oracle: `models.score`."""
    model, params, _ = parlai
    inputs = np.random.default_rng(2).integers(4, 500, (3, 9))
    choices = ((7, 8, 9), (7, 11), (30, 31, 32, 33, 34))
    choose = jax.jit(generate.choose_and_continue, static_argnums=(0, 3, 4))
    found = choose(model, params, inputs, choices, DecodingConfig(max_new_tokens=6))
    for place, choice in enumerate(choices):
        targets = padded(np.tile(choice, (3, 1)), 11)  # of one length: one program
        wanted = score(model, params, as_batch(inputs, targets))["score"]
        np.testing.assert_allclose(found.scores[:, place], wanted, atol=1e-4)
    chosen = [choices[int(choice)] for choice in found.choice]
    after = [tokens[0].tolist() for tokens in found.continuation.tokens]
    whole = padded(rows([[*a, *b] for a, b in zip(chosen, after, strict=True)]), 11)
    wholes = score(model, params, as_batch(inputs, whole))["score"]
    for row in range(3):
        wanted = wholes[row] - found.scores[row, int(found.choice[row])]
        np.testing.assert_allclose(found.continuation.scores[row, 0], wanted, atol=1e-4)


@pytest.fixture(scope="module")
def predict(jit):
    """`predict(model, params, inputs, config, context=None)` -> Decoded in numpy."""
    run = jit(generate.predict, static_argnums=(0, 3))

    def call(model, params, inputs, config, context=None):
        return jax.device_get(run(model, params, inputs, config, None, None, context))

    return call


@pytest.mark.parametrize("name", ["greedy", "beam4"])
def test_engine_blenderbot_answers_equal_huggingface(huggingface, predict, name):
    """Oracle: the tokens of transformers' `generate`, with its config's 3-grams and forced EOS."""
    model, params, found = huggingface
    search = {"beam_size": 4, "search": "huggingface", "early_stopping": True}
    config = DecodingConfig(
        16,
        length_penalty=0.6,
        context_block_ngram=3,
        forced_eos=True,
        **(search if name == "beam4" else {}),
    )
    ours = predict(model, params, found["input_ids"] * found["attention_mask"], config)
    np.testing.assert_array_equal(ours.tokens[:, 0], found[name][:, 1:])


def padded(array, length):
    """Return rows of `length`, with zeros at the end."""
    return np.pad(array, ((0, 0), (0, length - array.shape[1])))


def rows(sequences):
    """Return token lists as an array, padded with 0."""
    out = np.zeros((len(sequences), max(map(len, sequences))), np.int32)
    for row, tokens in zip(out, sequences, strict=True):
        row[: len(tokens)] = tokens
    return out


@pytest.mark.parametrize("name", ["greedy", "beam10", "blenderbot", "blenderbot_full"])
def test_engine_blenderbot_answers_equal_parlai(parlai, predict, name):
    """Tokens and scores of all that ended, in ParlAI's order. Oracle: what ParlAI generated."""
    model, params, folder = parlai
    cases = json.loads((folder / "teacher_forced.json").read_text())
    recorded = json.loads((folder / "generated.json").read_text())
    setting, alpha = recorded["settings"][name], recorded["length_penalty"]
    config = DecodingConfig(
        recorded["max_new_tokens"],
        beam_size=setting["beam_size"],
        search="parlai",
        length_penalty=alpha,
        # ParlAI's greedy search ignores it.
        min_length=setting["beam_min_length"] if name != "greedy" else 0,
        block_ngram=max(0, setting["beam_block_ngram"]),
        context_block_ngram=max(0, setting["beam_context_block_ngram"]),
    )
    context = None
    if setting.get("beam_block_full_context"):
        context = rows([case["full_text_vec"] for case in cases])
    ours = predict(model, params, rows([case["text_vec"] for case in cases]), config, context)
    for tokens_PT, scores_P, wanted in zip(
        ours.tokens, ours.scores, recorded["generated"][name], strict=True
    ):
        tokens = [[1, *row[row > 0].tolist()] for row in tokens_PT]
        count = len(wanted["finished"])
        assert tokens[:count] == [found[0] for found in wanted["finished"]]
        assert np.all(scores_P[count:] <= decoding.IMPOSSIBLE)
        scores = scores_P[:count]
        if name == "greedy":  # our scores of greedy answers have no penalty
            scores = scores / ((1 + len(tokens[0])) / 6) ** alpha
        np.testing.assert_allclose(scores, [found[1] for found in wanted["finished"]], atol=1e-4)


def test_engine_blenderbot_prefix_is_read_as_the_answer_s_beginning(parlai, jit):
    """Rows with prefixes of different lengths. Oracle: `models.score` of prefix and answer."""
    model, params, _ = parlai
    inputs = np.random.default_rng(4).integers(4, 500, (3, 12)).astype(np.int32)
    prefixes = [[7, 8, 9, 10], [], [30, 31]]
    config = DecodingConfig(max_new_tokens=9, beam_size=3, search="parlai", length_penalty=0.0)
    run = jit(generate.predict, static_argnums=(0, 3))
    ours = run(model, params, inputs, config, None, rows(prefixes))
    assert ours.tokens.shape == (3, 6, 9)
    answers = [[int(token) for token in row if token] for row in np.asarray(ours.tokens[:, 0])]
    whole = rows([[*p, *a, *[0] * 13][:13] for p, a in zip(prefixes, answers, strict=True)])
    before = whole * (np.arange(13) < [[4], [0], [2]])
    wanted = [score(model, params, as_batch(inputs, tokens))["score"] for tokens in (whole, before)]
    np.testing.assert_allclose(ours.scores[:, 0], wanted[0] - wanted[1], atol=1e-4)


def as_batch(inputs, targets):
    """Return the batch of rows without packing."""
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    return dict(zip(names, (inputs, shifted, targets), strict=True))


def test_engine_blenderbot_refuses_more_tokens_than_positions(parlai):
    """Oracle: the network has 64 positions."""
    model, params, _ = parlai
    with pytest.raises(UserError, match="65 tokens of inputs; this network has 64 positions"):
        generate.predict(model, params, np.full((1, 65), 5), DecodingConfig(max_new_tokens=4))
    with pytest.raises(UserError, match="70 tokens of answers"):
        generate.predict(model, params, np.full((1, 5), 5), DecodingConfig(max_new_tokens=70))


def test_engine_blenderbot_sizes_are_the_published_counts():
    """Oracle: the numbers of parameters of the published sizes, both position tables in."""
    sizes = {
        2_696_268_800: {},
        1_437_393_920: {"num_decoder_layers": 12},
        364_802_560: {"emb_dim": 1280, "mlp_dim": 5120, "num_decoder_layers": 12},
    }
    for count, fields in sizes.items():
        model = models.EncoderDecoderModel(BlenderbotConfig(**fields))
        assert models.parameter_count(model) == count


def test_engine_blenderbot_positions_are_parlais_sinusoid(parlai):
    """Oracle: the table in ParlAI's checkpoint, to one rounding."""
    model, params, _ = parlai
    fresh = models.init(model, jax.random.key(0))
    for side in ("encoder", "decoder"):
        stored = params[side]["position_embeddings"]
        np.testing.assert_allclose(fresh[side]["position_embeddings"], stored, atol=1e-6)


def test_engine_blenderbot_refuses_settings_that_would_ruin_its_loss():
    """Oracle: a smoothed loss sums the logits, of which a forbidden one is -1e20."""
    with pytest.raises(UserError, match="with forbidden_ids"):
        models.EncoderDecoderModel(BlenderbotConfig(**SIZES), label_smoothing=0.1)
    with pytest.raises(UserError, match="not 2, which ends texts"):
        BlenderbotConfig(forbidden_ids=(2,), **SIZES)
