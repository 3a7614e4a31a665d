"""Answer many records into files: sharded, resumable, with progress.

`answer_source` finds the parts that are missing, answers each, and joins the shards.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.progress import Progress, heartbeat
from cosmo.engine.checkpoints import any_format
from cosmo.engine.checkpoints.description import describe
from cosmo.engine.data import datasets, reader
from cosmo.engine.infer import answer_files, batching, ctranslate2_model, infer, record_sources
from cosmo.engine.model.decoding import DecodingConfig

log = logging.getLogger(__name__)

# Batches of a part, which is what a kill can cost. A part's rows are sorted by length. The last
# batch of each length is seldom full, which costs little over so many.
PART_BATCHES = 64

# A function of a part's records, and of a callback for every finished batch (see `infer.answer`),
# that returns the lines of output.
Answerer = Callable[[Sequence[Any], infer.OnBatch], list[dict[str, Any]]]


class BulkRun(Protocol):
    """The work on all records of a source, such as generating or labelling."""

    session: infer.SessionConfig

    def settings(self) -> dict[str, Any]:
        """Return what the lines depend on beside session, input and shards, as JSON values."""

    def answerer(self, session: infer.Session) -> Answerer:
        """Return the function from a part's records to lines."""


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """The bulk run that generates answers (`mode` "predict") or scores targets ("score")."""

    session: infer.SessionConfig
    mode: str = "predict"
    decoding: DecodingConfig = DecodingConfig()
    random_seed: int = 0

    def __post_init__(self):
        if self.mode not in ("predict", "score"):
            raise UserError(f"mode={self.mode!r}; it is 'predict' or 'score'", setting="MODE")
        if self.mode == "predict":
            infer.check_decoding(self.session.model, self.decoding)
            if self.session.backend in ctranslate2_model.DTYPES:
                ctranslate2_model.check_decoding(self.decoding)

    def settings(self) -> dict[str, Any]:
        """Return the mode, and with it the seed and the settings of generation."""
        predicting = self.mode == "predict"
        return {
            "mode": self.mode,
            "seed": self.random_seed,
            # A score depends on no decoding, so its flags must not keep a run from continuing.
            "decoding": self.decoding.settings() if predicting else None,
        }

    def answerer(self, session: infer.Session) -> Answerer:
        """Return the function from rows to lines, one for each row."""
        if self.mode == "predict":
            work = infer.generation(session, self.decoding, self.random_seed)
        else:
            work = infer.scoring(session)

        def lines(rows, on_batch):
            answers = infer.answer(session, rows, work, on_batch)
            return [infer.record(answer, self.mode) for answer in answers]

        return lines


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How the work is divided: into shards (files), of which this command takes the `chosen`.

    `chosen` is written as "0-3" or "2,5"; None is all. A part of `part_size` records is saved at
    once; None is 64 batches. `overwrite` removes the files of an earlier run.
    """

    num_shards: int = 1
    chosen: str | None = None
    part_size: int | None = None
    overwrite: bool = False

    def __post_init__(self):
        answer_files.parse_shards(self.chosen, self.num_shards)  # finds a mistake before any work
        if self.part_size is not None and self.part_size < 1:
            raise UserError(
                f"window={self.part_size}; it must be at least 1 record", setting="window"
            )
        if self.overwrite and self.chosen is not None:
            raise UserError(
                "overwriting removes all shards: do it without a choice of shards, or give another "
                "output",
                setting=("overwrite", "shards", "output"),
            )


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a run: the records in its shards, and this command's totals and seconds.

    `totals` are those of `infer.answer`. They are empty if everything was done before.
    """

    answered: int
    rejected: int
    totals: Counter[str]
    seconds: float
    cut: int = 0  # records answered from an input that was cut to fit the model

    def __str__(self) -> str:
        here = self.totals["records"]
        text = f"{self.answered} records answered, {self.rejected} rejected"
        text += f", {self.cut} from an input that was cut to fit" if self.cut else ""
        if not here:
            return f"complete: {text}"
        rate = here / max(self.seconds, 1e-9)
        speed = _speed(self.totals, self.seconds)
        return f"{text}; now {here} in {self.seconds:.0f} s: {rate:.1f} records/s, {speed}"


