"""Rows in, answers out: batched generation and scoring, streamed in input order."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from cosmo.engine import checkpoints, data, models, partitioning
from cosmo.engine.decoding import DecodingConfig
from cosmo.engine.errors import UserError
from cosmo.engine.writer import Progress, log


class Vocabulary(Protocol):
    """What the engine asks of a vocabulary; `tasks.vocabularies` has one."""

    path: str
    size: int
    fingerprint: str

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Session:
    """A model ready to answer: parameters on devices, its vocabulary, the batch shape."""

    model: models.EncoderDecoderModel
    params: models.Params
    vocabulary: Vocabulary
    mesh: Mesh
    batch_size: int
    lengths: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said to a row: texts with their scores (nats; see DecodingConfig)."""

    row: data.Row
    predictions: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    num_tokens: int = 0
    num_correct: int = 0


def describe(model: models.EncoderDecoderModel, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """What a checkpoint says of itself, for the next reader to check and for people to read."""
    description: dict[str, Any] = {
        "format": "cosmo",
        "network": type(model.network).__name__,
        "config": dataclasses.asdict(model.network),
    }
    if vocabulary is not None:
        description["vocabulary"] = {
            "path": str(vocabulary.path),
            "size": vocabulary.size,
            "fingerprint": vocabulary.fingerprint,
        }
    return json.loads(json.dumps(description))


def check_vocabulary(model: models.EncoderDecoderModel, vocabulary: Vocabulary) -> None:
    """Raise UserError if the vocabulary has pieces that the embedding has no row for."""
    if vocabulary.size > model.network.vocab_size:
        raise UserError(
            f"vocabulary {vocabulary.path} has {vocabulary.size} pieces, the model's embedding "
            f"{model.network.vocab_size} rows (gin: VOCABULARY_PATH, T5Config.vocab_size)"
        )


def open_session(
    *,
    model: models.EncoderDecoderModel,
    vocabulary: Vocabulary,
    checkpoint_path: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    partitioner: partitioning.Partitioner = partitioning.Partitioner(),
) -> tuple[Session, int]:
    """(a session over the checkpoint, the step it was saved at)."""
    check_vocabulary(model, vocabulary)
    mesh = partitioner.mesh()
    partitioning.check_batch_size(batch_size, mesh, 1, "BATCH_SIZE")
    abstract = models.abstract_params(model)
    shardings = partitioner.param_shardings(mesh, abstract, models.logical_axes(model))
    step, params = checkpoints.restore_params(
        checkpoint_path, abstract, shardings, describe(model, vocabulary)
    )
    return Session(model, params, vocabulary, mesh, batch_size, dict(task_feature_lengths)), step


@functools.lru_cache(maxsize=32)
def _predict_fn(model, decoding: DecodingConfig, mesh: Mesh):
    # Replicated results: on a pod every process then holds all answers.
    def predict(params, tokens, row_keys):
        return models.predict(model, params, tokens, decoding, row_keys)

    return jax.jit(predict, out_shardings=partitioning.replicated(mesh))


@functools.lru_cache(maxsize=32)
def _score_fn(model, mesh: Mesh):
    def score(params, batch):
        return models.score(model, params, batch)

    return jax.jit(score, out_shardings=partitioning.replicated(mesh))


def predict(
    session: Session, rows: Iterable[data.Row], decoding: DecodingConfig, seed: int = 0
) -> Iterator[Answer]:
    """Generate for each row, in order; a sample depends on (seed, row id), not on the batch."""
    run = _predict_fn(session.model, decoding, session.mesh)
    for group in data.groups(rows, session.batch_size):
        batch = data.make_batch(group, session.batch_size, session.lengths["inputs"], None)
        tokens = _put(session, batch)["encoder_input_tokens"]
        keys = jax.vmap(jax.random.key)(
            np.array([row_seed(seed, row.id) for row in group] + [0] * _missing(session, group))
        )
        decoded = run(session.params, tokens, keys)
        tokens_BNT, scores_BN = np.asarray(decoded.tokens), np.asarray(decoded.scores)
        for i, row in enumerate(group):
            texts = tuple(session.vocabulary.decode(ids.tolist()) for ids in tokens_BNT[i])
            yield Answer(row, texts, tuple(float(s) for s in scores_BN[i]))


def score(session: Session, rows: Iterable[data.Row]) -> Iterator[Answer]:
    """The log-likelihood (nats) of each row's targets, in order, with its token counts."""
    run = _score_fn(session.model, session.mesh)
    for group in data.groups(rows, session.batch_size):
        for row in group:
            if row.target_ids is None:
                raise UserError(f"record {row.id!r} has no targets to score")
        batch = data.make_batch(
            group, session.batch_size, session.lengths["inputs"], session.lengths["targets"]
        )
        out = {k: np.asarray(v) for k, v in run(session.params, _put(session, batch)).items()}
        for i, row in enumerate(group):
            yield Answer(
                row,
                scores=(float(out["score"][i]),),
                num_tokens=int(out["num_tokens"][i]),
                num_correct=int(out["num_correct"][i]),
            )


def row_seed(seed: int, row_id: str) -> int:
    """A 32-bit seed of a record's own, the same wherever and in whatever batch it is answered."""
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _missing(session: Session, group: list[data.Row]) -> int:
    return session.batch_size - len(group)


def _put(session: Session, batch: data.HostBatch) -> models.Batch:
    """This process's share of a batch that every process has built in full."""
    share = session.batch_size // jax.process_count()
    first = jax.process_index() * share
    local = {name: array[first : first + share] for name, array in batch.items()}
    return partitioning.put_batch(local, session.mesh)


def record(answer: Answer, mode: str) -> dict[str, Any]:
    """An answer as a line of output: {id, inputs, targets, prediction, score}."""
    line: dict[str, Any] = {
        "id": answer.row.id,
        "inputs": answer.row.inputs,
        "targets": answer.row.targets,
    }
    if mode == "predict":
        line["prediction"] = answer.predictions[0]
        line["score"] = answer.scores[0]
        if len(answer.predictions) > 1:
            line["predictions"] = list(answer.predictions)
            line["scores"] = list(answer.scores)
    else:
        line["score"] = answer.scores[0]
        line["num_tokens"] = answer.num_tokens
    return line


def write_answers(
    session: Session,
    rows: Iterable[data.Row],
    output: str,
    *,
    mode: str = "predict",
    decoding: DecodingConfig = DecodingConfig(),
    seed: int = 0,
    total: int | None = None,
) -> int:
    """Answer `rows` and write one JSON line each to `output`, whole or not at all; the count."""
    if mode not in ("predict", "score"):
        raise UserError(f"mode={mode!r}; it is 'predict' or 'score' (gin: MODE)")
    answers = predict(session, rows, decoding, seed) if mode == "predict" else score(session, rows)
    progress = Progress(total, unit="record")

    def answered():
        for count, answer in enumerate(answers, 1):
            progress.update(count)
            yield answer

    count = 0
    if jax.process_index() != 0:  # of several processes, all compute and the first writes
        return sum(1 for _ in answered())
    path = epath.Path(output)
    if path.is_dir():
        raise UserError(f"cannot write {output}: it is a folder")
    partial = path.parent / f".{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w") as file:
            for answer in answered():
                file.write(json.dumps(record(answer, mode), ensure_ascii=False) + "\n")
                count += 1
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    progress.finish()
    log.info("wrote %d records to %s", count, output)
    return count


