"""Measuring a model: teacher-forced over packed batches, and task by task as SeqIO defines it."""

import dataclasses
import functools
import inspect
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.writer import Progress, log, prepare_folder, write_atomic
from cosmo.engine.checkpoints import any_format
from cosmo.engine.data import data
from cosmo.engine.infer import infer
from cosmo.engine.model import metrics, models, partitioning
from cosmo.engine.model.decoding import DecodingConfig


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is evaluated while training, every `period` steps (T5X's EVAL_PERIOD; None: never).

    `packed` is teacher-forced for at most `steps` batches a task (EVAL_STEPS; None: all of them).
    `generated` is scored and answered example by example, `num_examples` a task
    (EVALUATOR_NUM_EXAMPLES; None: all). Either may be None.
    """

    period: int | None = 1000
    packed: data.DatasetConfig | None = None
    steps: int | None = 20
    generated: data.DatasetConfig | None = None
    num_examples: int | None = None
    decoding: DecodingConfig = DecodingConfig()
    run_before_training: bool = False

    def __post_init__(self):
        for name, gin_name in (
            ("period", "EVAL_PERIOD"),
            ("steps", "EVAL_STEPS"),
            ("num_examples", "EVALUATOR_NUM_EXAMPLES"),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(
                    f"EvalConfig.{name}={value!r}; give 1 or more, or None (gin: {gin_name})"
                )


@functools.lru_cache(maxsize=8)
def _loss_sums_fn(model: models.EncoderDecoderModel, layout: partitioning.Layout):
    return layout.jit(lambda params, batch: models.loss(model, params, batch)[1])


def teacher_forced(
    model: models.EncoderDecoderModel,
    params: models.Params,
    batches: dict[str, list[data.HostBatch]],
    layout: partitioning.Layout,
) -> dict[str, dict[str, float]]:
    """{task: loss (nats a token), perplexity, accuracy}, and "all" over the tokens of all tasks."""
    run = _loss_sums_fn(model, layout)
    sums = {
        task: metrics.total(
            jax.device_get(run(params, partitioning.put_batch(batch, layout.mesh)))
            for batch in many
        )
        for task, many in batches.items()
    }
    sums["all"] = metrics.total(sums.values())
    return {task: metrics.language_model(totals) for task, totals in sums.items()}


def judge(
    session: infer.Session,
    tasks: list[data.EvalTask],
    decoding: DecodingConfig,
    seed: int = 0,
    keep: dict[str, list[dict[str, Any]]] | None = None,
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} by the tasks' own metric functions; `keep` receives the answers."""
    results = {}
    for task in tasks:
        targets = [task.postprocess(row.targets, row, is_target=True) for row in task.rows]
        values: dict[str, float] = {}
        if task.score_metric_fns:
            scored = list(infer.score(session, task.rows))
            counts = {
                "num_tokens": [answer.num_tokens for answer in scored],
                "num_correct": [answer.num_correct for answer in scored],
            }
            scores = [answer.scores[0] for answer in scored]
            for metric in task.score_metric_fns:
                # SeqIO's plain form has two parameters; a third is for numbers of tokens.
                counted = len(inspect.signature(metric).parameters) > 2
                values.update(metric(targets, scores, *([counts] if counted else [])))
        if task.predict_metric_fns:
            progress = Progress(len(task.rows), unit="record")
            answers = []
            for answer in infer.predict(session, task.rows, decoding, seed):
                answers.append(answer)
                progress.update(len(answers), f"{task.name}: generating")
            progress.finish()
            predictions = [
                task.postprocess(answer.predictions[0], answer.row, is_target=False)
                for answer in answers
            ]
            for metric in task.predict_metric_fns:
                values.update(metric(targets, predictions))
            if keep is not None:
                keep[task.name] = [infer.record(answer, "predict") for answer in answers]
        results[task.name] = {name: float(np.asarray(value)) for name, value in values.items()}
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """Results as text: a row a metric, a column a task."""
    names = list(dict.fromkeys(metric for values in results.values() for metric in values))
    width = max([len(name) for name in names] + [6])
    columns = [max(len(task), 10) for task in results]
    head = " " * width + "".join(f"  {t:>{w}}" for t, w in zip(results, columns, strict=True))
    lines = [head]
    for name in names:
        cells = (
            f"  {values[name]:>{w}.4f}" if name in values else f"  {'':>{w}}"
            for values, w in zip(results.values(), columns, strict=True)
        )
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def evaluate(
    *,
    session: infer.SessionConfig,
    dataset: data.DatasetConfig,
    output: str | None = None,
    decoding: DecodingConfig = DecodingConfig(),
    num_examples: int | None = None,
    random_seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Evaluate a checkpoint on every task of a mixture; print a table.

    Writes `output`/metrics.json and `output`/TASK-predictions.jsonl (None: eval/ in the run's
    folder), and returns the metrics.
    """
    output = output or any_format.results_folder(
        session.checkpoint_path, "eval", "--gin.EVAL_OUTPUT_DIR"
    )
    folder = prepare_folder(output, "EVAL_OUTPUT_DIR")
    opened, step = session.open()
    tasks = data.eval_tasks(dataset, num_examples)
    counts = ", ".join(f"{task.name}: {len(task.rows)} examples" for task in tasks)
    log.info("%s", counts)
    answers: dict[str, list[dict[str, Any]]] = {}
    results = judge(opened, tasks, decoding, random_seed, keep=answers)
    if jax.process_index() == 0:
        for task, lines in answers.items():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomic(epath.Path(folder) / f"{task}-predictions.jsonl", text)
        report = {"step": step, "checkpoint": str(session.checkpoint_path), "metrics": results}
        write_atomic(epath.Path(folder) / "metrics.json", json.dumps(report, indent=1) + "\n")
        print(table(results))
        print(f"written to {folder}")
    return results