def _speed(totals: Counter[str], seconds: float) -> str:
    tokens = totals["new_tokens"] / max(seconds, 1e-9)
    generated = f"{tokens:.0f} new tokens/s, " if tokens else ""
    return f"{generated}{batching.padding(totals):.0%} padding"


def answer_source(
    config: BulkRun,
    source: record_sources.Source,
    files: answer_files.OutputFiles,
    sharding: Sharding = Sharding(),
    open_session: Callable[[], tuple[infer.Session, int]] | None = None,
) -> Report:
    """Answer the records of `source` that no earlier run has answered, into `files`.

    A finished part is never computed again. The model is opened (by `open_session`, or from
    `config`) only if a part is missing. Raises UserError if the output was begun with other
    settings, or if no record could be used.
    """
    # Several JAX processes all compute. The first one decides what is missing, and writes.
    chosen = answer_files.parse_shards(sharding.chosen, sharding.num_shards)
    settings = _settings(config, source, sharding.num_shards)
    part_size, spans, todo = _find_missing(config, source, files, sharding, chosen, settings)
    session = None
    if todo:
        session, step = (open_session or config.session.open)()
        # A run that still trains may have saved since its latest checkpoint was looked up.
        if step != settings["checkpoint"]["step"]:
            raise UserError(
                f"{config.session.checkpoint_path} has a newer checkpoint since this command "
                "began; name one, MODEL_DIR/checkpoints/STEP"
            )
        log.info(
            "%d of %d parts to do, each of %d records at most", len(todo), len(spans), part_size
        )
    writes = jax.process_index() == 0
    if writes:
        # Not before: a checkpoint that cannot be opened must leave an earlier output as it was.
        answer_files.begin(files, settings, part_size, overwrite=sharding.overwrite)

    def assemble(shard: int) -> None:
        answer_files.check_settings(files, settings)
        answer_files.assemble(files, shard, [span for span in spans if span.shard == shard])

    began = time.monotonic()
    totals: Counter[str] = Counter()
    bar = Progress(sum(span.stop - span.start for span in todo), unit="record", late=True)
    parts_done = records_done = answered = 0

    def on_batch(counts: Counter[str]) -> None:
        nonlocal answered
        totals.update(counts)
        answered += counts["records"]
        # A number of the source may have several records or none, so the answered ones count as
        # their share of the span.
        share = (span.stop - span.start) * answered // max(len(records), 1)
        bar.update(records_done + share, f"({_speed(totals, time.monotonic() - began)})")

    # A shard is joined as soon as its last part is there: it can be used while others are not.
    last_of = {span.shard: span for span in todo}
    try:
        answer = config.answerer(session) if todo else None
        for span, records, rejects in _read_ahead(source, todo):
            answered = 0
            with heartbeat("answering"):
                lines = answer(records, on_batch)
            if writes:
                answer_files.write_part(files, span, lines, rejects)
                if span == last_of[span.shard]:
                    assemble(span.shard)
            parts_done += 1
            records_done += span.stop - span.start
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{parts_done} of {len(todo)} parts were finished and are kept; the same command "
            "continues"
        ) from None
    finally:
        bar.finish()
    counts: Counter[str] = Counter()
    if writes:
        for shard in chosen:
            assemble(shard)  # a killed command may have left parts that are not joined
        counts = answer_files.finish(files, chosen)
        if spans and not counts["answered"]:
            where = "all lines are blank"
            if counts["rejected"]:
                where = f"the reasons are in {files.rejected}"
            raise UserError(f"no record of {source.name} could be used; {where}")
    return Report(
        counts["answered"], counts["rejected"], totals, time.monotonic() - began, counts["cut"]
    )


def print_report(output: str, files: answer_files.OutputFiles, report: Report) -> None:
    """Print the report of a run into `output`, and where its rejected records are."""
    if jax.process_index() == 0:  # every process has the same report
        if report.rejected:
            print(f"rejected records, with reasons: {files.rejected}")
        print(f"{output}: {report}")


