"""Lexical diversity that does not depend on a text's length: MTLD."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+")
_TYPE_TOKEN_RATIO = 0.72  # where the ratio of a running text levels out, by its authors
_MIN_FACTOR_TOKENS = 10


def words(text: str) -> list[str]:
    """Return the tokens for `mtld`: lower-case runs of letters and digits; "don't" is two."""
    return _WORD.findall(text.lower())


def mtld(tokens: Sequence[str]) -> float | None:
    """Return the measure of textual lexical diversity: mean tokens until the words begin to repeat.

    McCarthy and Jarvis 2010: a text is cut wherever the ratio of different tokens to tokens since
    the last cut falls below 0.72. MTLD is its length over the number of pieces ("factors"), the
    mean of reading it forwards and backwards. The end of the text is the part of a factor that its
    ratio has come towards 0.72.

    None for a text in which no token occurs twice, because its number of factors is 0.
    """
    # The numbers are those of the package lexical-diversity 0.1.1: a piece has at least 10 tokens,
    # and the last token always belongs to the end.
    if len(set(tokens)) == len(tokens):
        return None
    return (_one_way(tokens) + _one_way(tokens[::-1])) / 2


def _one_way(tokens: Sequence[str]) -> float:
    factors, seen, length = 0.0, set(), 0
    for token in tokens[:-1]:
        seen.add(token)
        length += 1
        if length >= _MIN_FACTOR_TOKENS and len(seen) < _TYPE_TOKEN_RATIO * length:
            factors, seen, length = factors + 1, set(), 0
    seen.add(tokens[-1])
    factors += (1 - len(seen) / (length + 1)) / (1 - _TYPE_TOKEN_RATIO)
    return len(tokens) / factors
