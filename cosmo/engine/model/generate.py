"""Generate answers, or score a closed set of them, as pure functions of (model, params, inputs).

One encoder pass serves all of them. `decoding` has the loop, `choice_tree` the tree of a set.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cosmo.engine.model import decoding, held_params, models
from cosmo.engine.model.choice_tree import ChoiceTree, build_tree, check_choices


def predict(
    model: models.EncoderDecoderModel,
    params: held_params.AnyParams,
    encoder_input_tokens: jax.Array,
    config: decoding.DecodingConfig,
    row_keys: jax.Array | None = None,
    prefix: jax.Array | None = None,
    context: jax.Array | None = None,
) -> decoding.Decoded:
    """Return the tokens generated for each row of `encoder_input_tokens` [B, S].

    `row_keys` [B] are one random key a row, so that an answer does not depend on its batch.
    `prefix` [B, D] are tokens with which answers begin; the result has those after them.
    `context` [B, S'] are the tokens whose n-grams `context_block_ngram` blocks, by default the
    inputs: give the whole dialogue where inputs are cut. See `decoding.decode`.
    """
    special = model.network.special_ids
    config.check(model.network.vocab_size, special, None)
    module, weights = held_params.decoding_module(model, params)
    forced = 0 if prefix is None else prefix.shape[1]
    cache = module.start_cache(encoder_input_tokens, forced + config.max_new_tokens)

    def step(tokens, index, cache):
        return module.decode_step(weights, tokens, index, cache)

    return decoding.decode(
        step,
        cache,
        encoder_input_tokens.shape[0],
        config,
        row_keys,
        special=special,
        prefix_BD=prefix,
        context_BS=encoder_input_tokens if context is None else context,
    )


def score(
    model: models.EncoderDecoderModel, params: held_params.AnyParams, batch: models.Batch
) -> dict[str, jax.Array]:
    """Return what `models.score` does, of parameters that may be held for inference."""
    return models.score(model, held_params.plain(model, params), batch)


def score_choices(
    model: models.EncoderDecoderModel,
    params: held_params.AnyParams,
    encoder_input_tokens: jax.Array,
    choices: Sequence[Sequence[int]],
) -> jax.Array:
    """Return the log-likelihood in nats of each of C choices after each input: float32 [B, C].

    It equals `models.score` for targets of exactly these tokens, so a choice that is a whole answer
    must end in EOS. `choices` are constants of the compiled function: tokens, padded with 0 or not.
    Raises UserError as `check_choices` does.
    """
    # An input is encoded once, and beginnings that choices share are decoded once.
    return read_choices(model, params, encoder_input_tokens, choices).scores


def _choice_scores(logits_BNV: jax.Array, tree: ChoiceTree) -> jax.Array:
    # A choice's score is a sum over its edges; an edge is scored once for all choices that have it.
    log_z_BN = jax.nn.logsumexp(logits_BNV, axis=-1)
    edges_BE = logits_BNV[:, tree.parents_E, tree.tokens_E] - log_z_BN[:, tree.parents_E]
    return jnp.sum(edges_BE[:, :, None] * tree.on_path_EC.astype(np.float32), axis=1)


class Read(NamedTuple):
    """The choices' log-likelihoods, float32 [B, C] in nats, and what `continue_choice` needs."""

    scores: jax.Array
    layers: list[Any]  # keys and values of the tree's nodes and of the inputs


class Chosen(NamedTuple):
    """A choice and the text after it.

    `scores` float32 [B, C] are the choices' log-likelihoods in nats; `choice` int32 [B] is the best
    one. The scores of `continuation` count its own tokens alone.
    """

    scores: jax.Array
    choice: jax.Array
    continuation: decoding.Decoded


def choose_and_continue(
    model: models.EncoderDecoderModel,
    params: held_params.AnyParams,
    encoder_input_tokens: jax.Array,
    choices: Sequence[Sequence[int]],
    config: decoding.DecodingConfig,
    row_keys: jax.Array | None = None,
    continues: Sequence[bool] | None = None,
) -> Chosen:
    """Score the choices as `score_choices` does, take the best one, and generate the text after it.

    After a choice whose `continues` is False (by default: one that ends in EOS) the text is empty
    and its score 0. The limits of `config` are on that text alone, whose n-grams include the
    choice's last token.
    """
    tree = _tree(model, choices)
    # EOS ends an answer, so nothing can follow it.
    if continues is None:
        continues = tree.last_C != model.network.special_ids.eos
    elif len(continues) != len(tree.last_C):
        raise ValueError(f"{len(continues)} values of `continues` for {len(tree.last_C)} choices")
    scores_BC, layers = read_choices(model, params, encoder_input_tokens, choices)
    choice_B = _likeliest(scores_BC)
    ended_B = ~jnp.asarray(continues, bool)[choice_B]
    found = continue_choice(
        model,
        params,
        encoder_input_tokens,
        layers,
        choice_B,
        ended_B,
        choices=choices,
        config=config,
        row_keys=row_keys,
    )
    return Chosen(scores_BC, choice_B, found)


def _tree(model: models.EncoderDecoderModel, choices: Sequence[Sequence[int]]) -> ChoiceTree:
    network = model.network
    return build_tree(check_choices(choices, network.vocab_size), network.special_ids.start)


def read_choices(
    model: models.EncoderDecoderModel,
    params: held_params.AnyParams,
    encoder_input_tokens: jax.Array,
    choices: Sequence[Sequence[int]],
    kept_length: int | None = None,
) -> Read:
    """Score the choices as `score_choices` does, and keep what generating after one needs.

    The inputs' keys and values are padded to `kept_length` tokens, by default to their own length.
    """
    tree = _tree(model, choices)
    module, weights = held_params.decoding_module(model, params)
    logits_BNV, layers = module.read_tree(weights, encoder_input_tokens, tree)
    length = encoder_input_tokens.shape[1]
    more = (kept_length or length) - length
    return Read(_choice_scores(logits_BNV, tree), [layer.pad_inputs(more) for layer in layers])


def continue_choice(
    model: models.EncoderDecoderModel,
    params: held_params.AnyParams,
    encoder_input_tokens: jax.Array,
    layers: list[Any],
    choice_B: jax.Array,
    ended_B: jax.Array,
    *,
    choices: Sequence[Sequence[int]],
    config: decoding.DecodingConfig,
    row_keys: jax.Array | None = None,
) -> decoding.Decoded:
    """Generate the text after each row's choice, from the `layers` that `read_choices` returned.

    Rows of which `ended_B` holds get an empty text of score 0. The limits are those of
    `choose_and_continue`.
    """
    special, tree = model.network.special_ids, _tree(model, choices)
    config.check(model.network.vocab_size, special, None)
    module, weights = held_params.decoding_module(model, params)
    path_BD, in_path_BD = (
        jnp.asarray(tree.path_CD)[choice_B],
        jnp.asarray(tree.in_path_CD)[choice_B],
    )
    # The path of the choice becomes the cache, so its tokens are not decoded again.
    cache = module.resume(layers, encoder_input_tokens, path_BD, in_path_BD, config.max_new_tokens)
    begin = path_BD.shape[1]

    def step(tokens, index, cache):
        # Positions 0 to begin - 1 hold the choice's path.
        return module.decode_step(weights, tokens, begin + index, cache)

    return decoding.decode(
        step,
        cache,
        encoder_input_tokens.shape[0],
        config,
        row_keys,
        first_B=jnp.asarray(tree.last_C)[choice_B],
        ended_B=ended_B,
        special=special,
        context_BS=encoder_input_tokens,
    )


def _likeliest(scores_BC: jax.Array) -> jax.Array:
    # A function of its own, so that tests can take every choice.
    return jnp.argmax(scores_BC, axis=-1).astype(jnp.int32)