def _settings(config: BulkRun, source: record_sources.Source, num_shards: int) -> dict[str, Any]:
    """Return every setting that answers depend on, for the manifest."""
    # Not the batch size: a row's padded length depends on its own length alone.
    session = config.session
    backend = ctranslate2_model.backend_of(session.checkpoint_path, session.backend)
    return {
        "input": source.identity,
        "num_shards": num_shards,
        **config.settings(),
        "checkpoint": checkpoint_identity(session.checkpoint_path),
        "task_feature_lengths": dict(session.task_feature_lengths),
        "model": describe(session.model, session.vocabulary),
        # Only where it differs, so that an older output can be continued.
        **({} if backend == "jax" else {"backend": backend}),
    }


def checkpoint_identity(path: str) -> dict[str, Any]:
    """Return {path, step, format} of a checkpoint, for a manifest."""
    found = any_format.locate(path)  # by step: a folder's latest changes
    folder = str(epath.Path(found.folder).resolve())
    return {"path": folder, "step": found.step, "format": found.format}


def _find_missing(
    config: BulkRun,
    source: record_sources.Source,
    files: answer_files.OutputFiles,
    sharding: Sharding,
    chosen: list[int],
    settings: dict[str, Any],
) -> tuple[int, list[record_sources.Span], list[record_sources.Span]]:
    """Return (records of a part, all spans of the chosen shards, those that are missing)."""
    first = jax.process_index() == 0
    part_size = sharding.part_size or PART_BATCHES * config.session.batch_size
    if first:
        part_size = answer_files.prepare(files, settings, part_size, overwrite=sharding.overwrite)
    # Parts of another size would not fit those that are finished, so an earlier run's size stays.
    part_size = int(_of_the_first(np.int32(part_size)))
    spans = answer_files.part_spans(source.count, sharding.num_shards, part_size, chosen)
    missing = [True] * len(spans)
    if first and not sharding.overwrite:
        missing = answer_files.missing(files, spans)
    missing = _of_the_first(np.array(missing, bool))
    return part_size, spans, [spans[i] for i in np.flatnonzero(missing)]


def _of_the_first(value: Any) -> Any:
    """Return the first JAX process's value: the others may not see the output's folder."""
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value)


def _read_ahead(
    source: record_sources.Source, todo: list[record_sources.Span]
) -> Iterator[tuple[record_sources.Span, list[Any], list[record_sources.Rejected]]]:
    """Yield each span with its records and its rejected ones, while the next span is read."""
    if not todo:
        return
    spans = source.read(todo)
    items = next(spans)  # by this thread: what reading imports is imported before there are two
    # One thread: a source yields its spans in order.
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        for span in todo:
            following = ahead.submit(next, spans, None)
            rejects = [item for item in items if isinstance(item, record_sources.Rejected)]
            records = [item for item in items if not isinstance(item, record_sources.Rejected)]
            yield span, records, rejects
            items = following.result()


def infer_mixture(
    *,
    config: InferConfig,
    dataset: datasets.DatasetConfig,
    output: str | None = None,
    num_examples: int | None = None,
    sharding: Sharding = Sharding(),
) -> dict[str, Report]:
    """Answer every example of a SeqIO mixture's split, one run a task. Return {output: report}.

    The files are `output`/TASK-predict.jsonl (or -score), or TASK-predict-00000-of-0000N.jsonl.
    `output=None` is inferences/ in the run's folder.
    """
    path = config.session.checkpoint_path
    output = output or any_format.results_folder(path, "inferences", "INFER_OUTPUT_DIR")
    open_session = functools.cache(config.session.open)  # one session for all tasks
    reports = {}
    # A run a task, because each has its own files and its own progress to resume.
    for task in reader.eval_tasks(dataset, num_examples):
        name = f"{task.name}-{config.mode}"
        files = answer_files.task_files(output, name, sharding.num_shards)
        where = files.shards[0] if sharding.num_shards == 1 else f"{output}/{name}-*.jsonl"
        source = record_sources.rows_source(task.name, task.rows)
        reports[str(where)] = answer_source(config, source, files, sharding, open_session)
    return reports
