"""mT5, UMT5, ByT5 and Flan-T5 folders, against logits that transformers 5.23 computed for them.

tests/golden/hf_classes has a random tiny model of each kind: config.json, weights, and golden.npz
with `input_ids`, `decoder_input_ids` and `logits`.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format, convert
from cosmo.engine.checkpoints.interop import huggingface
from cosmo.engine.model import models

FOLDERS = pathlib.Path(__file__).resolve().parents[1] / "golden/hf_classes"
CASES = {  # the class, logits through the embedding, logits scaled
    "mt5": ("mt5", False, False),
    "mt5_tied": ("mt5", True, False),
    "umt5": ("umt5", False, True),
    "umt5_tied": ("umt5", True, True),
    "byt5": ("t5", False, False),
    "flan_t5": ("t5", False, False),
    "flan_t5_tied": ("t5", True, True),
}


def tree(source: any_format.Source) -> dict:
    """The parameters in memory, as our model takes them."""
    model = models.EncoderDecoderModel(source.network)
    abstract = models.abstract_params(model)
    leaves = jax.tree_util.tree_flatten_with_path(abstract)[0]
    keys = [tuple(jax.tree_util.keystr((k,), simple=True) for k in path) for path, _ in leaves]
    arrays = [source.params[key].whole() for key in keys]
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def error_of_logits(path: str, recorded: pathlib.Path, factor: float = 1.0) -> float:
    """The largest difference between our logits from `path` and the recorded ones."""
    source = any_format.open_source(path)
    network = dataclasses.replace(source.network, dtype="float32")
    model = models.EncoderDecoderModel(network)
    golden = np.load(recorded / "golden.npz")
    tokens = jnp.asarray(golden["decoder_input_ids"])

    @jax.jit
    def logits(params):
        return models.bind(model, params)(golden["input_ids"], tokens, jnp.ones_like(tokens))

    return float(np.max(np.abs(logits(tree(source)) - golden["logits"] * factor)))


def rewrite(folder: pathlib.Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.fixture
def copied(tmp_path):
    """`copied(name)`: a copy of a folder, to change."""

    def copy(name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(FOLDERS / name, tmp_path / name))

    return copy


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    """Oracle: transformers' logits in float32, to 1e-4."""
    kind, tied, scaled = CASES[name]
    network = any_format.open_source(str(FOLDERS / name)).network
    assert network.relative_attention_per_layer == (kind == "umt5")
    assert network.logits_via_embedding == tied
    assert network.logits_scale == (network.emb_dim**-0.5 if scaled else 1.0)
    assert error_of_logits(str(FOLDERS / name), FOLDERS / name) <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    """Theirs to ours and back, in the class it came from. Oracle: every tensor, to the bit."""
    convert.import_checkpoint(str(FOLDERS / name), str(tmp_path / "ours"))
    convert.export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "back"), format="huggingface")
    config, tensors = huggingface.open_checkpoint(str(tmp_path / "back"))
    before, wanted = huggingface.open_checkpoint(str(FOLDERS / name))
    assert config["model_type"] == before["model_type"] == CASES[name][0]
    assert config["architectures"] == before["architectures"]
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(tensors[key].whole(), tensor.whole(), key)
    sources = [any_format.open_source(p) for p in (str(FOLDERS / name), str(tmp_path / "back"))]
    assert sources[0].network == sources[1].network


