"""`python -m cosmo cache`: write a cache of packed rows, or print rows of one."""

import argparse
import dataclasses
from typing import Any

from cosmo.cli import settings
from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.worker_processes import usable_cores


def run(args: argparse.Namespace) -> None:
    """Write a mixture's packed rows to files, or print some rows of a cache."""
    from cosmo.engine.base import config
    from cosmo.engine.data import cache_writing
    from cosmo.tasks import formatting

    # No settings are loaded for this: see `takes_settings` below.
    if args.show:
        show(args.output, args.show, args.vocabulary)
        return
    # The worker processes share the shards; processes of JAX would all write the same ones.
    if args.distributed:
        raise UserError("cache works on one machine: leave out --distributed, give --processes=N")
    # A missing file is found here, before TensorFlow loads.
    settings.check_tasks(args.split)
    wanted = config.call(cache_writing.CacheConfig)
    wanted = dataclasses.replace(
        wanted,
        # The run file has training's split.
        dataset=dataclasses.replace(wanted.dataset, split=args.split),
        # Unknown separators in every example would hide whether the vocabulary knows the text.
        apart=dataclasses.astuple(config.call(formatting.Separators)),
    )
    made = cache_writing.write_cache(
        wanted,
        args.output,
        epochs=args.epochs,
        # Preprocessing keeps about a core busy in each.
        processes=usable_cores() if args.processes is None else args.processes,
        shards_per_epoch=args.shards_per_epoch,
        overwrite=args.overwrite,
        allow_unknown=args.allow_unknown,
        recipe=config.operative_config(),
    )
    print(report(made))


def report(cache: Any) -> str:
    """Return a summary of a finished cache, a line for each task."""
    lines = [f"{cache.path}: {cache}"]
    for name, entry in cache.manifest["tasks"].items():
        lines.append(
            f"  {name}: {entry['cached']['examples']:,} examples ({entry['times']:.4g} times an "
            f"epoch), {entry['unknown_share']:.2%} of its pieces unknown"
        )
    return "\n".join(lines)


def show(path: str, rows: str, vocabulary_path: str | None = None) -> None:
    """Print the ids and texts of the examples in `rows` ("0,17") of a cache."""
    from cosmo.engine.data.cache_reading import Cache
    from cosmo.tasks import vocabularies

    cache = Cache(path)
    known = cache.manifest["vocabulary"]
    vocabulary = vocabularies.load(vocabulary_path or known["path"])
    # By its pieces: the file may have been moved, and ids of another one mean other words.
    if vocabulary.fingerprint != known["fingerprint"]:
        raise UserError(
            f"{vocabulary.path} is not the vocabulary of {path}; give it with --vocabulary=FILE"
        )
    for text in rows.split(","):
        if not text.strip().isdigit() or int(text) >= cache.rows:
            raise UserError(f"--show={rows}: {text!r} is no row; there are 0 to {cache.rows - 1}")
        number = int(text)
        (record,) = cache.records([number])
        batch = cache.format.features(cache.format.decode([record]))
        # Where the row is stored, for a look at the file itself.
        shard, position = cache.place(number)
        print(f"row {number} ({shard['file']}, record {position}, epoch {shard['epoch']})")
        sides = {
            "inputs": (batch["encoder_input_tokens"], batch.get("encoder_segment_ids")),
            "targets": (batch["decoder_target_tokens"], batch.get("decoder_segment_ids")),
        }
        # Segments are numbered from 1, because 0 is padding.
        for segment, name in enumerate(cache.format.names(record), 1):
            print(f"  {segment}. {name or '(no id)'}")
            for label, (tokens, segments) in sides.items():
                # A row that is not packed has no segments: all of it is the one example.
                ids = tokens[0] if segments is None else tokens[0][segments[0] == segment]
                print(f"     {label}: {vocabulary.decode(ids)}")


VERB = Verb(
    help="write a mixture's packed rows to files, to train from without SeqIO",
    description="Run a mixture through SeqIO and write its packed rows to files. Training from "
    "them (--gin.CACHE_PATH) reads many times faster, in a globally shuffled order, continues "
    "at the very row after a stop, and needs no TensorFlow (with EVAL_PERIOD=None). A command "
    "that was stopped, even killed, continues when it is given again; a finished one checks the "
    "files, and replaces damaged ones.",
    examples="""\
  python -m cosmo cache --gin_file=gin/cosmo/tiny.gin --output=/tmp/rows --epochs=10
  python -m cosmo cache --gin_file=gin/cosmo/cosmo_3b.gin --output=/data/cosmo_rows --epochs=4 \\
    --processes=32 --gin.SODA_PATH=data/soda --gin.PROSOCIAL_PATH=data/prosocial_dialog
  python -m cosmo cache --output=/tmp/rows --show=0,17
""",
    run=run,
    flags="""
--output DIR!      the cache: train's --gin.CACHE_PATH
--epochs N=1       times through the mixture, each with other drops and neighbours
--split NAME=train  which split
--processes N:int  at once (as many as cores)
--shards_per_epoch N:int  files an epoch, which is what a kill can cost and processes can
                   share (by size, 1 to 16); the rows depend on it, unlike on --processes
--allow_unknown    cache text of which more than 1% of the pieces are unknown to the
                   vocabulary
--overwrite        remove the cache that is there
looking at a cache (no --gin_file is needed):
--show ROW[,ROW...]  print the examples of these rows, from 0
--vocabulary FILE    if it is no longer where it was (--show)
""",
    gin_file="gin/runs/cache.gin",
    takes_settings=lambda args: not args.show,
)
