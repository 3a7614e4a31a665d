"""Run each verb: read its flags, call the engine, print the result. Loads JAX."""

import argparse
import dataclasses
import logging
import os

import jax

from cosmo import cache_view, chat, records
from cosmo.engine.base import config, saved_settings
from cosmo.engine.base.errors import UserError
from cosmo.engine.data import cache_reading, cache_writing
from cosmo.engine.infer import answer_files, bulk
from cosmo.engine.train import early_stopping, evaluate, train
from cosmo.tasks import formatting, mixtures

log = logging.getLogger(__name__)


# What the rows of a cache depend on beside lengths and vocabulary, which the engine compares.
CACHED = (
    "MIXTURE_OR_TASK_NAME",
    "MIXTURE_RATES",
    "NARRATIVE_DROPOUT",
    "INSTRUCTION_DROPOUT",
    "SEPARATOR",
    "TURN_SEPARATOR",
)


def _check_cache() -> None:
    """Raise UserError if CACHE_PATH was written with other settings than this run names."""
    path = config.query("CACHE_PATH")
    if path is None:
        return
    recipe = cache_reading.Cache(path).manifest["settings"]["recipe"]
    theirs = saved_settings.macros_in("\n".join(recipe))
    for name in CACHED:
        if name in theirs and theirs[name] != config.query(name):
            raise UserError(
                f"the cache {path} was written with {name}={theirs[name]!r}, this run says "
                f"{config.query(name)!r}: give --gin.{name} as it was, or another CACHE_PATH"
            )


def _check_tasks(*splits: str) -> None:
    """Raise DataError, before anything is compiled, if the tasks' settings or files are wrong.

    The tasks of a user's own module are known only to the reader process, which imports it.
    """
    if config.query("MIXTURE_OR_TASK_MODULE") is None:
        mixtures.check(splits, **config.call(config.registration).keywords)


def run_train(args: argparse.Namespace) -> None:
    """Run `train`; every setting comes from gin."""
    _check_cache()
    evaluates = config.query("EVAL_PERIOD") is not None
    reads = config.query("CACHE_PATH") is None
    _check_tasks(*["train"] * reads, *["validation"] * evaluates)
    state = config.call(train.train)
    step, folder = int(state.step), config.query("MODEL_DIR")
    stopping = config.call(early_stopping.StoppingConfig)
    if early_stopping.is_over(stopping, early_stopping.read_history(stopping, folder, step)):
        print(f"done: stopped early at step {step} in {folder}")
    elif step < int(config.query("TRAIN_STEPS")):
        print(f"stopped by SIGTERM: step {step} is saved in {folder}; the same command goes on")
    else:
        print(f"done: step {step} in {folder}")


def run_cache(args: argparse.Namespace) -> None:
    """Run `cache`: write a mixture's packed rows to files, or print some rows of a cache."""
    if args.show:
        cache_view.show(args.output, args.show, args.vocabulary)
        return
    if args.distributed:
        raise UserError("cache works on one machine: leave out --distributed, give --processes=N")
    _check_tasks(args.split)
    wanted = config.call(cache_writing.CacheConfig)
    wanted = dataclasses.replace(
        wanted,
        dataset=dataclasses.replace(wanted.dataset, split=args.split),
        apart=dataclasses.astuple(config.call(formatting.Separators)),
    )
    made = cache_writing.write_cache(
        wanted,
        args.output,
        epochs=args.epochs,
        processes=(os.cpu_count() or 1) if args.processes is None else args.processes,
        shards_per_epoch=args.shards_per_epoch,
        overwrite=args.overwrite,
        allow_unknown=args.allow_unknown,
        recipe=config.operative_config(),
    )
    print(cache_view.report(made))


def run_eval(args: argparse.Namespace) -> None:
    """Run `eval`; every setting comes from gin."""
    _check_tasks(config.query("EVAL_SPLIT"))
    config.call(evaluate.evaluate)


def run_infer(args: argparse.Namespace) -> None:
    """Run `infer`: answer the records of --input, or a SeqIO mixture."""
    sharding = bulk.Sharding(args.num_shards, args.shards, args.window, args.overwrite)
    if not args.input:
        given = {"output": args.output} if args.output else {}
        _check_tasks(config.query("INFER_SPLIT"))
        reports = config.call(bulk.infer_mixture, sharding=sharding, **given)
    else:
        if not args.output:
            raise UserError("--input needs --output=FILE.jsonl or --output=FOLDER")
        layout = answer_files.output_files(args.output, args.num_shards)
        asked = config.call(bulk.InferConfig)
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
        if jax.process_index() == 0:
            print(f"{where}: {report}")


def run_chat(args: argparse.Namespace) -> None:
    """Run `chat` in the terminal."""
    chat.talk(config.call(chat.ChatConfig), args.situation, args.role)
