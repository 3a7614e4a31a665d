"""Metrics of generated responses and of likelihoods, on numpy and the standard library.

The functions have the signatures that SeqIO asks of metric functions and return a mapping from
name to float: `f1`, `bleu4`, `distinct`, `response_length` judge texts, `perplexity` and
`token_accuracy` judge scores, `label_accuracy` and `rot_overlap` judge what Canary wrote.
"""

from cosmo.tasks.metrics.likelihood import perplexity, token_accuracy
from cosmo.tasks.metrics.overlap import bleu4, f1, pair_bleu4, pair_f1
from cosmo.tasks.metrics.responses import distinct, response_length
from cosmo.tasks.metrics.safety_text import label_accuracy, rot_overlap

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
]
