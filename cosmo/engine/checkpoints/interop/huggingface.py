"""Read and write HuggingFace folders: `config.json` and safetensors files, single or sharded.

T5's, mT5's and UMT5's are mapped here, BlenderBot's in `huggingface_blenderbot`.
"""

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from cosmo.engine.base.errors import UserError, shown
from cosmo.engine.checkpoints import lazy
from cosmo.engine.checkpoints.description import Path
from cosmo.engine.checkpoints.interop import foreign_files, huggingface_blenderbot, names
from cosmo.engine.checkpoints.lazy import LazyArray
from cosmo.engine.model import t5
from cosmo.engine.model.blenderbot import BlenderbotConfig

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Types that we write: (safetensors' code, numpy's type).
DTYPES = {"float32": ("F32", np.dtype(np.float32)), "bfloat16": ("BF16", ml_dtypes.bfloat16)}
# Types that we read, by safetensors' code.
STORED = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64}

# config.json as tables. Sizes: (field of T5Config, theirs, transformers' default).
SIZES = (
    ("vocab_size", "vocab_size", None),
    ("emb_dim", "d_model", None),
    ("head_dim", "d_kv", None),
    ("mlp_dim", "d_ff", None),
    ("num_encoder_layers", "num_layers", None),
    ("num_decoder_layers", "num_decoder_layers", None),
    ("num_heads", "num_heads", None),
    ("relative_attention_num_buckets", "relative_attention_num_buckets", 32),
    ("relative_attention_max_distance", "relative_attention_max_distance", 128),
)
# Classes of transformers that our T5 computes, by `model_type`: (class, default activation).
CLASSES = {
    "t5": ("T5ForConditionalGeneration", "relu"),  # also Flan-T5 and ByT5
    "mt5": ("MT5ForConditionalGeneration", "gated-gelu"),
    "umt5": ("UMT5ForConditionalGeneration", "gated-gelu"),  # a relative bias in every layer
}
# Related classes that it does not compute, and the reason.
OTHER_CLASSES = {
    "longt5": "LongT5, whose encoder attends locally",
    "switch_transformers": "Switch Transformers, a mixture of experts",
    "t5gemma": "T5Gemma, made of Gemma's layers",
    "t5gemma2": "T5Gemma 2, made of Gemma's layers",
    "bart": "BART, a post-norm network with positions",
    "mbart": "mBART, a network with positions",
    "pegasus": "Pegasus, a network with positions",
    "marian": "Marian, a network with positions",
}
BYTE_TOKENIZERS = ("ByT5Tokenizer", "MyT5Tokenizer")
BYTES = (
    "its tokens are bytes ({tokenizer}: id = byte + 3, then 125 sentinels), no pieces of "
    "SentencePiece: there is no vocabulary file for it"
)
# Fields with one value that our network can compute.
FIXED = {
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
ACTIVATIONS = {"gelu_new": "gelu", "relu": "relu", "silu": "silu"}  # theirs: ours
# The activation of each `feed_forward_proj`.
PROJECTIONS = {gate + name: name for gate in ("", "gated-") for name in ACTIVATIONS}
PROJECTIONS["gated-gelu"] = "gelu_new"

# transformers' `T5Config` and `T5ForConditionalGeneration` are the reference for all of these.

# Copies of the embedding that older files carry, and a table that T5 never reads.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNREAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def is_checkpoint(folder: epath.Path) -> bool:
    """Return whether `folder` is a HuggingFace model's."""
    return (folder / CONFIG).exists() and not (folder / "checkpoints").exists()


def open_checkpoint(path: str) -> tuple[dict[str, Any], dict[str, LazyArray]]:
    """Return (config.json, tensors by name) of a local folder. Reads no tensor yet.

    Raises UserError if the folder is remote, or a file is missing, broken or a pickle.
    """
    if "://" in path:
        raise UserError(f"{path}: HuggingFace folders are read from local disk; copy it first")
    folder = epath.Path(path)
    config = foreign_files.read_json_object(folder / CONFIG)
    # Before its weights: converting them would be in vain.
    if config.get("model_type") == huggingface_blenderbot.OTHER_MODEL_TYPE:
        raise huggingface_blenderbot.refuse_small(str(folder / CONFIG))
    files = _shards_of(folder / INDEX) if (folder / INDEX).exists() else [SINGLE]
    missing = [name for name in files if not (folder / name).exists()]
    # Unpickling runs any code that the file holds.
    if missing and any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{path} holds PyTorch .bin weights, which are pickles and are not loaded. Where torch "
            'and transformers are installed (extra `hf`), convert it once: python -c "from '
            "transformers import AutoModelForSeq2SeqLM as A; "
            f"A.from_pretrained('{path}').save_pretrained('{path}-safetensors')\""
        )
    if missing:
        raise UserError(f"HuggingFace folder {path} has no {missing[0]}: copy the whole folder")
    tensors: dict[str, LazyArray] = {}
    for name in files:
        found = _tensors(folder / name)
        # Two files with one tensor are of two savings: which one is right cannot be known.
        if twice := sorted(tensors.keys() & found.keys()):
            raise UserError(f"{folder / name}: {twice[0]} is in another file too; copy one saving")
        tensors |= found
    return config, _one_embedding(config, tensors)


