"""HuggingFace folders in and out, against those that transformers wrote (../shared/golden/hf)."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format, convert, lazy
from cosmo.engine.checkpoints.description import flat
from cosmo.engine.checkpoints.interop import huggingface, tokenizer
from cosmo.engine.model import generate, models
from cosmo.engine.model.decoding import DecodingConfig
from tests.conftest import DEFAULT_COMPILATION

GOLDEN = ("t5_v1_1", "t5_v1_0")


def in_memory(source: any_format.Source):
    """A source's parameters in memory."""
    return unflatten_dict({path: array.whole() for path, array in source.params.items()})


@pytest.fixture(params=GOLDEN)
def case(request, golden):
    """(model in float32, its parameters, what transformers computed from the same folder)."""
    source = any_format.open_source(str(golden / "hf" / request.param), "huggingface")
    model = models.EncoderDecoderModel(dataclasses.replace(source.network, dtype="float32"))
    with np.load(golden / "hf" / request.param / "golden.npz") as file:
        theirs = {name: file[name] for name in file.files}
    theirs["tokens"] = (theirs["input_ids"] * theirs["attention_mask"]).astype(np.int32)
    return model, in_memory(source), theirs


def test_logits(case):
    """T5 1.0 (tied, scaled) and a 1.1 with tied, unscaled logits. Oracle: transformers, to 1e-4.

    The latter's logits reach tens, where float32 sums in another order differ by 1e-5 of them.
    """
    model, params, theirs = case
    inputs = jnp.asarray(theirs["decoder_input_ids"], jnp.int32)

    def logits(params):
        return models.bind(model, params)(theirs["tokens"], inputs, jnp.ones_like(inputs))

    # The compiler as users have it: the fast one of the other tests rounds more.
    run = jax.jit(logits, compiler_options=DEFAULT_COMPILATION)
    np.testing.assert_allclose(run(params), theirs["logits"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("name", "beams"), [("greedy", 1), ("beam4", 4)])
def test_tokens(case, jit, name, beams):
    """Sixteen new tokens. Oracle: transformers' `generate`, greedy and with four beams."""
    model, params, theirs = case
    config = DecodingConfig(max_new_tokens=16, beam_size=beams)
    predict = jit(generate.predict, static_argnums=(0, 3))
    ours = np.asarray(predict(model, params, theirs["tokens"], config).tokens)
    np.testing.assert_array_equal(ours[:, 0], theirs[name][:, 1:])


@pytest.mark.parametrize("name", GOLDEN)
def test_round_trip(golden, name, tmp_path):
    """HF -> ours -> HF. Oracle: every tensor's bits, and the config that transformers wrote."""
    folder = golden / "hf" / name
    convert.import_checkpoint(str(folder), str(tmp_path / "ours"))
    convert.export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "back"), format="huggingface")
    theirs, ours = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "back/model.safetensors"),
    )
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((tmp_path / "back/config.json").read_text())
    unneeded = {"transformers_version", "classifier_dropout", "is_decoder", "dtype"}
    assert {k: v for k, v in before.items() if k not in unneeded} == {
        k: after[k] for k in before if k not in unneeded
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_config, make_params):
    """`exported(dtype, max_shard_bytes, **changes)`: what `folder` copies, made once."""

    @functools.cache
    def make(dtype="float32", max_shard_bytes=10**9, **changes):
        config = tiny_config(**changes)
        params = make_params(models.EncoderDecoderModel(config))
        arrays = {k: np.asarray(a) for k, a in flat(params).items()}
        sources_ = {path: lazy.from_array(array) for path, array in arrays.items()}
        out = epath.Path(tmp_path_factory.mktemp("exported"))
        huggingface.write_folder(out, sources_, config, dtype, max_shard_bytes, lambda count: None)
        return pathlib.Path(out), arrays

    return make


@pytest.fixture
def folder(tmp_path, exported):
    """`folder(dtype, max_shard_bytes)`: (an exported untied T5 1.1, its parameters by our path)."""

    def make(*args, **changes):
        out, arrays = exported(*args, **changes)
        return shutil.copytree(out, tmp_path / "model"), dict(arrays)

    return make


