"""`python -m canary label`: label every dialogue of a file."""

import argparse

from canary.cli import flags
from cosmo.engine.base import command_line
from cosmo.engine.base.command_line import Verb

# SODA's have 7.6 on average (Kim et al. 2023, table 2).
USUAL_TURNS = 8  # of a dialogue


def run(args: argparse.Namespace) -> None:
    """Label the dialogues of --input, and write a line of JSON for each to --output."""
    from canary import labels, reading
    from cosmo.engine.infer import answer_files, bulk

    window = args.window
    if window is None and args.per_turn:
        # Every turn is a row: fewer dialogues fill the same number of batches.
        window = bulk.PART_BATCHES * max(args.batch_size, 1) // USUAL_TURNS
    # Flags and the input are checked first, because a model takes long to load.
    sharding = bulk.Sharding(args.num_shards, args.shards, window, args.overwrite)
    layout = answer_files.output_files(args.output, args.num_shards)
    source = reading.source(args.input, whole=args.per_turn)
    settings = flags.model_settings(args, args.batch_size, args.backend)
    decoding = flags.decoding_config(args, settings)
    job = labels.LabelJob(settings, args.rots, args.per_turn, decoding, args.seed)
    report = bulk.answer_source(job, source, layout, sharding)
    bulk.print_report(args.output, layout, report)


VERB = Verb(
    help="label every dialogue of a file, of any size",
    description="Write a safety label, its probabilities and the rules of thumb that apply for "
    "every dialogue of a file. A ProsocialDialog file gives a line for each row: the dialogue "
    "up to the row's context. A command that was stopped, even killed, continues when it is "
    "given again; records that cannot be used are set aside with the reason.",
    examples="""\
  python -m canary label --checkpoint=/tmp/canary --input=dialogues.jsonl --output=labels.jsonl
  python -m canary label --checkpoint=/tmp/canary --input=soda.jsonl.gz --output=/tmp/labels \\
    --num_shards=8 --shards=0-3 --batch_size=64 --no_rots
  python -m canary label --checkpoint=/tmp/canary --input=dialogues_text.txt \\
    --output=turns.jsonl --per_turn
""",
    run=run,
    flags=f"""
what is labelled, and where the labels go:
--input FILE!   SODA rows (JSON lines, Parquet or Arrow), ProsocialDialog rows or its direct
                download, {{turns}} records (JSON lines), or DailyDialog's text; which it is,
                is found out; compressed (gz, bz2, xz, zst) or not
--output PATH!  FILE.jsonl, or a folder, which gets predictions-00000-of-0000N.jsonl and
                rejected.jsonl
--per_turn      label the dialogue as it was after each of its turns, in one line
--no_rots       labels and probabilities alone, which is several times as fast
{flags.MODEL}\
{command_line.BACKEND_FLAG.format(macro="")}
how the work is cut:
--batch_size N=32  at a time
{command_line.sharding_flags("dialogues", "about 64 batches")}
{flags.GENERATION}
""",
)
