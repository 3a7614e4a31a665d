"""Describe network and vocabulary as JSON in every checkpoint, and compare such descriptions.

Each check raises a UserError that names the first difference.
"""

# Without these checks another model's checkpoint would end in a stack trace, or load and compute
# nonsense.

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.vocabulary import Vocabulary, identity
from cosmo.engine.model import models

Path = tuple[str, ...]  # of an array in a state: ("params", "encoder", "layers", "mlp", "wo")

# Fields of a network that change results but no shape, so that comparing shapes is not enough.
# Not `forbidden_ids`: a run may start from HuggingFace's BlenderBot, which forbids none.
BEHAVIOUR = (
    "num_heads",
    "mlp_activations",
    "relative_attention_max_distance",
    "scale_decoder_outputs",
)


def describe(model: models.EncoderDecoderModel, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Return the description of a model and its vocabulary, for checks and for people to read."""
    description: dict[str, Any] = {
        "format": "cosmo",
        "network": type(model.network).__name__,
        # The whole config: a checkpoint can be opened without the gin file of its run.
        "config": dataclasses.asdict(model.network),
    }
    # Which kernel computes attention depends on the devices, and is no property of a checkpoint.
    description["config"].pop("attention", None)
    if vocabulary is not None:
        description["vocabulary"] = identity(vocabulary)
    # Through JSON and back: tuples become lists, as they are in a description that was saved.
    return json.loads(json.dumps(description))


def check_vocabulary(model: models.EncoderDecoderModel, vocabulary: Vocabulary) -> None:
    """Raise UserError unless the network can read and write the vocabulary's texts."""
    if vocabulary.size > model.network.vocab_size:
        raise UserError(
            f"vocabulary {vocabulary.path} has {vocabulary.size} pieces, the model's embedding "
            f"{model.network.vocab_size} rows",
            setting=("VOCABULARY_PATH", "VOCAB_SIZE"),
        )
    ends = model.network.special_ids.eos
    if vocabulary.eos_id != ends:
        raise UserError(
            f"vocabulary {vocabulary.path} ends a text with id {vocabulary.eos_id}, this "
            f"{type(model.network).__name__} with {ends}: T5 needs a SentencePiece model, "
            "BlenderBot a byte-level BPE",
            setting=("VOCABULARY_PATH", "MODEL"),
        )


def check_positions(model: models.EncoderDecoderModel, lengths: Mapping[str, int]) -> None:
    """Raise UserError if inputs or targets are longer than the network's positions."""
    limit = model.network.max_positions
    for feature, length in lengths.items():
        if limit is not None and length > limit:
            raise UserError(
                f"task_feature_lengths[{feature!r}]={length}; this network has {limit} positions: "
                "give at most so many",
                setting="TASK_FEATURE_LENGTHS",
            )


def check_same_vocabulary(
    where: str, saved: dict[str, Any] | None, wanted: dict[str, Any] | None
) -> None:
    """Raise UserError if the vocabulary `saved` in the checkpoint `where` is not the one `wanted`.

    Both are {"path", "fingerprint", and "size" where it is known}, or None if unknown.
    """
    # The hash alone decides: a run's copy of the file has another path, and means the same.
    if not saved or not wanted or saved["fingerprint"] == wanted["fingerprint"]:
        return
    theirs, ours = (
        v["path"] + (f" ({v['size']} pieces)" if "size" in v else "") for v in (saved, wanted)
    )
    raise UserError(
        f"vocabulary mismatch: {where} was trained with {theirs}, this run has {ours}; every "
        "token id would mean another word",
        setting="VOCABULARY_PATH",
    )


def check_network(where: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError if the networks of two descriptions have equal shapes but other results."""
    saved, wanted = saved.get("config", {}), wanted.get("config", {})

    def value(config, name):
        # None is T5Config's default: scale tied logits, do not scale others.
        if name == "scale_decoder_outputs" and config.get(name) is None:
            return config.get("logits_via_embedding")
        return config.get(name)

    for name in BEHAVIOUR:
        theirs, ours = value(saved, name), value(wanted, name)
        # A field that one side lacks is of an older or a foreign checkpoint: nothing to compare.
        if None not in (theirs, ours) and theirs != ours:
            raise UserError(
                f"{where} is of another network: {name} is {theirs} there and {ours} here",
                setting="MODEL",
            )


def check_shapes(
    where: str, saved: dict[Any, tuple[int, ...]], wanted: dict[Any, tuple[int, ...]]
) -> None:
    """Raise UserError if a wanted array is missing in the checkpoint `where` or has another shape.

    Both map an array's path to its shape. Surplus arrays in `saved` are no error here.
    """
    for path, shape in wanted.items():
        name = "/".join(path)
        if path not in saved:
            raise UserError(
                f"{where} has no {name}: it is of another model or optimizer than this gin file's"
            )
        if saved[path] != shape:
            raise UserError(
                f"{where} is of another model size: {name} is {saved[path]} there and {shape} here",
                setting="MODEL",
            )


def flat(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[Path, Any]:
    """Return {path: leaf} of a state or nested dict, in JAX's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {path_of(keys): leaf for keys, leaf in leaves}


def path_of(keys: Sequence[Any]) -> Path:
    """Return the names in a path of JAX's keys (of dicts, named tuples and lists)."""
    # One by one: a key of the optimizer's state, "encoder/layers/mlp/wo", has slashes itself.
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
