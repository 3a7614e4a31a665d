"""Arrange a closed set of continuations as a tree of tokens, so that shared beginnings run once.

Every distinct proper prefix of a choice is a node. The decoder reads the nodes of all choices in
one pass, each attending to its own ancestors alone. Node 0 is the empty prefix, where the decoder
reads its start token. Suffixes: N nodes, E edges, C choices, D slots of a path.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cosmo.engine.base.errors import UserError

Choices = tuple[tuple[int, ...], ...]


class ChoiceTree(NamedTuple):
    """The tree of C choices, in numpy, as it is a constant of compiled functions.

    An edge is a token after a node; a choice is a path of edges. `path_CD` holds the nodes of each
    choice, its last one in the last slot, so that paths of different lengths end together.
    """

    tokens_N: np.ndarray  # the decoder's input at a node: its prefix's last token
    depths_N: np.ndarray  # the position of that token
    ancestors_NN: np.ndarray  # bool, [node, whether that one is on its path], itself included
    parents_E: np.ndarray
    tokens_E: np.ndarray
    on_path_EC: np.ndarray  # 1.0 where the edge belongs to the choice
    path_CD: np.ndarray
    in_path_CD: np.ndarray  # bool: false in the slots before a path begins
    last_C: np.ndarray  # each choice's last token, which is read at no node of its path


def check_choices(choices: Sequence[Sequence[int]], vocab_size: int) -> Choices:
    """Return the choices as tuples, without the zeros that pad them.

    Raises UserError if there is no choice, one is empty or repeated, or a token is out of range.
    """
    cut = tuple(tuple(int(t) for t in np.trim_zeros(np.asarray(c), "b")) for c in choices)
    if not cut:
        raise UserError("there are no choices to score")
    for place, tokens in enumerate(cut):
        if not tokens:
            raise UserError(f"choice {place} of {len(cut)} has no tokens")
        wrong = [token for token in tokens if not 0 < token < vocab_size]
        if wrong:
            raise UserError(
                f"choice {place} has token {wrong[0]}; tokens are 1 to {vocab_size - 1}, 0 only "
                "pads the end"
            )
        if tokens in cut[:place]:
            raise UserError(f"choices {cut.index(tokens)} and {place} have the same tokens")
    return cut


# Cached, because a caller scores the same set batch after batch.
@functools.lru_cache(maxsize=32)
def build_tree(choices: Choices, start: int = 0) -> ChoiceTree:
    """Return the tree of choices as `check_choices` returns them.

    `start` is the token with which the decoder starts.
    """
    # Sorted, so that the tree does not depend on the order of the choices.
    prefixes = sorted(
        {tokens[:d] for tokens in choices for d in range(len(tokens))}, key=lambda p: (len(p), p)
    )
    edges = sorted({tokens[: d + 1] for tokens in choices for d in range(len(tokens))})
    node = {prefix: place for place, prefix in enumerate(prefixes)}
    longest = max(map(len, choices))
    path_CD = np.zeros((len(choices), longest), np.int32)
    in_path_CD = np.zeros((len(choices), longest), bool)
    for place, tokens in enumerate(choices):
        path_CD[place, longest - len(tokens) :] = [node[tokens[:d]] for d in range(len(tokens))]
        in_path_CD[place, longest - len(tokens) :] = True
    return ChoiceTree(
        np.array([prefix[-1] if prefix else start for prefix in prefixes], np.int32),
        np.array([len(prefix) for prefix in prefixes], np.int32),
        np.array([[prefix[: len(above)] == above for above in prefixes] for prefix in prefixes]),
        np.array([node[edge[:-1]] for edge in edges], np.int32),
        np.array([edge[-1] for edge in edges], np.int32),
        np.array([[tokens[: len(edge)] == edge for tokens in choices] for edge in edges], float),
        path_CD,
        in_path_CD,
        np.array([tokens[-1] for tokens in choices], np.int32),
    )
