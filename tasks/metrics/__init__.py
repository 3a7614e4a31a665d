"""Metrics of generated responses and of likelihoods, on numpy and the standard library.

The functions have the signatures that SeqIO asks of metric functions and return a mapping from
name to float: `f1`, `bleu4`, `distinct`, `response_length` judge texts, `perplexity` and
`token_accuracy` judge scores.
"""

from tasks.metrics.likelihood import perplexity, token_accuracy
from tasks.metrics.overlap import bleu4, f1, pair_bleu4, pair_f1
from tasks.metrics.responses import distinct, response_length

__all__ = [
    "bleu4",
    "distinct",
    "f1",
    "pair_bleu4",
    "pair_f1",
    "perplexity",
    "response_length",
    "token_accuracy",
]