def infer(
    *,
    model: models.EncoderDecoderModel,
    vocabulary: Vocabulary,
    checkpoint_path: str,
    dataset: data.DatasetConfig,
    output: str | None = None,
    mode: str = "predict",
    decoding: DecodingConfig = DecodingConfig(),
    partitioner: partitioning.Partitioner = partitioning.Partitioner(),
    num_examples: int | None = None,
    random_seed: int = 0,
) -> dict[str, int]:
    """Answer every example of a SeqIO mixture's split: `output`/TASK-predict.jsonl (or -score).

    `output` is inferences/ in the run's folder if None. Returns {file: records in it}.
    """
    output = output or f"{checkpoints.locate(checkpoint_path)[0]}/inferences"
    session, step = open_session(
        model=model,
        vocabulary=vocabulary,
        checkpoint_path=checkpoint_path,
        task_feature_lengths=dataset.task_feature_lengths,
        batch_size=dataset.batch_size,
        partitioner=partitioner,
    )
    log.info("checkpoint %s at step %d", checkpoint_path, step)
    counts = {}
    for task in data.eval_tasks(dataset, num_examples):
        path = epath.Path(output) / f"{task.name}-{mode}.jsonl"
        counts[str(path)] = write_answers(
            session,
            task.rows,
            str(path),
            mode=mode,
            decoding=decoding,
            seed=random_seed,
            total=len(task.rows),
        )
    return counts
