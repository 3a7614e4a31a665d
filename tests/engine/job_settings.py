"""What tests of answering share: records without a file, and the settings of a run over them."""

import numpy as np

from cosmo.engine.checkpoints import any_format
from cosmo.engine.data import datasets
from cosmo.engine.infer import bulk, infer, record_sources


class Words:
    """A vocabulary whose texts are the ids themselves."""

    path, size, fingerprint, eos_id = "words", 40, "0", 1

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids if i > 1)


def records(count, bad=()):
    """A source of `count` records of random lengths; those in `bad` are rejected."""
    random = np.random.default_rng(3)
    items = []
    for i in range(count):
        ids = tuple(random.integers(2, 40, random.integers(1, 48)).tolist())
        row = datasets.Row(str(i), " ".join(map(str, ids)), ids, "3 4", (3, 4, 5 + i % 9, 1))
        items.append(record_sources.Rejected(i + 1, "bad", "…") if i in bad else row)

    def read(spans):
        yield from (items[span.start : span.stop] for span in spans)

    return record_sources.Source("records", count, {"count": count}, read)


def config(model, monkeypatch):
    """`config(batch_size=4, **changes)`: settings of a run over a checkpoint of step 7."""
    monkeypatch.setattr(any_format, "locate", lambda path: any_format.Located(path, 7, "cosmo"))

    def make(batch_size=4, **changes):
        lengths = {"inputs": 48, "targets": 16}
        session = infer.SessionConfig(model, Words(), "/run", lengths, batch_size)
        return bulk.InferConfig(session, **changes)

    return make
