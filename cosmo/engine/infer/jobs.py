"""Answer many records into files: sharded, resumable, with progress.

`answer_source` finds the windows that are missing, answers each, and joins the shards.
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
from cosmo.engine.base.progress import Progress
from cosmo.engine.checkpoints import any_format
from cosmo.engine.checkpoints.description import describe
from cosmo.engine.data import datasets, reader
from cosmo.engine.infer import batching, infer, shards
from cosmo.engine.model.decoding import DecodingConfig

log = logging.getLogger(__name__)

# A window's records and what to tell of every finished batch (see `infer.answer`) to its lines.
Answerer = Callable[[Sequence[Any], Callable[[Counter[str]], None]], list[dict[str, Any]]]


class Job(Protocol):
    """A task for all records of a source, such as generating or labelling.

    `settings` are what the lines depend on beside the session, the input and the number of shards,
    as JSON values; the manifest keeps them.
    """

    session: infer.SessionConfig

    def settings(self) -> dict[str, Any]:
        """Return the settings that the lines depend on."""

    def answerer(self, session: infer.Session) -> Answerer:
        """Return the function from a window's records to lines."""


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """The job of generating answers (`mode` "predict") or scoring targets ("score")."""

    session: infer.SessionConfig
    mode: str = "predict"
    decoding: DecodingConfig = DecodingConfig()
    random_seed: int = 0

    def __post_init__(self):
        if self.mode not in ("predict", "score"):
            raise UserError(f"mode={self.mode!r}; it is 'predict' or 'score'", setting="MODE")

    def settings(self) -> dict[str, Any]:
        """See `Job`."""
        predicting = self.mode == "predict"
        return {
            "mode": self.mode,
            "seed": self.random_seed,
            "decoding": dataclasses.asdict(self.decoding) if predicting else None,
        }

    def answerer(self, session: infer.Session) -> Answerer:
        """See `Job`: one line of output for each row."""
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
    """How the work is divided: files, the shards of this command, records between saves.

    `chosen` is written as "0-3" or "2,5" (None: all). `window=None` is 64 batches. `overwrite`
    removes what an earlier run has left at the output.
    """

    num_shards: int = 1
    chosen: str | None = None
    window: int | None = None
    overwrite: bool = False

    def __post_init__(self):
        shards.parse(self.chosen, self.num_shards)  # a mistake is said before any work
        if self.window is not None and self.window < 1:
            raise UserError(f"window={self.window}; it must be at least 1 record", setting="window")
        if self.overwrite and self.chosen is not None:
            raise UserError(
                "overwriting removes the work of all shards: do it without a choice of shards, or "
                "give another output",
                setting=("overwrite", "shards", "output"),
            )


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a run: records now in its shards; totals and seconds of this command.

    `totals` are those of `infer.answer`; they are empty if everything was done before.
    """

    answered: int
    rejected: int
    totals: Counter[str]
    seconds: float
    cut: int = 0  # answered from an input that had lost its beginning

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
    config: Job,
    source: shards.Source,
    layout: shards.Layout,
    sharding: Sharding = Sharding(),
    open_session: Callable[[], tuple[infer.Session, int]] | None = None,
) -> Report:
    """Answer the records of `source` that no earlier run has answered, into the files of `layout`.

    A finished window is never computed again, and the model is opened (by `open_session`, or from
    `config`) only if one is missing. Of several JAX processes all compute and the first reads and
    writes files. Raises UserError if the settings are not those that the output was begun with, or
    if no record could be used.
    """
    chosen = shards.parse(sharding.chosen, sharding.num_shards)
    settings = _settings(config, source, sharding.num_shards)
    window, windows, todo = _plan(config, source, layout, sharding, chosen, settings)
    session = None
    if todo:
        session, step = (open_session or config.session.open)()
        if step != settings["checkpoint"]["step"]:
            raise UserError(
                f"{config.session.checkpoint_path} has a newer checkpoint since this command "
                "began; name one, MODEL_DIR/checkpoints/STEP"
            )
        log.info("%d of %d windows of %d records to do", len(todo), len(windows), window)
    writes = jax.process_index() == 0
    if writes:
        shards.begin(layout, settings, window, overwrite=sharding.overwrite)

    def assemble(shard: int) -> None:
        shards.check(layout, settings)
        shards.assemble(layout, shard, [span for span in windows if span.shard == shard])

    progress = _Progress(todo)
    last_of = {span.shard: span for span in todo}
    try:
        for span, lines, rejects in _answered(config, session, source, todo, progress):
            if writes:
                shards.write_part(layout, span, lines, rejects)
                if span == last_of[span.shard]:
                    assemble(span.shard)
            progress.window(span)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{progress.windows} of {len(todo)} windows were finished and are kept; the same "
            "command goes on from there"
        ) from None
    finally:
        progress.bar.finish()
    done: Counter[str] = Counter()
    if writes:
        for shard in chosen:
            assemble(shard)  # what a killed command left to do
        done = shards.finish(layout, chosen)
        if windows and not done["answered"]:
            where = (
                f"the reasons are in {layout.rejected}"
                if done["rejected"]
                else "all lines are blank"
            )
            raise UserError(f"no record of {source.name} could be used; {where}")
    seconds = time.monotonic() - progress.began
    return Report(done["answered"], done["rejected"], progress.totals, seconds, done["cut"])


def _settings(config: Job, source: shards.Source, num_shards: int) -> dict[str, Any]:
    """Return every setting that answers depend on, for the manifest; batch size is none."""
    session = config.session
    found = any_format.locate(session.checkpoint_path)
    path = str(epath.Path(found.folder).resolve())
    return {
        "input": source.identity,
        "num_shards": num_shards,
        **config.settings(),
        "checkpoint": {"path": path, "step": found.step, "format": found.format},
        "task_feature_lengths": dict(session.task_feature_lengths),
        "model": describe(session.model, session.vocabulary),
    }


def _plan(
    config: Job,
    source: shards.Source,
    layout: shards.Layout,
    sharding: Sharding,
    chosen: list[int],
    settings: dict[str, Any],
) -> tuple[int, list[shards.Span], list[shards.Span]]:
    """Return (records a window, all windows of the chosen shards, those still to do)."""
    first = jax.process_index() == 0
    window = sharding.window or infer.WINDOW_BATCHES * config.session.batch_size
    if first and sharding.overwrite:
        shards.check_writable(layout)
    elif first:
        window = shards.prepare(layout, settings, window)
    window = int(_of_the_first(np.int32(window)))
    windows = shards.spans(source.count, sharding.num_shards, window, chosen)
    missing = [True] * len(windows)
    if first and not sharding.overwrite:
        missing = shards.missing(layout, windows)
    missing = _of_the_first(np.array(missing, bool))
    return window, windows, [windows[i] for i in np.flatnonzero(missing)]


def _of_the_first(value: Any) -> Any:
    """Return the first JAX process's value: the others may not see the output's folder."""
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value)


def _answered(
    config: Job,
    session: infer.Session | None,
    source: shards.Source,
    todo: list[shards.Span],
    progress: "_Progress",
) -> Iterator[tuple[shards.Span, list[dict[str, Any]], list[shards.Rejected]]]:
    """Yield each window with its lines and its rejects; the next window is read ahead."""
    if not todo:
        return
    answer = config.answerer(session)
    windows = source.read(todo)
    items = next(windows)  # by this thread: what reading imports is imported before there are two
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        for span in todo:
            following = ahead.submit(next, windows, None)
            records = [item for item in items if not isinstance(item, shards.Rejected)]
            rejects = [item for item in items if isinstance(item, shards.Rejected)]
            yield span, answer(records, progress.batches(span, len(records))), rejects
            items = following.result()


class _Progress:
    """Count and log the progress of this command."""

    def __init__(self, todo: list[shards.Span]):
        self.bar = Progress(sum(span.stop - span.start for span in todo), unit="record")
        self.totals: Counter[str] = Counter()
        self.began = time.monotonic()
        self.windows = self.done = 0

    def batches(self, span: shards.Span, records: int) -> Callable[[Counter[str]], None]:
        """Return the callback for finished batches of a window with `records` to answer.

        A place of the source may hold several of them, or none: what is answered counts as its
        share of the window.
        """
        answered = 0

        def told(counts: Counter[str]) -> None:
            nonlocal answered
            self.totals.update(counts)
            answered += counts["records"]
            share = (span.stop - span.start) * answered // max(records, 1)
            note = _speed(self.totals, time.monotonic() - self.began)
            self.bar.update(self.done + share, f"({note})")

        return told

    def window(self, span: shards.Span) -> None:
        self.windows += 1
        self.done += span.stop - span.start  # rejected ones too


def infer_mixture(
    *,
    config: InferConfig,
    dataset: datasets.DatasetConfig,
    output: str | None = None,
    num_examples: int | None = None,
    sharding: Sharding = Sharding(),
) -> dict[str, Report]:
    """Answer every example of a SeqIO mixture's split, one run a task. Return {output: report}.

    Writes `output`/TASK-predict.jsonl (or -score), or TASK-predict-00000-of-0000N.jsonl; None is
    inferences/ in the run's folder.
    """
    path = config.session.checkpoint_path
    output = output or any_format.results_folder(path, "inferences", "INFER_OUTPUT_DIR")
    open_session = functools.cache(config.session.open)
    reports = {}
    for task in reader.eval_tasks(dataset, num_examples):
        name = f"{task.name}-{config.mode}"
        layout = shards.task_layout(output, name, sharding.num_shards)
        where = layout.shards[0] if sharding.num_shards == 1 else f"{output}/{name}-*.jsonl"
        source = shards.rows_source(task.name, task.rows)
        reports[str(where)] = answer_source(config, source, layout, sharding, open_session)
    return reports
