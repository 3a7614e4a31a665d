"""HuggingFace's BlenderBot folders in and out, against one that transformers wrote."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format, convert, lazy, streaming
from cosmo.engine.checkpoints.description import describe
from cosmo.engine.checkpoints.interop import huggingface
from cosmo.engine.model import models
from cosmo.engine.model.blenderbot import BlenderbotConfig
from tests.conftest import DEFAULT_COMPILATION

TINY = BlenderbotConfig(
    vocab_size=24,
    emb_dim=8,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=2,
    mlp_dim=12,
    max_positions=70,
    dropout_rate=0.1,
    forbidden_ids=(),
)


def random_params(config) -> dict:
    """{our path: array} of random numbers, for a network of the tables of names."""
    random = np.random.default_rng(3)
    shapes = models.abstract_params(models.EncoderDecoderModel(config))
    return jax.tree.map(lambda a: random.standard_normal(a.shape).astype(np.float32), shapes)


def write_run(folder: pathlib.Path, config) -> tuple[str, dict]:
    """Write a checkpoint of ours with random parameters; return its folder and these."""
    params = random_params(config)
    state = {"params": jax.tree.map(lazy.from_array, params)}
    description = describe(models.EncoderDecoderModel(config), None)
    streaming.write_checkpoint(str(folder), 5, state, description)
    return str(folder), params


@pytest.fixture
def ours(tmp_path):
    """`ours(config)`: (a checkpoint of ours with random parameters, these)."""

    return lambda config=TINY: write_run(tmp_path / "run", config)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> pathlib.Path:
    """An exported HuggingFace folder. Tests copy it."""
    base = tmp_path_factory.mktemp("exported")
    run, _ = write_run(base / "run", TINY)
    convert.export_checkpoint(run, str(base / "hf"), format="huggingface")
    return base / "hf"


@pytest.fixture
def folder(exported, ours, tmp_path):
    """`folder(config)`: an exported HuggingFace folder."""

    def make(config=TINY, **how) -> pathlib.Path:
        out = tmp_path / "hf"
        if config == TINY and not how:
            return shutil.copytree(exported, out)
        convert.export_checkpoint(ours(config)[0], str(out), format="huggingface", **how)
        return out

    return make


def test_logits_of_a_folder(golden):
    """Oracle: transformers' logits of the folder that it wrote, to 1e-4."""
    source = any_format.open_source(str(golden / "hf/blenderbot"), "huggingface")
    model = models.EncoderDecoderModel(dataclasses.replace(source.network, dtype="float32"))
    params = unflatten_dict({path: jnp.asarray(a.whole()) for path, a in source.params.items()})
    theirs = np.load(golden / "hf/blenderbot/golden.npz")
    batch = {
        "encoder_input_tokens": theirs["input_ids"] * theirs["attention_mask"],
        "decoder_input_tokens": theirs["decoder_input_ids"],
        "decoder_target_tokens": np.ones_like(theirs["decoder_input_ids"]),
    }
    run = jax.jit(lambda p: models.logits(model, p, batch), compiler_options=DEFAULT_COMPILATION)
    np.testing.assert_allclose(run(params), theirs["logits"], atol=1e-4)


