"""Map the config and tensors of HuggingFace's `BlenderbotForConditionalGeneration` to ours.

`huggingface` reads and writes the folders. transformers' `BlenderbotConfig` is the reference.
"""

from typing import Any

import numpy as np

from cosmo.engine.base.errors import UserError, shown
from cosmo.engine.checkpoints import lazy
from cosmo.engine.checkpoints.description import Path
from cosmo.engine.checkpoints.interop import foreign_files, names
from cosmo.engine.checkpoints.lazy import LazyArray
from cosmo.engine.model.blenderbot import BlenderbotConfig

MODEL_TYPE, OTHER_MODEL_TYPE = "blenderbot", "blenderbot-small"
# Sizes: (field of BlenderbotConfig, their names, which must have one value).
SIZES = (
    ("vocab_size", ("vocab_size",)),
    ("emb_dim", ("d_model",)),
    ("num_heads", ("encoder_attention_heads", "decoder_attention_heads")),
    ("num_encoder_layers", ("encoder_layers",)),
    ("num_decoder_layers", ("decoder_layers",)),
    ("mlp_dim", ("encoder_ffn_dim", "decoder_ffn_dim")),
    ("max_positions", ("max_position_embeddings",)),
)
# Fields with one value that our network can compute, and what a config without one means.
FIXED = {
    "activation_function": ("gelu", "gelu"),
    "scale_embedding": (True, False),
    "pad_token_id": (0, 0),
    "bos_token_id": (1, 1),
    "eos_token_id": (2, 2),
    "decoder_start_token_id": (1, 1),
    "tie_word_embeddings": (True, True),
    # Older configs have these too; BlenderBot 90M has other values.
    "normalize_before": (True, True),
    "layernorm_variant": ("prelayernorm", "prelayernorm"),
    "add_final_layer_norm": (True, True),
    "normalize_embedding": (False, False),
    "extra_pos_embeddings": (0, 0),
}
EMBEDDING = "model.shared.weight"
POSITIONS = "model.encoder.embed_positions.weight"
# Other names of the embedding, which most files do without.
COPIES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
COPIES += ("lm_head.weight",)
LOGITS_BIAS = "final_logits_bias"
LAYER = "model.{side}.layers.{layer}."
# As the published folders generate. transformers would stop at 20 tokens.
GENERATION = {
    "num_beams": 10,
    "min_length": 20,
    "max_length": 60,
    "length_penalty": 0.65,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 3,
    "forced_eos_token_id": 2,
}


def refuse_small(path: str) -> UserError:
    """Return the error for a folder of BlenderBot 90M."""
    return UserError(
        f"{path}: model_type={OTHER_MODEL_TYPE!r} (facebook/blenderbot_small-90M) is another "
        "network and tokenizer: it norms after each layer and norms the embeddings. Give a "
        "BlenderBot of 400M or more, such as facebook/blenderbot-400M-distill"
    )


def network(where: str, config: dict[str, Any], tensors: dict[str, LazyArray]) -> BlenderbotConfig:
    """Return the network that config.json describes. Raises UserError if ours cannot compute it.

    `where` begins each error: the path of config.json.
    """
    for name, (expected, default) in FIXED.items():
        value = config.get(name, default)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value  # end tokens
        # True is 1 in Python: `scale_embedding=1` would pass for a flag.
        if type(value) is not type(expected) or value != expected:
            raise UserError(f"{where}: {name}={shown(value)}, expected {expected!r}")
    sizes: dict[str, int] = {}
    for ours, theirs in SIZES:
        found = [foreign_files.check_size(where, name, config.get(name)) for name in theirs]
        if len(set(found)) > 1:
            both = " and ".join(f"{n}={v}" for n, v in zip(theirs, found, strict=True))
            raise UserError(f"{where}: {both}, expected the same number in encoder and decoder")
        sizes[ours] = found[0]
    # Before anything is listed layer by layer: a wrong number of layers may be any number.
    for side in ("encoder", "decoder"):
        layers = sizes[f"num_{side}_layers"]
        foreign_files.check_layers(where, side, layers, tensors, f"model.{side}.layers.")
    width, heads = sizes["emb_dim"], sizes["num_heads"]
    foreign_files.check_heads(where, "d_model", width, "encoder_attention_heads", heads)
    # Building the network computes this table: a wrong size could take any amount of memory.
    table = (sizes["max_positions"], width)
    foreign_files.check_shape(where, POSITIONS, tensors.get(POSITIONS), table)
    bias = tensors.get(LOGITS_BIAS)
    return BlenderbotConfig(
        **sizes,
        dropout_rate=foreign_files.check_rate(where, "dropout", config.get("dropout", 0.1)),
        forbidden_ids=(),  # transformers gives every token a probability
        # Zeros in the published folders, and then no part of our network.
        logits_bias=bias is not None and bool(np.any(bias.whole())),
    )


