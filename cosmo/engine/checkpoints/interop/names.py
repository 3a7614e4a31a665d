"""Map our parameters' names to those of T5X, HuggingFace and ParlAI, as tables.

The names are those of `t5x.examples.t5.network`, of `transformers`' T5 and BlenderBot, and of
ParlAI's transformer. Matrices are [in, out] in our checkpoints and in T5X, [out, in] in the files
of HuggingFace and ParlAI.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import lazy
from cosmo.engine.checkpoints.description import Path, flat
from cosmo.engine.checkpoints.lazy import LazyArray
from cosmo.engine.model import models
from cosmo.engine.model.blenderbot import BlenderbotConfig
from cosmo.engine.model.t5 import T5Config


class Name(NamedTuple):
    """One row of a table: a parameter's name in each format, and its transform.

    T5X's name is ours with a suffix: its modules own arrays called "kernel" or "embedding".
    """

    ours: str
    t5x_suffix: str
    huggingface: str | None  # None: that format has no place for it
    transposed: bool = False  # in HuggingFace's file and in ParlAI's
    parlai: str | None = None  # None: ParlAI has no such network of its own

    @property
    def t5x(self) -> str:
        """The parameter's name in T5X."""
        return self.ours + self.t5x_suffix


T = True  # transposed
K = "/kernel"
RELATIVE = "layer.0.SelfAttention.relative_attention_bias.weight"

# Parameters of a layer. T5X's name follows `encoder/layers_3/`, HuggingFace's `encoder.block.3.`.
# A T5 has `wi` or both of `wi_0` and `wi_1`. T5X's scanned network and UMT5 have a
# relative bias in every layer.
LAYER = {
    "encoder": (
        Name("pre_attention_layer_norm/scale", "", "layer.0.layer_norm.weight"),
        Name("attention/query", K, "layer.0.SelfAttention.q.weight", T),
        Name("attention/key", K, "layer.0.SelfAttention.k.weight", T),
        Name("attention/value", K, "layer.0.SelfAttention.v.weight", T),
        Name("attention/out", K, "layer.0.SelfAttention.o.weight", T),
        Name("pre_mlp_layer_norm/scale", "", "layer.1.layer_norm.weight"),
        Name("mlp/wi", K, "layer.1.DenseReluDense.wi.weight", T),
        Name("mlp/wi_0", K, "layer.1.DenseReluDense.wi_0.weight", T),
        Name("mlp/wi_1", K, "layer.1.DenseReluDense.wi_1.weight", T),
        Name("mlp/wo", K, "layer.1.DenseReluDense.wo.weight", T),
        Name("relpos_bias/rel_embedding", "", RELATIVE, T),
    ),
    "decoder": (
        Name("pre_self_attention_layer_norm/scale", "", "layer.0.layer_norm.weight"),
        Name("self_attention/query", K, "layer.0.SelfAttention.q.weight", T),
        Name("self_attention/key", K, "layer.0.SelfAttention.k.weight", T),
        Name("self_attention/value", K, "layer.0.SelfAttention.v.weight", T),
        Name("self_attention/out", K, "layer.0.SelfAttention.o.weight", T),
        Name("pre_cross_attention_layer_norm/scale", "", "layer.1.layer_norm.weight"),
        Name("encoder_decoder_attention/query", K, "layer.1.EncDecAttention.q.weight", T),
        Name("encoder_decoder_attention/key", K, "layer.1.EncDecAttention.k.weight", T),
        Name("encoder_decoder_attention/value", K, "layer.1.EncDecAttention.v.weight", T),
        Name("encoder_decoder_attention/out", K, "layer.1.EncDecAttention.o.weight", T),
        Name("pre_mlp_layer_norm/scale", "", "layer.2.layer_norm.weight"),
        Name("mlp/wi", K, "layer.2.DenseReluDense.wi.weight", T),
        Name("mlp/wi_0", K, "layer.2.DenseReluDense.wi_0.weight", T),
        Name("mlp/wi_1", K, "layer.2.DenseReluDense.wi_1.weight", T),
        Name("mlp/wo", K, "layer.2.DenseReluDense.wo.weight", T),
        Name("relpos_bias/rel_embedding", "", RELATIVE, T),
    ),
}
BIAS = f"block.0.{RELATIVE}"
OUTSIDE = (
    Name("token_embedder", "/embedding", "shared.weight"),
    Name("encoder/relpos_bias/rel_embedding", "", f"encoder.{BIAS}", T),
    Name("decoder/relpos_bias/rel_embedding", "", f"decoder.{BIAS}", T),
    Name("encoder/encoder_norm/scale", "", "encoder.final_layer_norm.weight"),
    Name("decoder/decoder_norm/scale", "", "decoder.final_layer_norm.weight"),
    Name("decoder/logits_dense", K, "lm_head.weight", T),
)