def test_sharded_folder(folder):
    """Oracle: the parameters that were written, by the safetensors library; no shard too large."""
    out, arrays = folder(max_shard_bytes=8000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    for file in files:
        with safe_open(file, "numpy") as content:
            assert content.metadata() == {"format": "pt"}
            tensors = [content.get_tensor(name) for name in content.keys()]  # noqa: SIM118
            assert {index["weight_map"][name] for name in content.keys()} == {file.name}  # noqa: SIM118
        assert sum(t.nbytes for t in tensors) <= 8000 or len(tensors) == 1
    source = any_format.open_source(str(out))
    for path, array in arrays.items():
        np.testing.assert_array_equal(source.params[path].whole(), array)
    assert not source.network.logits_via_embedding


def test_bfloat16(folder):
    """Oracle: ml_dtypes' rounding of every parameter, stored as BF16."""
    out, arrays = folder("bfloat16")
    tensors = load_file(out / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    source = any_format.open_source(str(out))
    for path, array in arrays.items():
        rounded = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(source.params[path].whole(), rounded)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_float16_is_refused(tmp_path):
    """Oracle: the reason in the message."""
    with pytest.raises(UserError, match="overflow"):
        convert.export_checkpoint("unused", str(tmp_path), format="huggingface", dtype="float16")


def edit(out: pathlib.Path, change) -> None:
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("decoder.block.2.layer.1.EncDecAttention.v.weight"), "EncDecAttention.v"),
        (lambda t: t.update(extra=np.zeros(3, "f4")), "has extra"),
        (lambda t: t.update({"shared.weight": np.zeros((39, 16), "f4")}), r"\(39, 16\)"),
        (lambda t: t.pop("lm_head.weight"), "no lm_head.weight"),
        (
            lambda t: t.update({"encoder.embed_tokens.weight": np.zeros((40, 16), "f4")}),
            "differs from shared.weight",
        ),
    ],
)
def test_every_tensor_is_accounted_for(folder, change, words):
    """Oracle: the name of what was taken away, added or reshaped, in the message."""
    out, _ = folder()
    edit(out, change)
    with pytest.raises(UserError, match=words):
        any_format.open_source(str(out))


def test_copies_of_the_embedding_are_accepted(folder):
    """Older files repeat the embedding. Oracle: the parameters without the copies."""
    out, arrays = folder(mlp_activations=("relu",), logits_via_embedding=True)
    names = (*huggingface.COPIES, "lm_head.weight")
    edit(out, lambda t: t.update({name: t["shared.weight"].copy() for name in names}))
    source = any_format.open_source(str(out))
    assert source.network.logits_via_embedding
    assert source.params.keys() == arrays.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "bart"),
        ("feed_forward_proj", "gated-tanh"),
        ("layer_norm_epsilon", 1e-5),
        ("pad_token_id", 3),
        ("d_ff", 2.5),
        ("num_heads", 0),
        ("d_model", None),
        ("num_decoder_layers", 0),
    ],
)
def test_other_networks_are_refused(folder, field, value):
    """Oracle: the config field in the message."""
    out, _ = folder()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(UserError, match=field):
        any_format.open_source(str(out))


def rewrite(out: pathlib.Path, **fields) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **fields}))


NUMBERS = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads")
ODD = ("text", True, -1, 0, 2.5, [], {}, [[[1]]], 10**12, 10**400, float("nan"), "\ud800")


@pytest.mark.parametrize("value", ODD, ids=[str(number) for number in range(len(ODD))])
def test_odd_values_of_every_field_are_refused_in_one_line(folder, value):
    """Oracle: a UserError that names config.json and the field, of one line, for each field."""
    out, _ = folder()
    before = (out / "config.json").read_text()
    flags = ("tie_word_embeddings", "scale_decoder_outputs")
    fields = (*NUMBERS, *flags, "feed_forward_proj", "model_type", "dropout_rate")
    for field in fields:
        if (field in flags and value is True) or (field == "dropout_rate" and value == 0):
            continue
        rewrite(out, **{field: value})
        with pytest.raises(UserError) as caught:
            any_format.open_source(str(out))
        text = str(caught.value)
        assert "config.json" in text and "\n" not in text and len(text) < 500
        # Two flags that contradict the tensors are named by the tensor.
        assert field in text or field.removesuffix("_layers") in text, text
        (out / "config.json").write_text(before)


