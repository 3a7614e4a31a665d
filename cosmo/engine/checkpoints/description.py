"""The description that every checkpoint carries: its network and its vocabulary, as JSON."""

import dataclasses
import json
from typing import Any

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.engine.model import models

# Fields of a network's config that change what it computes, but no shape.
BEHAVIOUR = (
    "num_heads",
    "mlp_activations",
    "relative_attention_max_distance",
    "scale_decoder_outputs",
)


def describe(model: models.EncoderDecoderModel, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """What a checkpoint says of itself, for the next reader to check and for people to read."""
    description: dict[str, Any] = {
        "format": "cosmo",
        "network": type(model.network).__name__,
        "config": dataclasses.asdict(model.network),
    }
    if vocabulary is not None:
        description["vocabulary"] = {
            "path": str(vocabulary.path),
            "size": vocabulary.size,
            "fingerprint": vocabulary.fingerprint,
        }
    return json.loads(json.dumps(description))


def check_vocabulary(model: models.EncoderDecoderModel, vocabulary: Vocabulary) -> None:
    """Raise UserError if the vocabulary has pieces that the embedding has no row for."""
    if vocabulary.size > model.network.vocab_size:
        raise UserError(
            f"vocabulary {vocabulary.path} has {vocabulary.size} pieces, the model's embedding "
            f"{model.network.vocab_size} rows",
            setting=("VOCABULARY_PATH", "t5.T5Config.vocab_size"),
        )


def check_network(where: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError if two descriptions of a network with equal shapes compute differently."""
    saved, wanted = saved.get("config", {}), wanted.get("config", {})

    def value(config, name):
        # T5Config's default: tied logits are scaled, others are not.
        if name == "scale_decoder_outputs" and config.get(name) is None:
            return config.get("logits_via_embedding")
        return config.get(name)

    for name in BEHAVIOUR:
        theirs, ours = value(saved, name), value(wanted, name)
        if None not in (theirs, ours) and theirs != ours:
            raise UserError(
                f"checkpoint {where} is of another network: {name} is {theirs} there and {ours} "
                "here",
                setting="MODEL",
            )
