"""ParlAI's models: BlenderBot against ParlAI 1.7.2's numbers, T5 against HuggingFace's folder."""

import dataclasses
import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format, convert, lazy
from cosmo.engine.checkpoints.description import flat
from cosmo.engine.checkpoints.interop import huggingface, parlai
from cosmo.engine.model import models
from cosmo.engine.model.blenderbot import BlenderbotConfig
from tests.conftest import DEFAULT_COMPILATION
from tests.engine import torch_files

SIZES = {"vocab_size": 12, "emb_dim": 8, "num_heads": 2, "mlp_dim": 12, "max_positions": 6}
SIZES |= {"num_encoder_layers": 1, "num_decoder_layers": 2}
OPTIONS = {
    "model": "transformer/generator",
    "embedding_size": 8,
    "n_heads": 2,
    "ffn_size": 12,
    "n_layers": 2,
    "n_encoder_layers": 1,
    "n_decoder_layers": -1,
    "variant": "prelayernorm",
    "activation": "gelu",
    "dropout": 0.1,
}


def state(seed: int = 0) -> dict[str, np.ndarray | str]:
    """A state dict of ParlAI's transformer, with names written out here, and START."""
    random_ = np.random.default_rng(seed)

    def tensor(*shape):
        return random_.standard_normal(shape).astype(np.float32)

    found: dict = {"START": np.array([1]), "embeddings.weight": tensor(12, 8)}
    for side, layers in (("encoder", 1), ("decoder", 2)):
        found[f"{side}.embeddings.weight"] = "embeddings.weight"
        found[f"{side}.position_embeddings.weight"] = tensor(6, 8)
        blocks = ["attention"] if side == "encoder" else ["self_attention", "encoder_attention"]
        for layer in range(layers):
            begin = f"{side}.layers.{layer}."
            for block in blocks:
                for letter in ("q", "k", "v", "out"):
                    found[f"{begin}{block}.{letter}_lin.weight"] = tensor(8, 8)
                    found[f"{begin}{block}.{letter}_lin.bias"] = tensor(8)
            for number in range(1, len(blocks) + 2):
                found[f"{begin}norm{number}.weight"] = tensor(8)
                found[f"{begin}norm{number}.bias"] = tensor(8)
            for number, (outputs, inputs) in ((1, (12, 8)), (2, (8, 12))):
                found[f"{begin}ffn.lin{number}.weight"] = tensor(outputs, inputs)
                found[f"{begin}ffn.lin{number}.bias"] = tensor(outputs)
        found[f"{side}.norm_embeddings.weight"] = tensor(8)
        found[f"{side}.norm_embeddings.bias"] = tensor(8)
    return found


@pytest.fixture
def written(tmp_path):
    """`written(tensors, **options)`: the path of a ParlAI model."""

    def write(tensors=None, name="model", **options):
        folder = tmp_path / "parlai"
        folder.mkdir(exist_ok=True)
        torch_files.save_state(folder / name, tensors or state(), number_training_updates=7)
        merged = {k: v for k, v in {**OPTIONS, **options}.items() if v != "left out"}
        (folder / f"{name}.opt").write_text(json.dumps(merged))
        return str(folder / name)

    return write


def in_memory(source: any_format.Source):
    return unflatten_dict({path: array.whole() for path, array in source.params.items()})