@pytest.mark.parametrize(
    "content",
    [
        b"null",
        b"5",
        b"[]",
        b"",
        b"{",
        b"\xff\xfe{}",
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"1" * 10_000,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_no_object_is_refused_in_one_line(folder, name, content):
    """Oracle: a UserError of one line that names the file."""
    out, _ = folder(max_shard_bytes=8000)
    (out / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        any_format.open_source(str(out))
    assert str(out / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_read_over(folder):
    """Oracle: the same network as without it."""
    out, _ = folder()
    network = any_format.open_source(str(out)).network
    (out / "config.json").write_bytes(b"\xef\xbb\xbf" + (out / "config.json").read_bytes())
    assert any_format.open_source(str(out)).network == network


def test_no_dropout_rate_is_none(folder):
    """Oracle: transformers' meaning of null is no number; ours is a network without dropout."""
    out, _ = folder()
    rewrite(out, dropout_rate=None)
    assert any_format.open_source(str(out)).network.dropout_rate == 0.0


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        [],
        {},
        5,
        {"shared.weight": None},
        {"shared.weight": 5},
        {"shared.weight": ["a"]},
        {"shared.weight": ""},
        {"shared.weight": ".."},
        {"shared.weight": "../model.safetensors"},
        {"shared.weight": "/etc/passwd"},
        {"shared.weight": "a/b.safetensors"},
        {"shared.weight": "..\\model.safetensors"},
        {"shared.weight": "a\0b"},
        {"shared.weight": "gs://bucket/model.safetensors"},
    ],
    ids=str,
)
def test_an_index_names_files_of_its_own_folder(folder, weight_map):
    """Oracle: a UserError that names the index and its field."""
    out, _ = folder(max_shard_bytes=8000)
    index = out / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json: weight_map") as caught:
        any_format.open_source(str(out))
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_files_is_refused(folder):
    """Oracle: the tensor's name in the message."""
    out, _ = folder(max_shard_bytes=8000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    (out / "again.safetensors").write_bytes(
        (out / index["weight_map"]["shared.weight"]).read_bytes()
    )
    index["weight_map"]["extra"] = "again.safetensors"
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is in another file too"):
        any_format.open_source(str(out))


def test_weights_that_are_a_git_lfs_pointer(folder):
    """Oracle: the command that fetches them, in the message."""
    out, _ = folder()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (out / "model.safetensors").write_bytes(pointer)
    with pytest.raises(UserError, match="git lfs pull"):
        any_format.open_source(str(out))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "kept", [[0], [1], [0, 1], [2], [0, 1, 2]], ids=lambda kept: f"names{kept}"
)
def test_an_embedding_under_its_other_names(folder, kept, tied):
    """safetensors keeps one name of a shared tensor. Oracle: the parameters that were written."""
    out, arrays = folder(mlp_activations=("relu",), logits_via_embedding=tied)
    names = (*huggingface.COPIES, "lm_head.weight")

    def rename(tensors):
        embedding = tensors.pop("shared.weight")
        # In an untied network lm_head is a parameter of its own.
        chosen = [names[i] for i in kept if tied or i < 2]
        tensors.update({name: embedding.copy() for name in chosen})

    edit(out, rename)
    if not tied and kept == [2]:
        with pytest.raises(UserError, match=r"lacks shared\.weight"):
            any_format.open_source(str(out))
        return
    source = any_format.open_source(str(out))
    assert source.params.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(source.params[path].whole(), array)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_unless_allowed(folder, tmp_path, value):
    """Oracle: the tensor's name in the message, no checkpoint; allowed, the same value."""
    out, _ = folder()
    name = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    edit(out, lambda t: t[name].__setitem__((2, 3), value))
    with pytest.raises(UserError, match=name) as caught:
        convert.import_checkpoint(str(out), str(tmp_path / "ours"))
    assert caught.value.settings == ("allow_nonfinite",)
    assert not list((tmp_path / "ours/checkpoints").glob("*"))
    convert.import_checkpoint(str(out), str(tmp_path / "ours"), allow_nonfinite=True)
    params = any_format.open_source(str(tmp_path / "ours")).params
    assert str(params["decoder", "layers", "mlp", "wo"].whole()[1, 3, 2]) == str(np.float32(value))


def test_weights_of_another_type_are_refused(folder):
    """Oracle: the tensor and its type in the message."""
    out, _ = folder()
    edit(out, lambda t: t.update({"shared.weight": t["shared.weight"].astype(np.int32)}))
    with pytest.raises(UserError, match=r"shared\.weight is stored as I32"):
        any_format.open_source(str(out))


@pytest.mark.parametrize(
    ("above", "given"),
    [
        ("checkpoint-500", "."),  # a Trainer's output
        ("hub/models--google--t5/snapshots/1f2e", "."),  # HF_HOME
        ("models--google--t5/snapshots/1f2e", "."),  # a hub's cache
        ("runs/model", "runs"),
        ("model", "model/model.safetensors"),
        ("model", "model/onnx"),
    ],
)
def test_a_path_beside_a_checkpoint_says_where_it_is(folder, tmp_path, above, given):
    """Oracle: the right folder in the message."""
    out, _ = folder()
    right = tmp_path / "data" / above
    right.parent.mkdir(parents=True)
    out.rename(right)
    (right / "onnx").mkdir()
    with pytest.raises(UserError) as caught:
        any_format.locate(str(tmp_path / "data" / given))
    assert f"{right}" in str(caught.value)
    assert any_format.locate(str(right)).format == "huggingface"


def test_pytorch_weights_are_refused_with_a_way(folder):
    """Oracle: the conversion command in the message."""
    out, _ = folder()
    (out / "model.safetensors").unlink()
    (out / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"save_pretrained"):
        any_format.open_source(str(out))


def test_version_4_configs(folder):
    """Without `scale_decoder_outputs`. Oracle: version 4's rule, tied logits are scaled."""
    out, _ = folder(mlp_activations=("relu",), logits_via_embedding=True)
    config = json.loads((out / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (out / "config.json").write_text(json.dumps(config))
    assert any_format.open_source(str(out)).network.logits_scale == 16**-0.5


def test_broken_files(folder):
    """Oracle: the file's name in the message."""
    out, _ = folder()
    data = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        any_format.open_source(str(out))


def test_a_bias_a_layer_is_umt5_s_alone(tmp_path, tiny_config, make_params):
    """T5's and mT5's layers share one relative bias. Oracle: a UserError that says so, no folder.

    As UMT5, which has one in every layer, the same parameters come back.
    """
    config = tiny_config(relative_attention_per_layer=True)
    params = flat(make_params(models.EncoderDecoderModel(config)))
    arrays = {path: lazy.from_array(np.asarray(a)) for path, a in params.items()}
    from cosmo.engine.checkpoints import streaming

    description = {
        "network": "T5Config",
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
    }
    streaming.write_checkpoint(
        str(tmp_path / "run"), 1, {"params": unflatten_dict(arrays)}, description
    )
    run, out = str(tmp_path / "run"), str(tmp_path / "hf")
    for kind in ("t5", "mt5"):
        with pytest.raises(UserError, match="relative bias"):
            convert.export_checkpoint(run, out, format="huggingface", model_type=kind)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    convert.export_checkpoint(run, out, format="huggingface")
    back = any_format.open_source(out)
    assert back.network.relative_attention_per_layer
    assert back.params.keys() == params.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(back.params[path].whole(), array)


def test_a_character_without_a_piece_is_its_bytes(tmp_path):
    """mT5's tokenizer falls back to bytes. Oracle: SentencePiece's ids and text."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    tokenizers = pytest.importorskip("tokenizers")
    root = pathlib.Path(__file__).resolve().parents[2]
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((root / "tasks/sample/vocabulary.model").read_bytes())
    model.trainer_spec.byte_fallback = True
    known = {piece.piece for piece in model.pieces}
    for character in set("<0x41>") - known:  # as in mT5, which has pieces for all of ASCII
        model.pieces.add(piece=character, score=-9.0)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=model.SentencePiece.BYTE)
    path = tmp_path / "mt5.model"
    path.write_bytes(model.SerializeToString())
    tokenizer.write_tokenizer(epath.Path(tmp_path), str(path))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = SentencePieceProcessor(str(path))
    for text in ("日本語 is 😀", "Ann😀 Ω", "a<0x41>b", "Hi! How are you?"):
        ids = ours.encode(text)
        assert theirs.encode(text).ids == [*ids, 1], text
        assert 2 not in ids and theirs.decode(ids) == ours.decode(ids) == text


def test_a_vocabulary_of_another_type_has_no_tokenizer(tmp_path):
    """Oracle: the model's type and the expected one in the message, and no file."""
    from sentencepiece import sentencepiece_model_pb2

    root = pathlib.Path(__file__).resolve().parents[2]
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((root / "tasks/sample/vocabulary.model").read_bytes())
    model.trainer_spec.model_type = model.trainer_spec.BPE
    path, out = tmp_path / "bpe.model", epath.Path(tmp_path / "out")
    path.write_bytes(model.SerializeToString())
    out.mkdir()
    with pytest.raises(UserError, match="is a BPE model, expected UNIGRAM"):
        tokenizer.write_tokenizer(out, str(path))
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\n", b"", b"\0junk", None], ids=str
)
def test_a_vocabulary_that_is_none_is_one_error(tmp_path, content):
    """Oracle: a UserError of one line that names the file; None stands for a folder."""
    path = tmp_path / "spiece.model"
    path.mkdir() if content is None else path.write_bytes(content)
    for read in (
        lambda: tokenizer.fingerprint(str(path)),
        lambda: tokenizer.write_tokenizer(epath.Path(tmp_path), str(path)),
    ):
        with pytest.raises(UserError, match=r"spiece\.model") as caught:
            read()
        assert "\n" not in str(caught.value)