def _linear(ours: str, huggingface: str, parlai: str) -> tuple[Name, Name]:
    """Return the names of a layer's kernel and bias."""
    return (
        Name(ours, "", f"{huggingface}.weight", T, f"{parlai}.weight"),
        Name(f"{ours}_bias", "", f"{huggingface}.bias", False, f"{parlai}.bias"),
    )


def _attention(ours: str, huggingface: str, parlai: str) -> tuple[Name, ...]:
    """Return the names of an attention's four kernels and biases."""
    letters = {"query": "q", "key": "k", "value": "v", "out": "out"}
    return tuple(
        row
        for name, letter in letters.items()
        for row in _linear(
            f"{ours}/{name}", f"{huggingface}.{letter}_proj", f"{parlai}.{letter}_lin"
        )
    )


def _norm(ours: str, huggingface: str, parlai: str) -> tuple[Name, Name]:
    """Return the names of a layer norm's scale and bias."""
    return (
        Name(f"{ours}/scale", "", f"{huggingface}.weight", False, f"{parlai}.weight"),
        Name(f"{ours}/bias", "", f"{huggingface}.bias", False, f"{parlai}.bias"),
    )


# BlenderBot's. HuggingFace's name follows `model.encoder.layers.3.`, ParlAI's `encoder.layers.3.`.
_MLP = (*_linear("mlp/wi", "fc1", "ffn.lin1"), *_linear("mlp/wo", "fc2", "ffn.lin2"))
BLENDERBOT_LAYER = {
    "encoder": (
        *_norm("pre_attention_layer_norm", "self_attn_layer_norm", "norm1"),
        *_attention("attention", "self_attn", "attention"),
        *_norm("pre_mlp_layer_norm", "final_layer_norm", "norm2"),
        *_MLP,
    ),
    "decoder": (
        *_norm("pre_self_attention_layer_norm", "self_attn_layer_norm", "norm1"),
        *_attention("self_attention", "self_attn", "self_attention"),
        *_norm("pre_cross_attention_layer_norm", "encoder_attn_layer_norm", "norm2"),
        *_attention("encoder_decoder_attention", "encoder_attn", "encoder_attention"),
        *_norm("pre_mlp_layer_norm", "final_layer_norm", "norm3"),
        *_MLP,
    ),
}


def _positions(side: str) -> Name:
    """Return the names of the table of positions of one side."""
    ours = f"{side}/position_embeddings"
    parlai = f"{side}.position_embeddings.weight"
    return Name(ours, "", f"model.{side}.embed_positions.weight", False, parlai)


BLENDERBOT_OUTSIDE = (
    Name("token_embedder", "", "model.shared.weight", False, "embeddings.weight"),
    _positions("encoder"),
    _positions("decoder"),
    *_norm("encoder/encoder_norm", "model.encoder.layer_norm", "encoder.norm_embeddings"),
    *_norm("decoder/decoder_norm", "model.decoder.layer_norm", "decoder.norm_embeddings"),
    Name("decoder/logits_bias", "", "final_logits_bias"),  # [1, V] there
)

TABLES = {T5Config: (LAYER, OUTSIDE), BlenderbotConfig: (BLENDERBOT_LAYER, BLENDERBOT_OUTSIDE)}