def _shards_of(index: epath.Path) -> list[str]:
    """Return the names of the weights' files by their index. Raises UserError if it is no index."""
    places = foreign_files.read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: weight_map={shown(places)}, expected {{tensor: file}}")
    for name in places.values():
        foreign_files.check_inside(f"{index}: weight_map", name)
    return sorted(set(places.values()))


def _one_embedding(config: dict[str, Any], tensors: dict[str, LazyArray]) -> dict[str, LazyArray]:
    """Return the tensors with the embedding under its name `shared.weight`."""
    # safetensors stores a tensor that has several names under one of them, whichever comes first.
    # With tied embeddings lm_head is one more name of it.
    tied = config.get("tie_word_embeddings", True) is True
    name, others = "shared.weight", COPIES + (("lm_head.weight",) if tied else ())
    if config.get("model_type") == huggingface_blenderbot.MODEL_TYPE:
        name, others = huggingface_blenderbot.EMBEDDING, huggingface_blenderbot.COPIES
    present = [name for name in others if name in tensors]
    if name in tensors or not present:
        return tensors
    embedding = tensors[present[0]]
    return {name: embedding} | {k: t for k, t in tensors.items() if k != present[0]}


def _tensors(file: epath.Path) -> dict[str, LazyArray]:
    """Return the tensors of one safetensors file by name."""

    def lazily(name: str, shape: tuple[int, ...], dtype: np.dtype) -> LazyArray:
        def read(index):
            # Open the file for each part: in an open one, pages that were read stay mapped, and
            # count as this process's memory.
            try:
                with safe_open(file, "numpy") as content:
                    part = content.get_slice(name)
                    return np.asarray(part[index]) if index else content.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: {name} cannot be read: {error}") from error

        return LazyArray(shape, dtype, read)

    try:
        foreign_files.check_no_pointer(file)
        found = {}
        with safe_open(file, "numpy") as content:
            for name in content.keys():  # noqa: SIM118
                part = content.get_slice(name)
                stored = part.get_dtype()
                if stored not in STORED:
                    raise UserError(
                        f"{file}: {name} is stored as {stored}, expected one of {list(STORED)}"
                    )
                found[name] = lazily(name, tuple(part.get_shape()), np.dtype(STORED[stored]))
        return found
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} cannot be read: {error}; copy or download the file again"
        ) from error


def network(
    path: str, config: dict[str, Any], tensors: dict[str, LazyArray]
) -> t5.T5Config | BlenderbotConfig:
    """Return the network that config.json describes. Raises UserError if ours cannot compute it."""
    where = f"{path}/{CONFIG}"
    if config.get("model_type") == huggingface_blenderbot.MODEL_TYPE:
        return huggingface_blenderbot.network(where, config, tensors)
    kind = model_type(where, config)
    settings = {**FIXED, **config}
    for name, value in FIXED.items():
        if settings[name] not in (value, [value]):  # eos_token_id may be a list
            raise UserError(f"{where}: {name}={shown(settings[name])}, expected {value!r}")
    # As in transformers: a decoder as deep as the encoder.
    if settings.get("num_decoder_layers") is None:
        settings["num_decoder_layers"] = settings.get("num_layers")
    sizes = {}
    for ours, theirs, default in SIZES:
        size = settings.get(theirs, default)
        sizes[ours] = foreign_files.check_size(where, theirs, size)
    # Before anything is listed layer by layer: a wrong number of layers may be any number.
    for side in ("encoder", "decoder"):
        layers = sizes[f"num_{side}_layers"]
        foreign_files.check_layers(where, side, layers, tensors, f"{side}.block.")
    buckets = sizes["relative_attention_num_buckets"]
    # Half of an encoder's buckets are for each direction, and half of those for single distances.
    if buckets < 4 or sizes["relative_attention_max_distance"] <= buckets // 2:
        raise UserError(
            f"{where}: relative_attention_num_buckets={buckets} and relative_attention_max_distance"
            f"={sizes['relative_attention_max_distance']}, expected at least 4, and more than half "
            "of the first"
        )
    projection = settings.get("feed_forward_proj")
    projection = CLASSES[kind][1] if projection is None else projection
    # As transformers reads it: T5 1.1's "gated-gelu" is the tanh approximation of gelu.
    activation = PROJECTIONS.get(projection) if isinstance(projection, str) else None
    if activation is None:
        raise UserError(
            f"{where}: feed_forward_proj={shown(projection)}, expected one of {list(PROJECTIONS)}"
        )
    gated = projection.startswith("gated-")
    tied = _flag(where, settings, "tie_word_embeddings", True)
    if kind == "t5":
        scaled = _flag(where, settings, "scale_decoder_outputs", tied)
    else:
        # Version 5 of transformers never scales mT5's logits; version 4 does if they are tied.
        scaled = tied and (kind == "umt5" or str(settings.get("transformers_version"))[:2] == "4.")
    dropout = settings.get("dropout_rate")
    dropout = 0.0 if dropout is None else dropout
    dropout = foreign_files.check_rate(where, "dropout_rate", dropout)
    untied = "lm_head.weight" in tensors
    # Some folders declare tied embeddings and hold another lm_head: the tensors decide.
    if untied and tied:
        untied = not lazy.equal(tensors["lm_head.weight"], tensors.get("shared.weight"))
    if not untied and not tied:
        raise UserError(f"{where} has tie_word_embeddings=false, and there is no lm_head.weight")
    return t5.T5Config(
        **sizes,
        mlp_activations=(ACTIVATIONS[activation], *(("linear",) if gated else ())),
        logits_via_embedding=not untied,
        # transformers 5 writes this field. Version 4 scales logits exactly if they are tied.
        scale_decoder_outputs=scaled,
        dropout_rate=dropout,
        relative_attention_per_layer=kind == "umt5",
    )


