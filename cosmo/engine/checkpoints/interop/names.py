"""What T5X and HuggingFace call our parameters: one table a part of the network.

The names are those of upstream's `t5x.examples.t5.network` and of `transformers`' T5. Kernels are
[in, out] here and in T5X, [out, in] in HuggingFace's files.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from cosmo.engine.base.errors import UserError
from cosmo.engine.model import models, t5


class Name(NamedTuple):
    """One parameter; `huggingface` is None for what that format has no place for."""

    ours: str
    t5x: str
    huggingface: str | None
    transposed: bool = False  # in HuggingFace's file


def _attention(ours: str, huggingface: str) -> tuple[Name, ...]:
    kernels = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
    return tuple(
        Name(f"{ours}/{name}", f"{ours}/{name}/kernel", f"{huggingface}.{letter}.weight", True)
        for name, letter in kernels
    )


def _norm(ours: str, huggingface: str) -> Name:
    return Name(f"{ours}/scale", f"{ours}/scale", f"{huggingface}.weight")


def _mlp(huggingface: str) -> tuple[Name, ...]:
    return tuple(
        Name(f"mlp/{name}", f"mlp/{name}/kernel", f"{huggingface}.{name}.weight", True)
        for name in ("wi", "wi_0", "wi_1", "wo")
    )


# In a layer: T5X's name follows `encoder/layers_3/`, HuggingFace's `encoder.block.3.`.
_PER_LAYER_BIAS = Name("relpos_bias/rel_embedding", "relpos_bias/rel_embedding", None)
LAYER = {
    "encoder": (
        _norm("pre_attention_layer_norm", "layer.0.layer_norm"),
        *_attention("attention", "layer.0.SelfAttention"),
        _norm("pre_mlp_layer_norm", "layer.1.layer_norm"),
        *_mlp("layer.1.DenseReluDense"),
        _PER_LAYER_BIAS,
    ),
    "decoder": (
        _norm("pre_self_attention_layer_norm", "layer.0.layer_norm"),
        *_attention("self_attention", "layer.0.SelfAttention"),
        _norm("pre_cross_attention_layer_norm", "layer.1.layer_norm"),
        *_attention("encoder_decoder_attention", "layer.1.EncDecAttention"),
        _norm("pre_mlp_layer_norm", "layer.2.layer_norm"),
        *_mlp("layer.2.DenseReluDense"),
        _PER_LAYER_BIAS,
    ),
}
_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
OUTSIDE = (
    Name("token_embedder", "token_embedder/embedding", "shared.weight"),
    Name(*["encoder/relpos_bias/rel_embedding"] * 2, f"encoder.{_BIAS}", True),
    Name(*["decoder/relpos_bias/rel_embedding"] * 2, f"decoder.{_BIAS}", True),
    _norm("encoder/encoder_norm", "encoder.final_layer_norm"),
    _norm("decoder/decoder_norm", "decoder.final_layer_norm"),
    Name("decoder/logits_dense", "decoder/logits_dense/kernel", "lm_head.weight", True),
)


class Parameter(NamedTuple):
    """A parameter that a network has: where it is kept, its shape and axes without layers."""

    path: tuple[str, ...]  # in our tree
    name: Name  # in a stack: without the side and the layer
    side: str | None  # "encoder" or "decoder" for what is stacked by layers
    layers: int
    shape: tuple[int, ...]  # of one layer
    axes: tuple[str, ...]


def parameters(config: t5.T5Config) -> list[Parameter]:
    """Every parameter of the network that `config` describes, with its names."""
    model = models.EncoderDecoderModel(config)
    axes = flat(models.logical_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    outside = {name.ours: name for name in OUTSIDE}
    inside = {side: {name.ours: name for name in names} for side, names in LAYER.items()}
    found = []
    for path, leaf in flat(models.abstract_params(model)).items():
        if path[1:2] == ("layers",):
            name = inside[path[0]]["/".join(path[2:])]
            entry = (path[0], leaf.shape[0], leaf.shape[1:], axes[path][1:])
        else:
            name = outside["/".join(path)]
            entry = (None, 1, leaf.shape, axes[path])
        found.append(Parameter(path, name, *entry))
    return found


def flat(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[tuple[str, ...], Any]:
    """The leaves of a nested dict by path, in JAX's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {tuple(str(entry.key) for entry in path): leaf for path, leaf in leaves}


def check_same(where: str, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]):
    """Raise UserError naming what is missing, surplus or misshapen in a checkpoint."""
    missing = sorted(wanted.keys() - found.keys())
    surplus = sorted(found.keys() - wanted.keys())
    if missing:
        raise UserError(f"{where} lacks {_few(missing)}" + _guess(surplus))
    if surplus:
        raise UserError(f"{where} has {_few(surplus)}, which this network has no place for")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise UserError(
                f"{where}: {name} is {tuple(found[name])}, expected {tuple(shape)} by the sizes of "
                "the other tensors"
            )


def _few(names: list[str], count: int = 3) -> str:
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def _guess(surplus: list[str]) -> str:
    return f" (and has {_few(surplus)} instead)" if surplus else ""
