"""`python -m cosmo infer`: answer records, or a SeqIO mixture, as JSON lines."""

import argparse

from cosmo.cli import settings
from cosmo.engine.base import command_line
from cosmo.engine.base.command_line import Verb
from cosmo.engine.base.errors import UserError


def run(args: argparse.Namespace) -> None:
    """Answer the records of --input, or a SeqIO mixture; print a report for each output."""
    import jax

    from cosmo import records
    from cosmo.engine.base import config
    from cosmo.engine.infer import answer_files, bulk
    from cosmo.tasks import formatting

    # First, because mistakes in flags cost nothing to find.
    sharding = bulk.Sharding(args.num_shards, args.shards, args.window, args.overwrite)
    if not args.input:
        # An argument given wins over gin's: only a flag that was given may do so.
        given = {"output": args.output} if args.output else {}
        # Before the model is opened, which takes minutes.
        settings.check_tasks(config.query("INFER_SPLIT"))
        reports = config.call(bulk.infer_mixture, sharding=sharding, **given)
    else:
        if not args.output:
            raise UserError("--input needs --output=FILE.jsonl or --output=FOLDER")
        layout = answer_files.output_files(args.output, args.num_shards)
        asked = config.call(bulk.InferConfig)
        # Read and checked here, before the model is opened.
        source = records.source(
            args.input,
            asked.session.vocabulary,
            asked.session.task_feature_lengths["inputs"],
            config.call(formatting.Separators),
            asked.mode,
        )
        reports = {args.output: bulk.answer_source(asked, source, layout, sharding)}
        if reports[args.output].rejected and jax.process_index() == 0:
            print(f"rejected records, with reasons: {layout.rejected}")
    for where, report in reports.items():
        if jax.process_index() == 0:  # every process has the same report
            print(f"{where}: {report}")


VERB = Verb(
    help="answer records (--input), or a SeqIO mixture's examples, as JSON lines",
    description="Answer records, or score their responses. A command that was stopped, even "
    "killed, continues when it is given again; a finished one prints its report again.",
    examples="""\
  python -m cosmo infer --gin.MODEL_DIR=/tmp/run --input=records.jsonl --output=answers.jsonl
  python -m cosmo infer --gin.MODEL_DIR=/tmp/run --input=records.jsonl.gz --output=answers \\
    --num_shards=8 --shards=0-3 --batch_size=64 --temperature=1.0 --top_p=0.95 --seed=1
  python -m cosmo infer --gin.MODEL_DIR=/tmp/run --mode=score
""",
    run=run,
    flags=f"""
what is answered, and where the answers go:
--input FILE   JSON lines of {{narrative, instruction, turns}}, all but turns optional, also
               id and response; compressed (gz, bz2, xz, zst) or not. Without it the SeqIO
               mixture's examples are answered
--output PATH  FILE.jsonl, or a folder, which gets predictions-00000-of-0000N.jsonl and
               rejected.jsonl; without --input a folder (default: inferences/ in the run's
               folder)
--mode MODE -> MODE  predict (default), or score: the log-likelihood of the responses
how the work is cut:
{command_line.sharding_flags("records", "64 batches")}
--batch_size N:int -> INFER_BATCH_SIZE  records at a time (32)
{command_line.BACKEND_FLAG.format(macro=" -> BACKEND")}generation (greedy by default):
--max_new_tokens N:int -> MAX_NEW_TOKENS  longest answer in tokens (128)
--temperature T:float -> TEMPERATURE  above 0, sample (0.0: the likeliest token)
--top_k K:int -> TOP_K  sample from the K likeliest tokens (0: from all)
--top_p P:float -> TOP_P  sample from the likeliest tokens of mass P (1.0)
--num_samples N:int -> NUM_SAMPLES  sampled answers to each record (1)
--beam_size N:int -> BEAM_SIZE  above 1, search with so many beams (1)
--length_penalty A:float -> LENGTH_PENALTY  above 0, beams favour length (0.6)
--beam_search t5x|parlai|huggingface -> BEAM_SEARCH  whose beam search (t5x)
--min_length N:int -> MIN_LENGTH  tokens before an answer may end (0)
--block_ngram N:int -> BLOCK_NGRAM  no N tokens in a row twice in an answer (0: off)
--context_block_ngram N:int -> CONTEXT_BLOCK_NGRAM  no N tokens in a row of the input (0: off)
--banned_ids IDS:ints -> BANNED_IDS  tokens that no answer has, such as 3,8004
--seed N:int -> RANDOM_SEED  a sample depends on it and on the record's id (0)
""",
    gin_file="gin/runs/infer.gin",
    saved_settings=True,
    # With --input no task is read, so a run's module of tasks need not be trusted.
    reads_tasks=lambda args: not args.input,
)
