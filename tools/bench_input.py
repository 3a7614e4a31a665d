"""Time reading of training examples through SeqIO and from a cache of packed rows, in turn.

Both are read by `reader.train_batches`, as training does. Examples are the segments of the rows
that came. The corpus is the sample corpus many times over.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import tempfile
import time

from cosmo.engine.data import cache_writing, datasets, reader
from cosmo.tasks import mixtures, vocabularies
from tools.bench_rates import rate_table

COPIES = 8  # of the sample corpus
ROWS = 128  # of a batch
LENGTHS = {"inputs": 512, "targets": 128}
VOCABULARY = "tasks/sample/vocabulary.model"


def examples(batch: datasets.TrainBatch) -> int:
    """Return the number of examples in a batch of packed rows."""
    return int(batch.arrays["encoder_segment_ids"].max(axis=1).sum())


def rate(config: datasets.DatasetConfig, seconds: float) -> float:
    """Return the examples read a second."""
    batches = reader.train_batches(config)
    # Not counted, because they were read ahead.
    for _ in range(8):
        next(batches)
    count, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        count += examples(next(batches))
    elapsed = time.monotonic() - began
    # Else the reader process would keep filling this side's buffers while the next is measured.
    batches.close()
    return count / elapsed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `input`."""
    parser.description = __doc__
    parser.add_argument("--rounds", type=int, default=3, help="measurements a side, in turn (3)")
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement (15)")


def run(args: argparse.Namespace) -> None:
    """Measure both sides and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for corpus in ("soda", "prosocial"):
            text = pathlib.Path(f"tasks/sample/{corpus}/train.jsonl").read_text()
            (folder / corpus).mkdir()
            (folder / corpus / "train.jsonl").write_text(text * COPIES)

        # Not a function of this module: the reader process imports it by name.
        register = functools.partial(
            mixtures.use,
            "cosmo",
            soda_path=folder / "soda",
            prosocial_path=folder / "prosocial",
            vocabulary_path=VOCABULARY,
            rates={"soda": 3.0, "prosocial_dialog": 1.0},
            shuffle_buffer_size=2000,
        )
        live = datasets.DatasetConfig(register, LENGTHS, batch_size=ROWS)
        began = time.monotonic()
        settings = cache_writing.CacheConfig(live, vocabularies.load(VOCABULARY))
        made = cache_writing.write_cache(settings, str(folder / "rows"))
        total, seconds = made.manifest["totals"]["examples"], time.monotonic() - began
        print(f"writing the cache: {total / seconds:.0f} examples/s, one process", file=sys.stderr)
        sides = {"live SeqIO": live}
        sides["cache"] = dataclasses.replace(live, cache_path=str(folder / "rows"))
        rates: dict[str, list[float]] = {side: [] for side in sides}
        # In turn, so that a slow minute of a shared machine falls on both.
        for number in range(args.rounds):
            for side, config in sides.items():
                rates[side].append(rate(config, args.seconds))
                print(f"round {number + 1}: {side} {rates[side][-1]:.0f}", file=sys.stderr)
    print(f"training examples read, batches of {ROWS} rows of 512/128 tokens")
    print(rate_table(rates, "examples/s", "live SeqIO"))