def test_transformers_computes_what_was_exported(tmp_path):
    """Each class from our export. Oracle: transformers' own logits of the original, to 1e-4."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name, (kind, _, _) in CASES.items():
        out = str(tmp_path / name)
        convert.export_checkpoint(str(FOLDERS / name), out, format="huggingface")
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(out).eval()
        assert model.config.model_type == kind
        golden = np.load(FOLDERS / name / "golden.npz")
        inputs = torch.tensor(golden["input_ids"]).long()
        with torch.no_grad():
            logits = model(
                input_ids=inputs,
                attention_mask=(inputs > 0).long(),
                decoder_input_ids=torch.tensor(golden["decoder_input_ids"]).long(),
            ).logits.numpy()
        assert np.max(np.abs(logits - golden["logits"])) <= 1e-4, name


@pytest.mark.parametrize(
    ("name", "fields", "factor"),
    [
        # As Google's folders have it: version 5 forces the flag, and then scales UMT5's logits.
        ("umt5", {"tie_word_embeddings": False, "transformers_version": "4.31.0"}, 4.0),
        ("mt5", {"tie_word_embeddings": False, "transformers_version": "4.10.0"}, 1.0),
        ("mt5_tied", {"transformers_version": "4.40.0"}, 0.25),
    ],
)
def test_folders_that_version_4_of_transformers_saved(copied, name, fields, factor):
    """Oracle: its rule for both classes, logits are scaled by 16 ** -0.5 if declared as tied."""
    folder = copied(name)
    rewrite(folder, **fields)
    assert error_of_logits(str(folder), folder, factor) <= 1e-4


@pytest.mark.parametrize("name", sorted(huggingface.OTHER_CLASSES))
def test_other_classes_are_refused_by_name(copied, name):
    """Oracle: the error has the class, what it is, and the classes that are read."""
    folder = copied("mt5")
    rewrite(folder, model_type=name)
    with pytest.raises(UserError) as error:
        any_format.open_source(str(folder))
    for word in (f"model_type='{name}'", huggingface.OTHER_CLASSES[name], "'t5', 'mt5', 'umt5'"):
        assert word in str(error.value)


def test_a_umt5_with_one_bias_is_refused(copied):
    """A folder that declares the other class. Oracle: the tensor that is missing or surplus."""
    folder = copied("mt5")
    rewrite(folder, model_type="umt5")
    with pytest.raises(UserError, match=r"lacks decoder.block.1.*relative_attention_bias"):
        any_format.open_source(str(folder))
    folder = copied("umt5")
    rewrite(folder, model_type="mt5")
    with pytest.raises(UserError, match=r"decoder.block.1.*no place for"):
        any_format.open_source(str(folder))


def test_bytes_are_no_vocabulary():
    """ByT5: the network is imported, a vocabulary refused. Oracle: the tokenizer's name is said."""
    source = any_format.open_source(str(FOLDERS / "byt5"))
    assert (source.network.num_encoder_layers, source.network.num_decoder_layers) == (3, 1)
    assert source.vocabulary_path is None
    wanted = {"path": "spiece.model", "fingerprint": "0"}
    with pytest.raises(UserError, match=r"ByT5Tokenizer.*bytes|bytes.*ByT5Tokenizer"):
        any_format.check_own_vocabulary(source, wanted)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("umt5", "t5", "relative bias in every layer"),
        ("mt5", "umt5", "relative bias in every layer"),
        ("flan_t5_tied", "mt5", "has no scaled logits"),
        ("mt5", "bart", "it is one of"),
    ],
)
def test_a_class_that_cannot_compute_it_is_refused(tmp_path, name, kind, words):
    """Export as another class. Oracle: the reason in the message, and no folder."""
    with pytest.raises(UserError, match=words):
        convert.export_checkpoint(
            str(FOLDERS / name), str(tmp_path / "out"), format="huggingface", model_type=kind
        )
    assert not (tmp_path / "out").exists()


def test_a_t5_may_be_exported_as_mt5(tmp_path):
    """Flan-T5 without a shared head. Oracle: the recorded logits, from the exported folder."""
    out = str(tmp_path / "out")
    convert.export_checkpoint(str(FOLDERS / "flan_t5"), out, format="huggingface", model_type="mt5")
    assert huggingface.open_checkpoint(out)[0]["model_type"] == "mt5"
    assert error_of_logits(out, FOLDERS / "flan_t5") <= 1e-4