def model_type(where: str, config: dict[str, Any]) -> str:
    """Return the `model_type` of a T5's config.json, a key of CLASSES. Raises UserError."""
    found = config.get("model_type")
    if isinstance(found, str) and found in CLASSES:
        return found
    known = isinstance(found, str) and found in OTHER_CLASSES
    reason = f" ({OTHER_CLASSES[found]})" if known else ""
    readable = [*CLASSES, huggingface_blenderbot.MODEL_TYPE]
    raise UserError(f"{where}: model_type={shown(found)}{reason}, expected one of {readable}")


def describe(path: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return {"model_type", and "byte_tokenizer" where it has one} of a folder `network` takes."""
    found = {"model_type": config["model_type"]}
    file = epath.Path(path) / "tokenizer_config.json"
    settings = foreign_files.read_json_object(file) if file.exists() else {}
    for value in (settings.get("tokenizer_class"), config.get("tokenizer_class")):
        if value in BYTE_TOKENIZERS:
            found["byte_tokenizer"] = value
    return found


def _flag(where: str, settings: dict[str, Any], name: str, default: bool) -> bool:
    """Return a setting that is true or false. Raises UserError for any other value."""
    value = settings.get(name, default)
    if not isinstance(value, bool):  # the text "false" would count as true
        raise UserError(f"{where}: {name}={shown(value)}, expected true or false")
    return value


def read_params(
    path: str,
    tensors: dict[str, LazyArray],
    config: t5.T5Config | BlenderbotConfig,
    *,
    allow_nonfinite: bool = False,
    where: str | None = None,
) -> dict[Path, LazyArray]:
    """Return our parameters, float32, from HuggingFace's tensors.

    `where` begins errors, if not the folder at `path`. Raises UserError if a tensor is missing,
    surplus or misshapen.
    """
    if isinstance(config, BlenderbotConfig):
        return huggingface_blenderbot.read_params(
            path, tensors, config, allow_nonfinite=allow_nonfinite
        )
    found = {name: tensor for name, tensor in tensors.items() if name != UNREAD}
    # Copies that differ would mean that the file has two embeddings, of which T5 has one.
    copies = COPIES + (("lm_head.weight",) if config.logits_via_embedding else ())
    for name in copies:
        if name in found and not lazy.equal(found.pop(name), tensors.get("shared.weight")):
            raise UserError(f"{path}: {name} differs from shared.weight, which it should copy")
    places = [names.place(parameter, stored(parameter)) for parameter in names.parameters(config)]
    where = where or f"HuggingFace folder {path}"
    return names.gather(where, found, places, allow_nonfinite=allow_nonfinite)


def stored(parameter: names.Parameter) -> list[str]:
    """Return HuggingFace's names of the tensors that hold a parameter: one, or one a layer."""
    name = parameter.name.huggingface
    return parameter.in_layers("{side}.block.{layer}.", name)


def write_folder(
    folder: epath.Path,
    params: dict[Path, LazyArray],
    config: t5.T5Config | BlenderbotConfig,
    dtype: str,
    max_shard_bytes: int,
    on_piece: Callable[[int], None],
    kind: str | None = None,
) -> None:
    """Write config.json, generation_config.json and the weights in shards of `max_shard_bytes`.

    `kind` is a key of CLASSES; None is "umt5" for a relative bias in every layer, else "t5".

    `dtype` is a key of DTYPES. `on_piece` receives the bytes of each piece once it is written.
    Raises UserError if HuggingFace's T5 cannot compute the network; OSError if writing fails.
    """
    if isinstance(config, BlenderbotConfig):
        if kind not in (None, huggingface_blenderbot.MODEL_TYPE):
            raise UserError(f"model_type={shown(kind)} is a T5, this is a BlenderBot: leave it out")
        settings = huggingface_blenderbot.config_json(config, dtype)
        generation = huggingface_blenderbot.generation_json(config)
        tensors = huggingface_blenderbot.tensors(params, config)
    else:
        settings = _config(config, dtype, kind)
        tensors = names.tensors_to_write(params, config, stored)
        tokens = {name: value for name, value in FIXED.items() if name.endswith("_token_id")}
        # Without a length transformers stops at 20 tokens; Cosmo's responses have up to 128.
        generation = {**tokens, "max_new_tokens": 128}
    code, numpy_dtype = DTYPES[dtype]
    tensors = {name: lazy.astype(tensor, numpy_dtype) for name, tensor in tensors.items()}
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
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    # Last: in a bucket, where a folder has no name to change, it marks the folder as complete.
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _shards(tensors: dict[str, LazyArray], max_bytes: int) -> Iterator[dict[str, LazyArray]]:
    """Yield consecutive tensors that fit into `max_bytes` together; a larger one comes alone."""
    shard: dict[str, LazyArray] = {}
    for name, tensor in tensors.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > max_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _write_safetensors(file: epath.Path, tensors: dict[str, LazyArray], code: str, on_piece):
    """Write one safetensors file, tensor after tensor.

    The format is an 8-byte length, a JSON header of that length, then the tensors' bytes.
    """
    # The library's own writer needs all tensors of a file in memory at once.
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
    text += b" " * (-len(text) % 8)  # the format aligns its data to 8 bytes
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for _, piece in tensor.pieces():
                out.write(np.ascontiguousarray(piece).tobytes())
                on_piece(piece.nbytes)


def _check_class(config: t5.T5Config, kind: str) -> None:
    """Raise UserError if transformers' class of a `model_type` cannot compute the network."""
    if kind not in CLASSES:
        raise UserError(
            f"model_type={shown(kind)}; it is one of {list(CLASSES)}", setting="model_type"
        )
    if config.relative_attention_per_layer != (kind == "umt5"):
        raise UserError(
            f"model_type={kind} has another network: umt5 has a relative bias in every layer, in "
            "t5 and mt5 the layers share one. Export this model as the other kind, or as t5x",
            setting="model_type",
        )
    scaled, tied = config.logits_scale != 1.0, config.logits_via_embedding
    if (kind == "mt5" and scaled) or (kind == "umt5" and tied and not scaled):
        word = "scaled" if scaled else "tied, unscaled"
        raise UserError(
            f"model_type={kind} has no {word} logits: export this model as t5 or t5x",
            setting="model_type",
        )


def _config(config: t5.T5Config, dtype: str, kind: str | None = None) -> dict[str, Any]:
    """Return config.json, with the fields that transformers 4 and 5 read.

    Raises UserError if HuggingFace's T5 has not the network's activations.
    """
    kind = kind or ("umt5" if config.relative_attention_per_layer else "t5")
    _check_class(config, kind)
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    first, *rest = config.mlp_activations
    if first not in theirs or rest not in ([], ["linear"]):
        raise UserError(
            f"HuggingFace's T5 has no mlp_activations={config.mlp_activations}, only one of "
            f"{list(theirs)}, alone or with 'linear': this model cannot be exported"
        )
    activation, gated = theirs[first], bool(rest)
    scaled = config.logits_scale != 1.0
    projection = "gelu" if gated and activation == "gelu_new" else activation
    return {
        "architectures": [CLASSES[kind][0]],
        "model_type": kind,
        **FIXED,
        **{name: getattr(config, ours) for ours, name, _ in SIZES},
        "dropout_rate": config.dropout_rate,
        "initializer_factor": 1.0,
        "feed_forward_proj": f"gated-{projection}" if gated else projection,
        "dense_act_fn": activation,
        "is_gated_act": gated,
        # UMT5 scales its logits by this flag; whether they are tied, the tensors show.
        "tie_word_embeddings": scaled if kind == "umt5" else config.logits_via_embedding,
        **({"scale_decoder_outputs": scaled} if kind == "t5" else {}),
        "is_encoder_decoder": True,
        "use_cache": True,
        "torch_dtype": dtype,
    }
