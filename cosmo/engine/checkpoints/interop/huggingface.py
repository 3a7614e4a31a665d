"""HuggingFace T5 folders: `config.json` and safetensors files, single or sharded."""

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import lazy
from cosmo.engine.checkpoints.interop import names
from cosmo.engine.checkpoints.lazy import LazyArray
from cosmo.engine.checkpoints.streaming import Path
from cosmo.engine.model import t5

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": ("F32", np.dtype(np.float32)), "bfloat16": ("BF16", ml_dtypes.bfloat16)}
STORED = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64}
ACTIVATIONS = {"gelu_new": "gelu", "relu": "relu", "silu": "silu"}  # theirs: ours
# Copies of the embedding that older files carry, and a table that T5 never reads.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNREAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def is_checkpoint(folder: epath.Path) -> bool:
    """Whether `folder` is a HuggingFace model's."""
    return (folder / CONFIG).exists() and not (folder / "checkpoints").exists()


def open_checkpoint(path: str) -> tuple[dict[str, Any], dict[str, LazyArray]]:
    """(config.json, tensors by name) of a local folder; no tensor is read yet."""
    if "://" in path:
        raise UserError(f"{path}: HuggingFace folders are read from local disk; copy it first")
    folder = epath.Path(path)
    try:
        config = json.loads((folder / CONFIG).read_text())
        if (folder / INDEX).exists():
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        else:
            files = [SINGLE]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"HuggingFace folder {path} cannot be read: {error}") from error
    missing = [name for name in files if not (folder / name).exists()]
    if missing and any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{path} holds PyTorch .bin weights, which are pickles and are not loaded. Where torch "
            'and transformers are installed (extra `hf`), convert it once: python -c "from '
            "transformers import AutoModelForSeq2SeqLM as A; "
            f"A.from_pretrained('{path}').save_pretrained('{path}-safetensors')\""
        )
    if missing:
        raise UserError(f"HuggingFace folder {path} has no {missing[0]}")
    tensors: dict[str, LazyArray] = {}
    for name in files:
        tensors |= _tensors(str(folder / name))
    return config, tensors


def _tensors(file: str) -> dict[str, LazyArray]:
    def lazily(name: str, shape: tuple[int, ...], dtype: np.dtype) -> LazyArray:
        def read(index):
            # Opened anew for each part: pages of the file that were read would else stay mapped.
            with safe_open(file, "numpy") as content:
                part = content.get_slice(name)
                return np.asarray(part[index]) if index else content.get_tensor(name)

        return LazyArray(shape, dtype, read)

    try:
        found = {}
        with safe_open(file, "numpy") as content:
            for name in content.keys():  # noqa: SIM118
                part = content.get_slice(name)
                stored = part.get_dtype()
                if stored not in STORED:
                    raise UserError(
                        f"{file}: {name} is stored as {stored}, expected {list(STORED)}"
                    )
                found[name] = lazily(name, tuple(part.get_shape()), np.dtype(STORED[stored]))
        return found
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def network(path: str, config: dict[str, Any], tensors: dict[str, LazyArray]) -> t5.T5Config:
    """The network that config.json describes; UserError if ours cannot compute it."""
    where = f"{path}/{CONFIG}"

    def field(name: str, *default: Any) -> Any:
        if name not in config and not default:
            raise UserError(f"{where} has no {name!r}")
        return config.get(name, *default)

    def size(name: str, *default: Any) -> int:
        value = field(name, *default)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{where}: {name}={value!r}, expected a whole number above 0")
        return value

    def expect(name: str, allowed: tuple, *default: Any) -> Any:
        if field(name, *default) not in allowed:
            raise UserError(f"{where}: {name}={field(name, *default)!r}, expected {allowed}")

    expect("model_type", ("t5",))
    expect("layer_norm_epsilon", (1e-6,), 1e-6)
    expect("pad_token_id", (0,), 0)
    expect("eos_token_id", (1, [1]), 1)
    expect("decoder_start_token_id", (0,), 0)
    projection = field("feed_forward_proj", None) or "relu"
    gated, activation = projection.startswith("gated-"), projection.removeprefix("gated-")
    # HuggingFace's name of T5 1.1's activation says `gelu` and means its tanh approximation.
    activation = "gelu_new" if projection == "gated-gelu" else activation
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}: feed_forward_proj={projection!r} is not one of {ACTIVATIONS}")
    tied = field("tie_word_embeddings", True)
    untied = "lm_head.weight" in tensors
    if untied and tied:
        untied = not _equal(tensors["lm_head.weight"], tensors.get("shared.weight"))
    if not untied and not tied:
        raise UserError(f"{where} says tie_word_embeddings=false, and there is no lm_head.weight")
    decoder = "num_layers" if field("num_decoder_layers", None) is None else "num_decoder_layers"
    return t5.T5Config(
        vocab_size=size("vocab_size"),
        emb_dim=size("d_model"),
        num_heads=size("num_heads"),
        num_encoder_layers=size("num_layers"),
        num_decoder_layers=size(decoder),
        head_dim=size("d_kv"),
        mlp_dim=size("d_ff"),
        mlp_activations=(ACTIVATIONS[activation], *(("linear",) if gated else ())),
        logits_via_embedding=not untied,
        # Version 5 writes this field; before it, untied logits were the sign of unscaled ones.
        scale_decoder_outputs=bool(field("scale_decoder_outputs", tied)),
        dropout_rate=field("dropout_rate", 0.0),
        relative_attention_num_buckets=size("relative_attention_num_buckets", 32),
        relative_attention_max_distance=size("relative_attention_max_distance", 128),
    )