def test_logits_of_a_model_that_parlai_trained(golden):
    """From the file itself, by its folder. Oracle: ParlAI 1.7.2's logits, to 1e-4."""
    source = any_format.open_source(str(golden / "parlai"))
    assert (source.format, source.step) == ("parlai", 0)
    model = models.EncoderDecoderModel(dataclasses.replace(source.network, dtype="float32"))
    params = jax.tree.map(jnp.asarray, in_memory(source))
    cases = json.loads((golden / "parlai/teacher_forced.json").read_text())
    run = jax.jit(lambda p, b: models.logits(model, p, b), compiler_options=DEFAULT_COMPILATION)
    for number, case in enumerate(cases):
        ids, labels = (np.array([case[name]], np.int32) for name in ("text_vec", "label_vec"))
        batch = {
            "encoder_input_tokens": ids,
            "decoder_input_tokens": np.pad(labels, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": labels,
        }
        theirs = np.load(golden / f"parlai/logits_{number}.npz")["logits"].reshape(labels.size, -1)
        ours = np.asarray(run(params, batch))[0]
        # The start token's: ParlAI's lowest number there, minus infinity or so here.
        np.testing.assert_allclose(ours[:, 2:], theirs[:, 2:], atol=1e-4)
        assert (ours[:, 1] < -1e4).all() and (theirs[:, 1] < -1e4).all()


def test_every_tensor_and_its_place(written):
    """Oracle: the tensors that were written, found by HuggingFace's names through our export."""
    tensors = state()
    source = any_format.open_source(written())
    assert source.network == BlenderbotConfig(**SIZES, dropout_rate=0.1, forbidden_ids=(1,))
    for side in ("encoder", "decoder"):  # tables of their own
        np.testing.assert_array_equal(
            source.params[side, "position_embeddings"].whole(),
            tensors[f"{side}.position_embeddings.weight"],
        )
    np.testing.assert_array_equal(
        source.params["decoder", "layers", "mlp", "wi"].read(
            (slice(1, 2), slice(2, 5), slice(0, 12))
        )[0],
        tensors["decoder.layers.1.ffn.lin1.weight"].T[2:5],
    )
    assert source.text_options == {"delimiter": "\n"}


def test_by_way_of_ours_to_huggingface(written, tmp_path):
    """Import, then export. Oracle: ParlAI's tensors, by the table of names in the specification."""
    convert.import_checkpoint(written(delimiter="  ", text_truncate=5), str(tmp_path / "ours"))
    imported = any_format.open_source(str(tmp_path / "ours"))
    assert imported.text_options == {"delimiter": "  ", "text_truncate": 5}
    convert.export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "hf"), format="huggingface")
    theirs = load_file(tmp_path / "hf/model.safetensors")
    bias = theirs.pop("final_logits_bias")
    assert bias.shape == (1, 12) and not bias.any()
    rows = (
        ("encoder_attention", "encoder_attn"),
        ("self_attention", "self_attn"),
        ("attention", "self_attn"),
        ("_lin", "_proj"),
        ("ffn.lin1", "fc1"),
        ("ffn.lin2", "fc2"),
        ("norm_embeddings", "layer_norm"),
        ("position_embeddings", "embed_positions"),
        ("norm1", "self_attn_layer_norm"),
    )
    count = 0
    for name, tensor in state().items():
        if isinstance(tensor, str) or name == "START":
            continue
        for ours, their in rows:
            if ours == "encoder_attention" or f".{ours}" in name or ours.startswith("_"):
                name = name.replace(ours, their)
        last = "norm2" if name.startswith("encoder") else "norm3"
        name = name.replace(last, "final_layer_norm").replace("norm2", "encoder_attn_layer_norm")
        name = "shared.weight" if name == "embeddings.weight" else name
        np.testing.assert_array_equal(theirs[f"model.{name}"], tensor, err_msg=name)
        count += 1
    assert count == len(theirs)
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation["suppress_tokens"] == [1]
    assert (generation["max_length"], generation["num_beams"]) == (6, 10)  # six positions


def test_half_precision(written):
    """A file of fp16 training. Oracle: numpy's conversion to float32."""
    tensors = {
        k: v if isinstance(v, str) or k == "START" else v.astype(np.float16)
        for k, v in state().items()
    }
    found = any_format.open_source(written(tensors)).params["token_embedder",].whole()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, tensors["embeddings.weight"].astype(np.float32))


def test_override_wins(written):
    """Oracle: ParlAI, where `override` stands for what its user gave on the command line."""
    source = any_format.open_source(written(dropout=0.5, override={"dropout": 0.25}))
    assert source.network.dropout_rate == 0.25


def test_learned_positions_are_trained(written):
    """Oracle: the option."""
    assert any_format.open_source(written(learn_positional_embeddings=True)).network.train_positions


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "xlm"}, "BlenderBot 90M"),
        ({"variant": "left out"}, "variant='aiayn', expected 'prelayernorm'"),
        ({"variant": ["prelayernorm"]}, "expected 'prelayernorm'"),
        ({"activation": "relu"}, "activation='relu', expected 'gelu'"),
        ({"embeddings_scale": False}, "embeddings_scale=False"),
        ({"output_scaling": 0.5}, "output_scaling=0.5"),
        ({"n_segments": 2}, "n_segments=2"),
        ({"share_word_embeddings": False}, "share_word_embeddings=False"),
        ({"n_heads": 3}, "n_heads=3"),
        ({"n_heads": True}, "n_heads=True"),
        ({"n_heads": 0}, "n_heads=0"),
        ({"embedding_size": None}, "embedding_size=None"),
        ({"embedding_size": 16}, "expected"),
        ({"embedding_size": 10**9}, r"embeddings.weight is .*, expected \(\d+, 1000000000\)"),
        ({"ffn_size": "12"}, "ffn_size='12'"),
        ({"ffn_size": 13}, "expected"),
        ({"n_encoder_layers": 2}, "2 encoder layers, the tensors are of 1"),
        ({"n_layers": 10**12}, "n_decoder_layers=1000000000000"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": True}, "dropout=True"),
        ({"override": [1]}, "override"),
        ({"override": {"variant": "xlm"}}, "variant='xlm'"),
    ],
)
def test_options_of_other_networks(written, options, words):
    """Oracle: the option in the error."""
    with pytest.raises(UserError, match=words) as error:
        any_format.open_source(written(**options))
    assert "\n" not in str(error.value)