def test_round_trip(golden, tmp_path):
    """HF -> ours -> HF. Oracle: every tensor's bits, and the config that transformers wrote."""
    theirs = golden / "hf/blenderbot"
    convert.import_checkpoint(str(theirs), str(tmp_path / "ours"))
    assert any_format.open_source(str(tmp_path / "ours")).network.logits_bias  # it has one
    convert.export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "back"), format="huggingface")
    before, after = (load_file(p / "model.safetensors") for p in (theirs, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    configs = [json.loads((p / "config.json").read_text()) for p in (theirs, tmp_path / "back")]
    # Of generation, in a file of its own here; and of no meaning to the network.
    unneeded = {"transformers_version", "dtype", "is_decoder"}
    unneeded |= {"encoder_no_repeat_ngram_size", "forced_eos_token_id"}
    assert {k: v for k, v in configs[0].items() if k not in unneeded} == {
        k: configs[1][k] for k in configs[0] if k not in unneeded
    }


def test_generation_config(folder):
    """Oracle: the published folders' settings of beam search."""
    found = json.loads((folder() / "generation_config.json").read_text())
    assert found == {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": 2,
        "num_beams": 10,
        "min_length": 20,
        "max_length": 60,
        "length_penalty": 0.65,
        "no_repeat_ngram_size": 3,
        "encoder_no_repeat_ngram_size": 3,
    }


def test_our_own_checkpoint_opens(ours):
    """Without a gin file. Oracle: the network and the numbers that were written."""
    path, params = ours()
    source = any_format.open_source(path)
    assert (source.network, source.step) == (TINY, 5)
    np.testing.assert_array_equal(
        source.params["token_embedder",].whole(), params["token_embedder"]
    )
    with pytest.raises(UserError, match="T5X has no other network: export it as hf"):
        convert.export_checkpoint(path, path + "-t5x", format="t5x")


def test_shards_and_bfloat16(folder):
    """Oracle: ml_dtypes' rounding of the numbers, from several files."""
    out = folder(dtype="bfloat16", max_shard_gb=2e-6)
    assert len(list(out.glob("*.safetensors"))) > 2
    wanted = random_params(TINY)["decoder"]["layers"]["mlp"]["wi"]
    found = any_format.open_source(str(out)).params["decoder", "layers", "mlp", "wi"].whole()
    np.testing.assert_array_equal(found, wanted.astype(ml_dtypes.bfloat16).astype(np.float32))


# Of facebook/blenderbot-3B's config, beside the sizes: read and not needed, or of one value.
OLDER = {
    "add_bias_logits": False,
    "add_final_layer_norm": True,
    "classif_dropout": 0.0,
    "do_blenderbot_90_layernorm": True,
    "encoder_no_repeat_ngram_size": 3,
    "extra_layer_norm": False,
    "extra_pos_embeddings": 0,
    "force_bos_token_to_be_generated": False,
    "forced_eos_token_id": 2,
    "layernorm_variant": "prelayernorm",
    "length_penalty": 0.65,
    "max_length": 60,
    "min_length": 20,
    "normalize_before": True,
    "normalize_embedding": False,
    "num_beams": 10,
    "num_hidden_layers": 2,
    "static_position_embeddings": False,
    "unk_token_id": 3,
}


def edited(out: pathlib.Path, **changes) -> pathlib.Path:
    config = json.loads((out / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v != "left out"}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_an_older_config(folder):
    """With what the published configs hold beside. Oracle: the network without it."""
    out = folder()
    left_out = dict.fromkeys(("tie_word_embeddings", "pad_token_id", "activation_function"))
    assert any_format.open_source(str(edited(out, **OLDER))).network == TINY
    assert (
        any_format.open_source(
            str(edited(out, **dict.fromkeys(left_out, "left out"), eos_token_id=[2]))
        ).network
        == TINY
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "blenderbot-small"}, "blenderbot_small-90M.*another network"),
        ({"layernorm_variant": "xlm"}, "layernorm_variant='xlm', expected 'prelayernorm'"),
        ({"normalize_before": False}, "normalize_before=False"),
        ({"normalize_embedding": True}, "normalize_embedding=True"),
        ({"activation_function": "gelu_new"}, "activation_function='gelu_new', expected 'gelu'"),
        ({"scale_embedding": False}, "scale_embedding=False, expected True"),
        ({"scale_embedding": "left out"}, "scale_embedding=False, expected True"),
        ({"scale_embedding": 1}, "scale_embedding=1, expected True"),
        ({"extra_pos_embeddings": 2}, "extra_pos_embeddings=2"),
        ({"eos_token_id": 1}, "eos_token_id=1, expected 2"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"decoder_attention_heads": 4}, "encoder_attention_heads=2 and decoder_attention_heads=4"),
        ({"encoder_ffn_dim": 16}, "encoder_ffn_dim=16 and decoder_ffn_dim=12"),
        ({"d_model": 9}, "even multiple"),
        ({"d_model": 16}, r"is \(.*expected"),
        ({"d_model": "left out"}, "d_model=None, expected a whole number"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"vocab_size": 25}, "final_logits_bias is .*24"),
        ({"max_position_embeddings": 71}, r"embed_positions.weight is \(70, 8\)"),
        ({"max_position_embeddings": 10**9}, r"embed_positions.weight is \(70, 8\)"),
        ({"d_model": 10**9}, r"embed_positions.weight is \(70, 8\)"),
        ({"encoder_layers": 2}, "2 encoder layers, the tensors are of 1"),
        ({"decoder_layers": 10**9}, "decoder layers, the tensors are of 2"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
)
def test_configs_of_other_networks(folder, changes, words):
    """Oracle: the field in the error."""
    out = edited(folder(), **changes)
    with pytest.raises(UserError, match=words) as error:
        any_format.open_source(str(out))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.encoder.layer_norm.bias"), "lacks model.encoder.layer_norm.bias"),
        (lambda t: t.update({"model.extra": np.zeros(2, np.float32)}), "has model.extra"),
        (
            lambda t: t.update({"lm_head.weight": t["model.shared.weight"] + 1}),
            "lm_head.weight differs from model.shared.weight",
        ),
        (
            lambda t: t.update({"model.encoder.embed_tokens.weight": np.zeros((3, 8), np.float32)}),
            "model.encoder.embed_tokens.weight differs",
        ),
        (lambda t: t.pop("model.shared.weight"), "lacks model.shared.weight"),
        (
            lambda t: t.pop("model.encoder.embed_positions.weight"),
            "lacks model.encoder.embed_positions.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit(folder, change, words):
    """Oracle: the tensor in the error."""
    out = folder()
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(UserError, match=words):
        any_format.open_source(str(out))


def test_the_embedding_under_its_other_names(folder):
    """As safetensors drops all names of a tensor but one. Oracle: the folder before."""
    out = folder()
    before = any_format.open_source(str(out)).params["token_embedder",].whole()
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.shared.weight")
    tensors["model.decoder.embed_tokens.weight"] = tensors["lm_head.weight"]
    del tensors["final_logits_bias"]  # zeros, which some files leave out
    save_file(tensors, out / "model.safetensors")
    after = any_format.open_source(str(out))
    np.testing.assert_array_equal(after.params["token_embedder",].whole(), before)
    assert not after.network.logits_bias


def test_pickles_and_the_small_one_are_refused(folder):
    """Oracle: the words. The small one is refused before its user converts it."""
    out = folder()
    (out / "model.safetensors").rename(out / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles and are not loaded"):
        any_format.open_source(str(out))
    edited(out, model_type="blenderbot-small")
    with pytest.raises(UserError, match="blenderbot_small-90M"):
        any_format.open_source(str(out))


def test_the_vocabulary_goes_along(golden, tmp_path):
    """ParlAI -> ours -> HF -> ours. Oracle: one fingerprint, the files' names."""
    pytest.importorskip("tokenizers")
    from cosmo.tasks import vocabularies

    vocabulary = vocabularies.load(golden / "parlai/model.dict")
    convert.import_checkpoint(str(golden / "parlai"), str(tmp_path / "ours"), vocabulary=vocabulary)
    path = any_format.open_source(str(tmp_path / "ours")).vocabulary_path
    convert.export_checkpoint(
        str(tmp_path / "ours"), str(tmp_path / "hf"), format="huggingface", vocabulary_path=path
    )
    names = {p.name for p in (tmp_path / "hf").iterdir()}
    assert names >= {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}
    source = any_format.open_source(str(tmp_path / "hf"))
    again = vocabularies.load(source.vocabulary_path)
    assert again.fingerprint == vocabulary.fingerprint
    text = "Hi! I'm fine.\nAnd you? 😀"
    assert again.encode(text) == vocabulary.encode(text)
    # Another vocabulary than the folder's own is an error.
    other = dataclasses.replace(vocabulary, fingerprint="other")
    with pytest.raises(UserError, match="vocabulary mismatch"):
        convert.import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "second"), vocabulary=other)