def read_params(
    path: str, tensors: dict[str, LazyArray], config: BlenderbotConfig, *, allow_nonfinite: bool
) -> dict[Path, LazyArray]:
    """Return our parameters, float32, from HuggingFace's tensors.

    Raises UserError if a tensor is missing, surplus or misshapen.
    """
    found = dict(tensors)
    for name in COPIES:
        if name in found and not lazy.equal(found.pop(name), tensors.get(EMBEDDING)):
            raise UserError(f"{path}: {name} differs from {EMBEDDING}, which it should copy")
    bias = found.get(LOGITS_BIAS)
    if bias is not None and bias.shape != (1, config.vocab_size):
        raise UserError(f"{path}: {LOGITS_BIAS} is {bias.shape}, expected {(1, config.vocab_size)}")
    if not config.logits_bias:
        found.pop(LOGITS_BIAS, None)
    places = [_place(parameter) for parameter in names.parameters(config)]
    return names.gather(
        f"HuggingFace folder {path}", found, places, allow_nonfinite=allow_nonfinite
    )


def _place(parameter: names.Parameter) -> names.Place:
    """Return where a folder stores a parameter."""
    if parameter.name.huggingface == LOGITS_BIAS:
        shape = (1, *parameter.shape)
        stored = [LOGITS_BIAS]
        return names.Place(parameter, stored, shape, lambda a: lazy.reshaped(a, parameter.shape))
    return names.place(parameter, _stored(parameter))


def _stored(parameter: names.Parameter) -> list[str]:
    return parameter.in_layers(LAYER, parameter.name.huggingface)


def tensors(params: dict[Path, LazyArray], config: BlenderbotConfig) -> dict[str, LazyArray]:
    """Return HuggingFace's tensors by name, from our parameters."""
    out = names.tensors_to_write(params, config, _stored)
    shape = (1, config.vocab_size)
    bias = out.get(LOGITS_BIAS) or lazy.from_array(np.zeros(shape, np.float32))
    out[LOGITS_BIAS] = lazy.reshaped(bias, shape)
    return out


def config_json(config: BlenderbotConfig, dtype: str) -> dict[str, Any]:
    """Return config.json, with the fields that transformers 4 and 5 read."""
    return {
        "architectures": ["BlenderbotForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        **{name: expected for name, (expected, _) in FIXED.items()},
        **{name: getattr(config, ours) for ours, theirs in SIZES for name in theirs},
        "dropout": config.dropout_rate,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "init_std": 0.02,
        "is_encoder_decoder": True,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def generation_json(config: BlenderbotConfig) -> dict[str, Any]:
    """Return generation_config.json: BlenderBot's beam search, within the network's positions."""
    tokens = {name: value for name, (value, _) in FIXED.items() if name.endswith("_token_id")}
    longest = min(GENERATION["max_length"], config.max_positions)
    lengths = {"max_length": longest, "min_length": min(GENERATION["min_length"], longest)}
    # transformers' network gives these tokens a probability; so its search must leave them out.
    never = {"suppress_tokens": list(config.forbidden_ids)} if config.forbidden_ids else {}
    return {**tokens, **GENERATION, **lengths, **never}