def changed(change) -> dict:
    tensors = state()
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("encoder.layers.0.norm1.bias"), "lacks encoder.layers.0.norm1.bias"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "has extra"),
        (lambda t: t.update({"decoder.layers.0.norm1.bias": np.zeros(9, np.float32)}), r"\(9,\)"),
        (
            lambda t: t.update({"encoder.embeddings.weight": t["embeddings.weight"] + 1}),
            "encoder.embeddings.weight differs",
        ),
        (lambda t: t.update({"embeddings.weight": np.zeros(8, np.float32)}), "no table embeddings"),
        (lambda t: t.pop("encoder.position_embeddings.weight"), "no table encoder.position"),
        (lambda t: t.pop("decoder.position_embeddings.weight"), "lacks decoder.position"),
        (
            lambda t: t.update({"decoder.norm_embeddings.bias": np.zeros(8, np.int64)}),
            "int64, expected floating-point",
        ),
    ],
)
def test_tensors_that_do_not_fit(written, change, words):
    """Oracle: the tensor in the error."""
    with pytest.raises(UserError, match=words):
        any_format.open_source(written(changed(change)))


def test_nan_is_an_error_unless_allowed(written):
    """Oracle: the tensor in the error, and the setting that allows it."""
    path = written(changed(lambda t: t["decoder.layers.1.norm3.bias"].__setitem__(2, np.nan)))
    source = any_format.open_source(path)
    with pytest.raises(UserError, match=r"decoder.layers.1.norm3.bias holds NaN.*allow_nonfinite"):
        source.params["decoder", "layers", "pre_mlp_layer_norm", "bias"].whole()
    assert any_format.open_source(path, allow_nonfinite=True).params


