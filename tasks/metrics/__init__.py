"""Metrics of generated responses and of likelihoods, on numpy and the standard library.

The functions have the signatures of SeqIO's metric functions and return {name: float}. `f1`,
`bleu4`, `distinct` and `response_length` measure texts, `perplexity` and `token_accuracy` scores,
`label_accuracy` and `rot_overlap` Canary's texts, `word_accuracy` targets of one word.
"""

from cosmo.tasks.metrics.likelihood import perplexity, token_accuracy
from cosmo.tasks.metrics.responses import (
    bleu4,
    distinct,
    f1,
    pair_bleu4,
    pair_f1,
    response_length,
)
from cosmo.tasks.metrics.safety import label_accuracy, rot_overlap
from cosmo.tasks.metrics.words import word_accuracy

__all__ = [
    "bleu4",
    "distinct",
    "f1",
    "label_accuracy",
    "pair_bleu4",
    "pair_f1",
    "perplexity",
    "response_length",
    "rot_overlap",
    "token_accuracy",
    "word_accuracy",
]
