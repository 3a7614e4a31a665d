"""Write a T5 as a folder that CTranslate2 loads: a fast engine for processors, also in int8.

The package `ctranslate2` (extra `ct2`) defines the file; PyTorch and transformers are not needed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints.description import Path
from cosmo.engine.checkpoints.interop import huggingface, names
from cosmo.engine.checkpoints.lazy import LazyArray
from cosmo.engine.model.t5 import T5Config

DTYPES = ("float32", "int8")  # of the weights; activations are float32
ACTIVATIONS = {"relu": "RELU", "gelu": "GELUTanh", "silu": "SWISH"}  # ours: theirs
MODEL, VOCABULARY = "model.bin", "shared_vocabulary.json"
DESCRIPTION = "cosmo.json"  # beside CTranslate2's own files
REMEDY = "write it by `python -m cosmo export --format=ctranslate2`"


def package() -> Any:
    """Return the package `ctranslate2`. Raises UserError if it is not installed."""
    try:
        import ctranslate2
    except ImportError as error:
        raise UserError(
            f"CTranslate2 cannot be imported ({error}): pip install 'cosmo-dialogue[ct2]'",
            setting=("BACKEND", "format"),
        ) from error
    return ctranslate2


def is_folder(folder: epath.Path) -> bool:
    """Return whether a folder holds a model of CTranslate2."""
    return (folder / MODEL).exists() and (folder / VOCABULARY).exists()


def read_description(path: epath.PathLike) -> dict[str, Any]:
    """Return {network, config, vocabulary, step, dtype}, which `write_folder` wrote.

    Raises UserError if it is missing, as in a folder of CTranslate2's own converters, or damaged.
    """
    file = epath.Path(path) / DESCRIPTION
    if not file.exists():
        raise UserError(f"{path} is of CTranslate2, and has no {DESCRIPTION}: {REMEDY}")
    try:
        found = json_lines.value(file.read_bytes())
        if found["dtype"] not in DTYPES or not isinstance(found["step"], int):
            raise ValueError(f"dtype={found['dtype']!r}, step={found['step']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): {REMEDY}") from error
    return found


def read_token_names(path: epath.PathLike) -> list[str]:
    """Return the name of each token id. Raises UserError for a damaged file."""
    file = epath.Path(path) / VOCABULARY
    try:
        found = json_lines.value(file.read_bytes())
        if not isinstance(found, list) or len(set(found)) < len(found):
            raise ValueError("expected a list of texts that differ")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): {REMEDY}") from error
    return found


def check_network(config: Any) -> None:
    """Raise UserError if CTranslate2 cannot compute the network."""
    problem = None
    if not isinstance(config, T5Config):
        problem = f"it is a {type(config).__name__}, no T5"
    elif config.mlp_activations[0] not in ACTIVATIONS or config.mlp_activations[1:] not in (
        (),
        ("linear",),
    ):
        problem = f"its mlp_activations are {config.mlp_activations}"
    elif config.relative_attention_per_layer:
        problem = "it has a relative bias in every layer"
    if problem:
        raise UserError(
            f"CTranslate2 cannot compute this network: {problem}", setting=("BACKEND", "format")
        )


def write_folder(
    folder: epath.Path,
    params: dict[Path, LazyArray],
    config: T5Config,
    dtype: str,
    pieces: Sequence[str] | None = None,
    on_piece: Callable[[int], None] = lambda count: None,
    description: Mapping[str, Any] | None = None,
) -> None:
    """Write the model with weights in `dtype`. All float32 weights are in memory meanwhile.

    `pieces` are the texts of the first token ids; ids without a text are written as numbers.
    `description` has the step and what `description.describe` returns. `on_piece` receives the
    bytes of each tensor that was read. Raises UserError as `check_network`.
    """
    ctranslate2 = package()
    check_network(config)
    specs, activations = ctranslate2.specs, ctranslate2.specs.common_spec.Activation
    spec = specs.TransformerSpec.from_config(
        (config.num_encoder_layers, config.num_decoder_layers),
        config.num_heads,
        pre_norm=True,
        activation=activations[ACTIVATIONS[config.mlp_activations[0]]],
        ffn_glu=len(config.mlp_activations) > 1,
        relative_attention_bias=True,
        rms_norm=True,
    )
    tensors = names.tensors_to_write(params, config, huggingface.stored)

    def read(name: str) -> np.ndarray:
        array = np.array(tensors[name].whole(), np.float32)  # a copy: int8 is made in place
        on_piece(array.nbytes)
        return array

    embedding = read("shared.weight")
    for side, count in (
        ("encoder", config.num_encoder_layers),
        ("decoder", config.num_decoder_layers),
    ):
        stack = getattr(spec, side)
        bias = read(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        for layer in range(count):
            _fill_layer(stack.layer[layer], f"{side}.block.{layer}.", read, config)
            own = stack.layer[layer].self_attention
            own.relative_attention_bias = bias
            own.relative_attention_max_distance = np.int32(config.relative_attention_max_distance)
        stack.layer_norm.gamma = read(f"{side}.final_layer_norm.weight")
        if side == "decoder":  # T5 1.0 scales its logits; so does a smaller norm before them
            stack.layer_norm.gamma *= np.float32(config.logits_scale)
        stack.scale_embeddings = False
        table = stack.embeddings[0] if side == "encoder" else stack.embeddings
        table.weight = embedding
    tied = config.logits_via_embedding
    spec.decoder.projection.weight = embedding if tied else read("lm_head.weight")
    tokens = token_names(config.vocab_size, pieces)
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    special = config.special_ids
    spec.config.bos_token = spec.config.decoder_start_token = tokens[special.start]
    spec.config.eos_token, spec.config.unk_token = tokens[special.eos], tokens[special.eos + 1]
    spec.validate()
    spec.optimize(quantization=dtype)
    spec.save(str(folder))
    if description is not None:
        text = json.dumps({**description, "dtype": dtype}, indent=1)
        (folder / DESCRIPTION).write_text(text + "\n")


def token_names(size: int, pieces: Sequence[str] | None) -> list[str]:
    """Return a name for each token id: its piece, or its number where it has none."""
    known = list(pieces or ())[:size]
    return known + [f"<{id}>" for id in range(len(known), size)]


def _fill_layer(spec: Any, block: str, read: Callable[[str], np.ndarray], config: T5Config) -> None:
    """Set the matrices and norms of a layer; `block` begins its tensors' names."""
    attention = block + "layer.0.SelfAttention."
    _fill_attention(spec.self_attention, [[f"{attention}{x}.weight" for x in "qkv"]], read)
    spec.self_attention.linear[-1].weight = read(f"{attention}o.weight")
    spec.self_attention.layer_norm.gamma = read(f"{block}layer.0.layer_norm.weight")
    last = 1
    if block.startswith("decoder"):
        last, cross = 2, block + "layer.1.EncDecAttention."
        joined = [[f"{cross}q.weight"], [f"{cross}k.weight", f"{cross}v.weight"]]
        _fill_attention(spec.attention, joined, read)
        spec.attention.linear[-1].weight = read(f"{cross}o.weight")
        spec.attention.layer_norm.gamma = read(f"{block}layer.1.layer_norm.weight")
    dense = f"{block}layer.{last}.DenseReluDense."
    if len(config.mlp_activations) > 1:
        spec.ffn.linear_0.weight = read(f"{dense}wi_0.weight")
        spec.ffn.linear_0_noact.weight = read(f"{dense}wi_1.weight")
    else:
        spec.ffn.linear_0.weight = read(f"{dense}wi.weight")
    spec.ffn.linear_1.weight = read(f"{dense}wo.weight")
    spec.ffn.layer_norm.gamma = read(f"{block}layer.{last}.layer_norm.weight")


def _fill_attention(spec: Any, joined: list[list[str]], read) -> None:
    """Set the first matrices of an attention: each joins the kernels that are named."""
    spec.queries_scale = 1.0  # T5 scales no queries
    for place, kernels in enumerate(joined):
        spec.linear[place].weight = np.concatenate([read(name) for name in kernels])