def test_transformers_loads_what_we_export(golden, tmp_path):
    """Needs the extra `hf`. Oracle: ParlAI's logits, ids of texts, and a search without start."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    convert.import_checkpoint(str(golden / "parlai"), str(tmp_path / "ours"))
    convert.export_checkpoint(
        str(tmp_path / "ours"),
        str(tmp_path / "hf"),
        format="huggingface",
        vocabulary_path=str(golden / "parlai/model.dict"),
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(str(tmp_path / "hf")).eval()
    assert len(tokenizer) == 504
    for text, ids in json.loads((golden / "parlai/tokens.json").read_text())["enc"].items():
        assert tokenizer(text)["input_ids"] == [*ids, 2]
    cases = json.loads((golden / "parlai/teacher_forced.json").read_text())
    for number, case in enumerate(cases):
        inputs = torch.tensor([case["text_vec"]])
        decoder = torch.tensor([[1, *case["label_vec"][:-1]]])
        with torch.no_grad():
            logits = model(input_ids=inputs, decoder_input_ids=decoder).logits[0].numpy()
        theirs = np.load(golden / f"parlai/logits_{number}.npz")["logits"]
        np.testing.assert_allclose(logits[:, 2:], theirs[:, 2:], atol=1e-4)
        assert 1 not in model.generate(inputs)[0, 1:]


def test_a_t5_folder_is_read_as_before(golden, tmp_path):
    """Oracle: T5's class. A BlenderBot's files in a T5's folder are an error."""
    copy = shutil.copytree(golden / "hf/t5_v1_1", tmp_path / "t5")
    assert type(any_format.open_source(str(copy)).network).__name__ == "T5Config"
    edited(pathlib.Path(copy), model_type="blenderbot")
    with pytest.raises(UserError, match="expected"):
        any_format.open_source(str(copy))
    assert huggingface.is_checkpoint(copy)