class Parameter(NamedTuple):
    """A parameter of a network. In a stack, shape and axes are those of one layer."""

    path: Path  # in our tree
    name: Name  # in a stack: without the side and the layer
    side: str | None  # "encoder" or "decoder" for a stack of layers
    layers: int
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    def in_layers(self, pattern: str, name: str) -> list[str]:
        """Return a format's names of the arrays of this parameter: one, or one a layer.

        `pattern` begins the name in a layer: "{side}.layers.{layer}.".
        """
        if self.side is None:
            return [name]
        return [pattern.format(side=self.side, layer=i) + name for i in range(self.layers)]


def parameters(config: models.NetworkConfig) -> list[Parameter]:
    """Return every parameter of the network that `config` describes, with its names."""
    model = models.EncoderDecoderModel(config)
    axes = flat(models.logical_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    layer, rest = TABLES[type(config)]
    outside = {name.ours: name for name in rest}
    inside = {side: {name.ours: name for name in table} for side, table in layer.items()}
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


class Place(NamedTuple):
    """Where a format stores a parameter, and the transform of one stored array to ours."""

    parameter: Parameter
    stored: list[str]  # the format's names: one, or one a layer
    shape: tuple[int, ...]  # of each stored array
    transform: Callable[[LazyArray], LazyArray] = lambda array: array


def place(parameter: Parameter, stored: list[str]) -> Place:
    """Return the place of a parameter that is `stored` [out, in] or as it is, by its name's row."""
    if parameter.name.transposed:
        return Place(parameter, stored, parameter.shape[::-1], lazy.transposed)
    return Place(parameter, stored, parameter.shape)


def tensors_to_write(
    params: dict[Path, LazyArray],
    config: models.NetworkConfig,
    stored: Callable[[Parameter], list[str]],
) -> dict[str, LazyArray]:
    """Return our parameters as HuggingFace's tensors, a layer apart, under the names `stored`."""
    out: dict[str, LazyArray] = {}
    for parameter in parameters(config):
        array = params[parameter.path]
        parts = lazy.layers(array) if parameter.side else [array]
        for name, part in zip(stored(parameter), parts, strict=True):
            out[name] = lazy.transposed(part) if parameter.name.transposed else part
    return out


def gather(
    where: str, found: dict[str, LazyArray], places: list[Place], *, allow_nonfinite: bool = False
) -> dict[Path, LazyArray]:
    """Return our parameters, float32, from the arrays `found` in the checkpoint `where`.

    Raises UserError if an array is missing, surplus or misshapen. Reading one raises UserError for
    NaN and infinity unless `allow_nonfinite`.
    """
    # Names and shapes first: nothing is read from a checkpoint that does not fit.
    _check(where, {name: place.shape for place in places for name in place.stored}, found)
    out = {}
    for parameter, stored, _, transform in places:
        arrays = [found[name] for name in stored]
        if not allow_nonfinite:
            arrays = [
                lazy.finite(array, f"{where}: {name}")
                for name, array in zip(stored, arrays, strict=True)
            ]
        parts = [transform(array) for array in arrays]
        # A stack is stored whole, or layer by layer.
        apart = parameter.side and len(parts[0].shape) == len(parameter.shape)
        out[parameter.path] = lazy.astype(lazy.stacked(parts) if apart else parts[0], np.float32)
    return out


def _check(where: str, wanted: dict[str, tuple[int, ...]], found: dict[str, LazyArray]) -> None:
    missing = sorted(wanted.keys() - found.keys())
    surplus = sorted(found.keys() - wanted.keys())
    if missing:
        # A surplus beside it is often the same tensor under another name.
        instead = f" (and has {_first_of(surplus)} instead)" if surplus else ""
        raise UserError(f"{where} lacks {_first_of(missing)}{instead}")
    if surplus:
        raise UserError(f"{where} has {_first_of(surplus)}, which this network has no place for")
    for name, shape in wanted.items():
        dtype = found[name].dtype
        # bfloat16 is not a number type of numpy's own.
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"{where}: {name} is of type {dtype}, expected floating-point numbers")
        if found[name].shape != shape:
            raise UserError(
                f"{where}: {name} is {found[name].shape}, expected {shape} by the sizes of the "
                "other tensors"
            )


def _first_of(names: list[str], count: int = 3) -> str:
    """Return the first `count` names and the number of the others, as text."""
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