def read(path: str, tensors: dict[str, LazyArray], config: t5.T5Config) -> dict[Path, LazyArray]:
    """Our parameters, float32, from HuggingFace's tensors; UserError if not exactly those."""
    found = {name: tensor for name, tensor in tensors.items() if name != UNREAD}
    copies = COPIES + (("lm_head.weight",) if config.logits_via_embedding else ())
    for name in copies:
        if name in found and not _equal(found.pop(name), tensors.get("shared.weight")):
            raise UserError(f"{path}: {name} differs from shared.weight, which it should copy")
    parameters = names.parameters(config)
    wanted = {}
    for parameter in parameters:
        shape = parameter.shape[::-1] if parameter.name.transposed else parameter.shape
        wanted |= dict.fromkeys(stored(parameter), shape)
    names.check_same(
        f"HuggingFace folder {path}", wanted, {name: t.shape for name, t in found.items()}
    )
    out = {}
    for parameter in parameters:
        parts = [found[name] for name in stored(parameter)]
        if parameter.name.transposed:
            parts = [lazy.transposed(part) for part in parts]
        array = lazy.stacked(parts) if parameter.side else parts[0]
        out[parameter.path] = lazy.astype(array, np.float32)
    return out


def stored(parameter: names.Parameter) -> list[str]:
    """HuggingFace's names of the tensors that hold a parameter: one, or one a layer."""
    name = parameter.name.huggingface
    if name is None:
        raise UserError(
            f"HuggingFace's T5 has no place for {'/'.join(parameter.path)}: its layers share one "
            "relative bias, those of T5X's scanned network have one each. Export it as t5x"
        )
    if parameter.side is None:
        return [name]
    return [f"{parameter.side}.block.{i}.{name}" for i in range(parameter.layers)]


def _equal(one: LazyArray, other: LazyArray | None) -> bool:
    if other is None or one.shape != other.shape:
        return False
    return all(np.array_equal(part, other.read(index)) for index, part in one.pieces())


def write(
    folder: epath.Path,
    params: dict[Path, LazyArray],
    config: t5.T5Config,
    dtype: str,
    max_shard_bytes: int,
    on_piece: Callable[[int], None],
) -> None:
    """Write config.json, generation_config.json and the weights in shards of `max_shard_bytes`."""
    settings = _config(config, dtype)
    code, numpy_dtype = DTYPES[dtype]
    tensors: dict[str, LazyArray] = {}
    for parameter in names.parameters(config):
        array = params[parameter.path]
        parts = [array]
        if parameter.side:
            parts = [lazy.layer(array, i) for i in range(parameter.layers)]
        for name, part in zip(stored(parameter), parts, strict=True):
            part = lazy.transposed(part) if parameter.name.transposed else part
            tensors[name] = lazy.astype(part, numpy_dtype)
    shards = list(_shards(tensors, max_shard_bytes))
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else [SINGLE]
    for file, shard in zip(files, shards, strict=True):
        _write_safetensors(folder / file, shard, code, on_piece)
    if len(files) > 1:
        places = {name: f for f, shard in zip(files, shards, strict=True) for name in shard}
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    # Without a length transformers stops at 20 tokens; Cosmo's responses have up to 128.
    generation = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    generation["max_new_tokens"] = 128
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _shards(tensors: dict[str, LazyArray], most: int) -> Iterator[dict[str, LazyArray]]:
    shard: dict[str, LazyArray] = {}
    for name, tensor in tensors.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > most:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _write_safetensors(file: epath.Path, tensors: dict[str, LazyArray], code: str, on_piece):
    """One file, tensor after tensor; the library's own writer wants them all in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants its data aligned
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for _, piece in tensor.pieces():
                out.write(np.ascontiguousarray(piece).tobytes())
                on_piece(piece.nbytes)


def _config(config: t5.T5Config, dtype: str) -> dict[str, Any]:
    """config.json, with the fields that transformers 4 and 5 read."""
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    first, *rest = config.mlp_activations
    if first not in theirs or rest not in ([], ["linear"]):
        raise UserError(f"HuggingFace's T5 has no mlp_activations={config.mlp_activations}")
    activation, gated = theirs[first], bool(rest)
    projection = "gelu" if gated and activation == "gelu_new" else activation
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "dropout_rate": config.dropout_rate,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "feed_forward_proj": f"gated-{projection}" if gated else projection,
        "dense_act_fn": activation,
        "is_gated_act": gated,
        "tie_word_embeddings": config.logits_via_embedding,
        "scale_decoder_outputs": config.logits_scale != 1.0,
        "is_encoder_decoder": True,
        "use_cache": True,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": dtype,
    }