def test_places(written, tmp_path):
    """A file, its folder, a folder of several, no options. Oracle: the words, or the file."""
    path = written()
    folder = pathlib.Path(path).parent
    for place in (path, str(folder)):
        assert any_format.locate(place) == (path, 0, "parlai")
    with pytest.raises(UserError, match=r"below it there are .*/parlai"):
        any_format.locate(str(tmp_path))
    with pytest.raises(UserError, match="is a ParlAI model, not a T5X"):
        any_format.open_source(path, "t5x")
    written(name="model.checkpoint")  # ParlAI's last one, beside the best
    assert any_format.locate(str(folder)).folder == path
    written(name="other")
    pathlib.Path(path).unlink()
    with pytest.raises(UserError, match=r"2 models of ParlAI: give one of .*other"):
        any_format.locate(str(folder))
    (folder / "other.opt").unlink()
    with pytest.raises(UserError, match=r"other.opt beside it: copy that file"):
        any_format.locate(str(folder / "other"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model\.opt"):
        any_format.locate(str(tmp_path / "empty"))


def test_files_that_are_no_model(written, tmp_path):
    """Oracle: the words."""
    path = pathlib.Path(written())
    torch_files.save(path, {"optimizer": {}}, {})
    with pytest.raises(UserError, match=r"no entry 'model'.*optimizer"):
        any_format.open_source(str(path))
    torch_files.save(path, [1], {})
    with pytest.raises(UserError, match="no entry 'model'"):
        any_format.open_source(str(path))
    torch_files.save(path, {"model": {"a": 3}}, {})
    with pytest.raises(UserError, match="model/a is 3, expected a tensor"):
        any_format.open_source(str(path))
    path.with_name("model.opt").write_text("[1]")
    with pytest.raises(UserError, match="expected a JSON object"):
        any_format.open_source(str(path))
    with pytest.raises(UserError, match="local disk"):
        parlai.open_checkpoint("gs://bucket/model")


@pytest.fixture
def t5(tmp_path, tiny_config, make_params):
    """`t5(**settings)`: (HuggingFace's folder of a T5, the same as ParlAI's model)."""

    def make(change=lambda tensors: None, **settings):
        usual = {"mlp_activations": ("relu",), "logits_via_embedding": True}
        config = tiny_config(**{"scale_decoder_outputs": True, **usual, **settings})
        params = make_params(models.EncoderDecoderModel(config))
        arrays = {k: lazy.from_array(np.asarray(a)) for k, a in flat(params).items()}
        folder = epath.Path(tmp_path / "hf")
        folder.mkdir()
        huggingface.write_folder(folder, arrays, config, "float32", 10**9, lambda count: None)
        tensors = {f"t5.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
        # As its modules list them once more.
        for side in ("encoder", "decoder"):
            tensors[f"t5.{side}.embed_tokens.weight"] = "t5.shared.weight"
            for name in [n for n in tensors if n.startswith(f"t5.{side}.")]:
                tensors[name.replace(f"t5.{side}.", f"{side}.stack.")] = name
        tensors.setdefault("t5.lm_head.weight", "t5.shared.weight")
        tensors["START"] = np.array([0])
        change(tensors)
        model = tmp_path / "canary/model"
        model.parent.mkdir()
        torch_files.save_state(model, tensors, optimizer_type="adam")
        options = {"model": "hugging_face/t5", "t5_model_arch": "t5-large", "t5_dropout": 0.1}
        pathlib.Path(f"{model}.opt").write_text(json.dumps(options))
        return str(folder), str(model)

    return make


@pytest.mark.parametrize(
    "settings", [{}, {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": False}]
)
def test_t5(t5, settings):
    """T5 1.0, and Flan-T5's network. Oracle: HuggingFace's folder of the same tensors."""
    ours, theirs = (any_format.open_source(path) for path in reversed(t5(**settings)))
    assert ours.network == dataclasses.replace(theirs.network, dropout_rate=0.1)
    assert ours.params.keys() == theirs.params.keys()
    for path, array in ours.params.items():
        np.testing.assert_array_equal(array.whole(), theirs.params[path].whole())


def plus_one(name):
    def change(tensors):
        value = tensors[name]
        tensors[name] = (tensors[value] if isinstance(value, str) else value) + 1

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (plus_one("encoder.stack.final_layer_norm.weight"), "encoder.stack.final_layer_norm"),
        (plus_one("t5.encoder.embed_tokens.weight"), "embed_tokens.weight"),
        (lambda t: t.pop("t5.shared.weight"), "no matrix t5.shared.weight"),
        (lambda t: t.update(other=np.zeros(2, np.float32)), "has other"),
        (lambda t: t.pop("t5.decoder.block.0.layer.0.layer_norm.weight"), "decoder.stack|lacks"),
    ],
)
def test_t5_with_other_tensors(t5, change, words):
    """Oracle: the tensor in the error."""

    def resolved(tensors):  # names become arrays of their own, so that each can be changed
        for name, value in list(tensors.items()):
            tensors[name] = tensors[value] if isinstance(value, str) else value
        change(tensors)

    _, path = t5(resolved)
    with pytest.raises(UserError, match=words):
        any_format.open_source(path)


PIECES = (b"[", b"null", b"-1", b"1e999", b'"', b"\\ud800", b"NaN", b"9" * 20, b"true", b"{}")


def test_damaged_options(written):
    """300 mutations of `.opt`. Property: no error but UserError, of one line."""
    path = written()
    options = pathlib.Path(path + ".opt")
    content = options.read_bytes()
    errors = []
    for seed in range(300):
        chance = random.Random(seed)
        data, place = bytearray(content), chance.randrange(len(content))
        data[place : place + chance.choice((0, 1, 4))] = chance.choice(PIECES)
        options.write_bytes(data)
        try:
            assert any_format.open_source(path).params
        except UserError as error:
            errors.append(str(error))
    assert len(errors) > 100
    assert not [error for error in errors if "\n" in error]


def test_whole_folders_of_the_published_kind(golden, tmp_path):
    """ParlAI's own folder with its dictionary. Oracle: the file that names its BPE."""
    shutil.copytree(golden / "parlai", tmp_path / "copy")
    source = any_format.open_source(str(tmp_path / "copy/model"))
    assert source.vocabulary_path == str(tmp_path / "copy/model.dict")
    assert source.text_options["delimiter"] == "  "
    assert parlai.vocabulary_path(str(tmp_path / "elsewhere")) is None
