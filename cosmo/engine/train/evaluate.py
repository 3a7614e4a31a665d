"""Measure a model: teacher-forced over packed batches, and task by task as SeqIO defines it."""

import dataclasses
import functools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from cosmo.engine.base import json_lines
from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.folders import prepare_folder
from cosmo.engine.base.progress import Progress, heartbeat
from cosmo.engine.base.tables import text_table
from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.engine.checkpoints import any_format
from cosmo.engine.data import datasets, reader
from cosmo.engine.infer import infer
from cosmo.engine.model import losses, models, partitioning
from cosmo.engine.model.decoding import DecodingConfig

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation while training, every `period` steps (T5X's EVAL_PERIOD; None: never).

    `packed` is teacher-forced for at most `steps` batches a task (EVAL_STEPS; None: all of them).
    `generated` is scored and answered example by example, `num_examples` a task
    (EVALUATOR_NUM_EXAMPLES; None: all). Either may be None.
    """

    period: int | None = 1000
    packed: datasets.DatasetConfig | None = None
    steps: int | None = 20
    generated: datasets.DatasetConfig | None = None
    num_examples: int | None = None
    decoding: DecodingConfig = DecodingConfig()
    run_before_training: bool = False

    def open(
        self,
        model: models.EncoderDecoderModel,
        vocabulary: Vocabulary,
        layout: partitioning.Layout,
        seed: int,
    ) -> "Evaluator":
        """Return the evaluator of a run. Raises UserError for impossible settings of generation."""
        infer.check_decoding(model, self.decoding)
        return Evaluator(self, model, vocabulary, layout, seed)

    def __post_init__(self):
        # Checked here: a period of 0 would be a division by zero after the first step.
        for name, gin_name in (
            ("period", "EVAL_PERIOD"),
            ("steps", "EVAL_STEPS"),
            ("num_examples", "EVALUATOR_NUM_EXAMPLES"),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(
                    f"EvalConfig.{name}={value!r}; give 1 or more, or None", setting=gin_name
                )


# Cached by model and layout, because a new function would be compiled again at every evaluation.
@functools.lru_cache(maxsize=8)
def _loss_sums_fn(model: models.EncoderDecoderModel, layout: partitioning.Layout):
    return layout.jit(lambda params, batch: models.loss(model, params, batch)[1])


def teacher_forced(
    model: models.EncoderDecoderModel,
    params: models.Params,
    batches: dict[str, list[datasets.HostBatch]],
    layout: partitioning.Layout,
) -> dict[str, dict[str, float]]:
    """Return {task: {"loss" (nats a token), "perplexity", "accuracy"}} on `batches` by task.

    The task "all" covers the tokens of all tasks.
    """
    run = _loss_sums_fn(model, layout)
    # Sums are added over batches and divided at the end: batches differ in their real tokens.
    progress = Progress(sum(map(len, batches.values())), unit="batch", late=True)

    def measured(task: str, many: list[datasets.HostBatch]) -> Iterator[dict[str, Any]]:
        for batch in many:
            yield jax.device_get(run(params, partitioning.put_batch(batch, layout.mesh)))
            progress.add(1, f"{task}: loss")

    sums = {task: losses.total_sums(measured(task, many)) for task, many in batches.items()}
    progress.finish()
    sums["all"] = losses.total_sums(sums.values())
    return {task: losses.per_token(totals) for task, totals in sums.items()}


def judge(
    session: infer.Session,
    tasks: list[reader.EvalTask],
    decoding: DecodingConfig,
    seed: int = 0,
    keep: dict[str, list[dict[str, Any]]] | None = None,
) -> dict[str, dict[str, float]]:
    """Return {task: {metric: value}} by the tasks' own metric functions.

    If `keep` is given, it receives the answers of each task as JSON records.
    """
    results = {}
    for task in tasks:
        scores = predictions = None
        counts: dict[str, list[int]] = {}
        # Two passes, because scores are teacher-forced on the targets and predictions are not.
        if task.has_score_metrics:
            scored = _answered(session, task, infer.scoring(session), "scoring")
            scores = [answer.scores[0] for answer in scored]
            counts = {
                "num_tokens": [answer.num_tokens for answer in scored],
                "num_correct": [answer.num_correct for answer in scored],
            }
        # As in SeqIO, a task whose metrics read no predictions generates none.
        if task.has_predict_metrics:
            work = infer.generation(session, decoding, seed)
            answers = _answered(session, task, work, "generating")
            predictions = [answer.predictions[0] for answer in answers]
            if keep is not None:
                keep[task.name] = [infer.record(answer, "predict") for answer in answers]
        # In the reader's process, because the metric functions belong to SeqIO's tasks.
        results[task.name] = reader.measure(task, predictions, scores, counts)
    return results


def _answered(
    session: infer.Session, task: reader.EvalTask, work: infer.Work, doing: str
) -> list[infer.Answer]:
    """Return the answers to a task's rows, with a progress line after each batch."""
    progress = Progress(len(task.rows), unit="record", late=True)

    def on_batch(counts: Counter[str]) -> None:
        progress.add(counts["records"], f"{task.name}: {doing}")

    answers = infer.answer(session, task.rows, work, on_batch)
    progress.finish()
    return answers


@dataclasses.dataclass
class Evaluator:
    """Evaluates parameters while training. Reads each validation set once and keeps it."""

    config: EvalConfig
    model: models.EncoderDecoderModel
    vocabulary: Vocabulary
    layout: partitioning.Layout
    seed: int
    # Read at the first evaluation: a run that never gets there need not wait for them.
    packed: dict[str, list[datasets.HostBatch]] | None = None
    tasks: list[reader.EvalTask] | None = None

    def check(self) -> None:
        """Raise UserError if a validation set does not exist."""
        for dataset in (self.config.packed, self.config.generated):
            if dataset is not None:
                reader.check_split(dataset)

    def run(self, params, step: int) -> dict[str, float]:
        """Return metrics by name, and log them, a line a task.

        "eval/TASK/..." is teacher-forced over the packed validation set. "infer_eval/TASK/..." is
        measured on its first `num_examples` examples one by one. The names are T5X's.
        """
        config = self.config
        results: dict[str, dict[str, dict[str, float]]] = {}
        if config.packed is not None:
            # Read once: every evaluation of a run measures the same batches.
            if self.packed is None:
                self.packed = reader.eval_batches(
                    config.packed, num_batches=config.steps, **datasets.process_shard()
                )
            results["eval"] = teacher_forced(self.model, params, self.packed, self.layout)
        if config.generated is not None:
            # Kept as the packed sets are, so that each evaluation asks the same.
            if self.tasks is None:
                self.tasks = reader.eval_tasks(config.generated, config.num_examples)
            # The parameters that are being trained, on the devices where they are.
            session = infer.Session(
                self.model,
                params,
                self.vocabulary,
                self.layout,
                config.generated.batch_size,
                config.generated.task_feature_lengths,
            )
            results["infer_eval"] = judge(session, self.tasks, config.decoding, self.seed)
        sizes = {task.name: len(task.rows) for task in self.tasks or ()}
        for kind, tasks in results.items():
            for task, values in tasks.items():
                # A sample's metrics are not the whole split's, so the log gives its size.
                what = task if kind == "eval" else f"{task}, first {sizes[task]} examples"
                shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                log.info("step %d, %s, %s: %s", step, kind, what, shown)
        return {
            f"{kind}/{task}/{name}": value
            for kind, tasks in results.items()
            for task, values in tasks.items()
            for name, value in values.items()
        }


def table(results: dict[str, dict[str, float]]) -> str:
    """Return results as text: a row for each metric, a column for each task."""
    # In order of appearance, without repetition. A task may lack a metric that another has.
    names = list(dict.fromkeys(metric for values in results.values() for metric in values))
    rows = [["", *results]]
    for name in names:
        cells = (f"{values[name]:.4f}" if name in values else "" for values in results.values())
        rows.append([name, *cells])
    return text_table(rows)


def evaluate(
    *,
    session: infer.SessionConfig,
    dataset: datasets.DatasetConfig,
    output: str | None = None,
    decoding: DecodingConfig = DecodingConfig(),
    num_examples: int | None = None,
    random_seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Evaluate a checkpoint on every task of a mixture, print a table, and return the metrics.

    Writes `output`/metrics.json and `output`/TASK-predictions.jsonl (None: eval/ in the run's
    folder).
    """
    infer.check_decoding(session.model, decoding)
    # Beside the run, unless the checkpoint is another system's.
    output = output or any_format.results_folder(session.checkpoint_path, "eval", "EVAL_OUTPUT_DIR")
    folder = prepare_folder(output, "EVAL_OUTPUT_DIR")
    # After the folder: one that cannot be written to must cost no restoring.
    opened, step = session.open()
    tasks = reader.eval_tasks(dataset, num_examples)
    log.info(", ".join(f"{task.name}: {len(task.rows)} examples" for task in tasks))
    # Kept until all tasks are judged: the files then belong to one evaluation.
    answers: dict[str, list[dict[str, Any]]] = {}
    with heartbeat("evaluating"):
        results = judge(opened, tasks, decoding, random_seed, keep=answers)
    # Every process has all answers, and one writes them.
    if jax.process_index() == 0:
        for task, lines in answers.items():
            path = epath.Path(folder) / f"{task}-predictions.jsonl"
            write_atomic(path, json_lines.lines(lines))
        report = {"step": step, "checkpoint": str(session.checkpoint_path), "metrics": results}
        # Last: a folder with metrics.json is a finished evaluation.
        write_atomic(epath.Path(folder) / "metrics.json", json.dumps(report, indent=1) + "\n")
        print(table(results))
        print(f"written to {folder}")
    return results
