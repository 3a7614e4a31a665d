"""`python -m canary.prost infer`: answer every dialogue of a file."""

import argparse

from canary.cli.flags import decoding_fields
from canary.prost.cli import flags
from cosmo.engine.base import command_line
from cosmo.engine.base.command_line import Verb


def run(args: argparse.Namespace) -> None:
    """Answer the dialogues of --input, and write a line of JSON for each to --output."""
    from canary import reading
    from canary.prost.bulk_replies import ReplyJob
    from cosmo.engine.infer import answer_files, bulk

    # Flags and the input are checked first, because a model takes long to load.
    sharding = bulk.Sharding(args.num_shards, args.shards, args.window, args.overwrite)
    layout = answer_files.output_files(args.output, args.num_shards)
    source = reading.source(args.input)
    settings, canary = flags.both_settings(args, args.batch_size)
    job = ReplyJob(settings, canary, decoding_fields(args), args.seed)
    report = bulk.answer_source(job, source, layout, sharding)
    bulk.print_report(args.output, layout, report)


VERB = Verb(
    help="answer every dialogue of a file, of any size",
    description="Write a reply and the rules of thumb that it follows for every dialogue of a "
    "file. A ProsocialDialog file gives a line for each row: the answer to the row's context. A "
    "command that was stopped, even killed, continues when it is given again; records that cannot "
    "be used are set aside with the reason.",
    examples="""\
  python -m canary.prost infer --checkpoint=/tmp/prost --input=dialogues.jsonl \\
    --output=replies.jsonl
  python -m canary.prost infer --checkpoint=/tmp/prost --canary=/tmp/canary \\
    --input=prosocial.jsonl.gz --output=/tmp/replies --num_shards=8 --shards=0-3
""",
    run=run,
    flags=f"""
what is answered, and where the answers go:
--input FILE!   {{turns}} records (JSON lines), SODA rows, ProsocialDialog rows or its direct
                download, or DailyDialog's text; which it is, is found out; compressed (gz,
                bz2, xz, zst) or not
--output PATH!  FILE.jsonl, or a folder, which gets predictions-00000-of-0000N.jsonl and
                rejected.jsonl
{flags.MODEL}{flags.CANARY}
how the work is cut:
--batch_size N=32  at a time
{command_line.sharding_flags("dialogues", "about 64 batches")}
{flags.GENERATION}
""",
)
