"""What each verb does, between the command line and the engine."""

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from cosmo import chat as chat_module
from cosmo import records
from cosmo.engine import config, evaluate, infer, models, partitioning, train
from cosmo.engine.decoding import DecodingConfig
from cosmo.engine.errors import UserError
from cosmo.engine.writer import write_atomic
from tasks import formatting

log = logging.getLogger("cosmo")


def saved_config(verb: str, bindings: list[str]) -> list[str]:
    """MODEL_DIR/config.gin, for a verb that was given no gin file."""
    if verb == "train":
        raise UserError("train needs --gin_file, such as --gin_file=gin/cosmo/tiny.gin")
    values = dict(binding.split(" = ", 1) for binding in bindings)
    if "MODEL_DIR" not in values:
        raise UserError(f"{verb} needs --gin_file=FILE, or --gin.MODEL_DIR=DIR of a trained run")
    path = epath.Path(values["MODEL_DIR"].strip("'\"")) / "config.gin"
    if not path.exists():
        raise UserError(f"no {path}: give the run's --gin_file, or a MODEL_DIR that train has left")
    return [str(path)]


def run_train(args: argparse.Namespace) -> None:
    """`train`: everything comes from gin."""
    state = config.call(train.train)
    print(f"done: step {int(state.step)} in {config.query('MODEL_DIR')}")


def run_eval(args: argparse.Namespace) -> None:
    """`eval`: everything comes from gin."""
    config.call(evaluate.evaluate)


def run_infer(args: argparse.Namespace) -> None:
    """`infer`: a SeqIO mixture, or with --input plain records."""
    if not args.input:
        if args.output:
            raise UserError("--output goes with --input; for a mixture set --gin.INFER_OUTPUT_DIR")
        counts = config.call(infer.infer)
        for path, count in counts.items():
            print(f"{count} records in {path}")
        return
    if not args.output:
        raise UserError("--input needs --output=FILE")
    config.call(answer_file_settings)(args.input, args.output)


def answer_file_settings(
    *,
    model: models.EncoderDecoderModel,
    vocabulary: infer.Vocabulary,
    checkpoint_path: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    separators: formatting.Separators = formatting.Separators(),
    decoding: DecodingConfig = DecodingConfig(),
    partitioner: partitioning.Partitioner = partitioning.Partitioner(),
    mode: str = "predict",
    random_seed: int = 0,
) -> Callable[[str, str], None]:
    """The settings of `infer --input`, bound by gin; returns the function that does the work."""

    def answer_file(source: str, output: str) -> None:
        session, step = infer.open_session(
            model=model,
            vocabulary=vocabulary,
            checkpoint_path=checkpoint_path,
            task_feature_lengths=task_feature_lengths,
            batch_size=batch_size,
            partitioner=partitioner,
        )
        log.info("checkpoint %s at step %d", checkpoint_path, step)
        rejected: list[dict[str, Any]] = []
        rows = records.read_rows(
            source, vocabulary, task_feature_lengths["inputs"], separators, rejected, mode
        )
        count = infer.write_answers(
            session, rows, output, mode=mode, decoding=decoding, seed=random_seed
        )
        if jax.process_index() != 0:
            return
        print(f"{count} records answered in {output}")
        path = f"{output}.rejected.jsonl"
        epath.Path(path).unlink(missing_ok=True)  # an earlier run's
        if rejected:
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in rejected))
            print(f"{len(rejected)} records could not be used, with reasons in {path}")
        if not count:
            raise UserError(f"no record of {source} could be used")

    return answer_file


def chat_settings(
    *,
    model: models.EncoderDecoderModel,
    vocabulary: infer.Vocabulary,
    checkpoint_path: str,
    task_feature_lengths: Mapping[str, int],
    separators: formatting.Separators = formatting.Separators(),
    decoding: DecodingConfig = DecodingConfig(temperature=1.0, top_p=0.95),
    partitioner: partitioning.Partitioner = partitioning.Partitioner(),
    random_seed: int = 0,
) -> Callable[[str | None, str | None], None]:
    """The settings of `chat`, bound by gin; returns the function that talks."""

    def talk(situation: str | None, role: str | None) -> None:
        shards = partitioner.mesh().shape["data"]
        session, step = infer.open_session(
            model=model,
            vocabulary=vocabulary,
            checkpoint_path=checkpoint_path,
            task_feature_lengths=task_feature_lengths,
            batch_size=shards,
            partitioner=partitioner,
        )
        log.info("checkpoint %s at step %d", checkpoint_path, step)
        chat_module.warm_up(session, decoding)
        chat_module.chat(session, separators, decoding, random_seed, situation, role)

    return talk


def run_chat(args: argparse.Namespace) -> None:
    """`chat`: in the terminal."""
    config.call(chat_settings)(args.situation, args.role)


VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": run_train,
    "eval": run_eval,
    "infer": run_infer,
    "chat": run_chat,
}
