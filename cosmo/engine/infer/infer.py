"""Generate and score in batches. Answers come in the order of the rows."""

import dataclasses
import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import UserError
from cosmo.engine.base.vocabulary import Vocabulary
from cosmo.engine.checkpoints import any_format
from cosmo.engine.checkpoints.description import check_positions, check_vocabulary, describe
from cosmo.engine.data import datasets
from cosmo.engine.infer import batching, ctranslate2_model
from cosmo.engine.model import generate, held_params, models, partitioning
from cosmo.engine.model.choice_tree import check_choices
from cosmo.engine.model.decoding import IMPOSSIBLE, Decoded, DecodingConfig

log = logging.getLogger(__name__)

# A function that is called after every batch with its counts: see `answer`.
OnBatch = Callable[[Counter[str]], None]


@dataclasses.dataclass(frozen=True)
class Session:
    """A model ready to answer: parameters on devices, its vocabulary, the batch shape.

    `lengths` are the most tokens of "inputs" and "targets". With `bucketed`, batches are padded to
    the lengths of their rows (see `batching`), else to `lengths`. With `ctranslate2` that model
    answers, and there are no parameters on devices.
    """

    # Buckets are faster over many rows, and compile more shapes: a chat does without.

    model: models.EncoderDecoderModel
    params: held_params.AnyParams = dataclasses.field(repr=False)  # a repr would print arrays
    vocabulary: Vocabulary
    layout: partitioning.Layout
    batch_size: int
    lengths: Mapping[str, int]
    bucketed: bool = False
    ctranslate2: ctranslate2_model.Model | None = None

    def check_jax(self, what: str) -> None:
        """Raise UserError if another engine answers, for `what` needs this one."""
        if self.ctranslate2 is not None:
            raise UserError(
                f"{what} needs the backend jax, and this model is CTranslate2's: give the "
                "checkpoint that it was exported from",
                setting="BACKEND",
            )


@dataclasses.dataclass(frozen=True)
class SessionConfig:
    """The settings of a session, the same for every verb that answers.

    `checkpoint_path` is a run's folder, which means its latest checkpoint, or one of its
    checkpoints, or MODEL_DIR/best. `backend`: see `any_checkpoint.session_config`. CTranslate2
    computes `ctranslate2_batches` at a time.
    """

    model: models.EncoderDecoderModel
    vocabulary: Vocabulary
    checkpoint_path: str
    task_feature_lengths: Mapping[str, int]
    batch_size: int
    partitioner: partitioning.Partitioner = partitioning.Partitioner()
    bucketed: bool = True
    backend: str | None = None
    ctranslate2_batches: int = 1

    def __post_init__(self):
        datasets.check_lengths(self.task_feature_lengths)
        if self.batch_size < 1:
            raise UserError(
                f"batch_size={self.batch_size}; it must be at least 1",
                setting="batch_size",
            )

    def open(self) -> tuple[Session, int]:
        """Open the checkpoint. Return (a session over it, the step it was saved at)."""
        # The cheap checks come first, because restoring takes minutes.
        check_vocabulary(self.model, self.vocabulary)
        check_positions(self.model, self.task_feature_lengths)
        backend = ctranslate2_model.backend_of(self.checkpoint_path, self.backend)
        mesh = self.partitioner.mesh()
        partitioning.check_batch_size(self.batch_size, mesh, 1, "BATCH_SIZE")
        if backend != "jax":
            return self._open_ctranslate2(backend, mesh)
        # Read straight into the types that answering needs: float32 would double the peak.
        abstract = held_params.abstract_params(self.model)
        axes = models.logical_axes(self.model)
        shardings = self.partitioner.param_shardings(mesh, abstract, axes)
        step, params = any_format.restore_params(
            self.checkpoint_path, abstract, shardings, describe(self.model, self.vocabulary)
        )
        log.info("checkpoint %s at step %d", self.checkpoint_path, step)
        layout = self.partitioner.layout(mesh)
        session = Session(
            self.model,
            held_params.hold(self.model, params, layout),
            self.vocabulary,
            layout,
            self.batch_size,
            dict(self.task_feature_lengths),
            self.bucketed,
        )
        return session, step

    def _open_ctranslate2(self, backend: str, mesh: Any) -> tuple[Session, int]:
        if jax.process_count() > 1:
            raise UserError("CTranslate2 answers in one process: leave out", setting="distributed")
        wanted = describe(self.model, self.vocabulary)
        opened, step = ctranslate2_model.open_model(
            self.checkpoint_path, backend, wanted, self.ctranslate2_batches
        )
        log.info("checkpoint %s at step %d, by %s", self.checkpoint_path, step, backend)
        session = Session(
            self.model,
            {},
            self.vocabulary,
            self.partitioner.layout(mesh),
            self.batch_size,
            dict(self.task_feature_lengths),
            self.bucketed,
            opened,
        )
        return session, step


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer to a row: texts with their scores (nats; see DecodingConfig).

    `num_tokens` counts the tokens of the predictions, or of the scored targets, with EOS.
    `num_correct` counts the scored tokens that the model found likeliest. `choosing` gives the
    `scores` of the choices, in their order. `choosing_then_generating` gives them as
    `choice_scores`, with the number of the `choice` taken.
    """

    row: datasets.Row
    predictions: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    num_tokens: int = 0
    num_correct: int = 0
    choice: int | None = None
    choice_scores: tuple[float, ...] = ()


# Compiled programs are kept by value, so that sessions and calls of equal settings share them.
@functools.lru_cache(maxsize=128)
def _compiled(function: Callable, model, layout: partitioning.Layout, **fixed: Any) -> Callable:
    # The layout replicates results, so that on a pod every process holds all answers.
    return layout.jit(functools.partial(function, model, **fixed))


class Work(NamedTuple):
    """How to answer a batch: `start` sends it to the devices, `finish` reads the results."""

    start: Callable[[batching.Group], Any]
    finish: Callable[[batching.Group, Any], list[Answer]]
    targets: bool  # whether targets are read
    prefixes: bool = False  # whether prefixes are


def generation(session: Session, decoding: DecodingConfig, seed: int = 0) -> Work:
    """Return the work of generating. A sample depends on (seed, row id), not on the batch.

    Answers begin with their row's `prefix_ids`; predictions, scores and counts are of what follows.
    Where the network's positions are limited, a long prefix leaves fewer tokens to the answer.
    Raises UserError for settings that the network cannot generate with.
    """
    check_decoding(session.model, decoding)
    if session.ctranslate2 is not None:
        return _ctranslate2_generation(session.ctranslate2, session, decoding, seed)

    def start(group):
        keys, config = _row_keys(session, group, seed), decoding
        prefix = {}  # without any, the program has none
        if group.prefix_length:
            array = _prefixes(session, group)
            config = _fitting(decoding, session.model.network.max_positions, array.shape[1])
            prefix = {"prefix": array}
        run = _compiled(generate.predict, session.model, session.layout, config=config)
        return run(session.params, _inputs(session, group), row_keys=keys, **prefix)

    return Work(start, functools.partial(_texts, session), targets=False, prefixes=True)


def check_decoding(model: models.EncoderDecoderModel, decoding: DecodingConfig) -> None:
    """Raise UserError for settings that the model's network cannot generate with."""
    network = model.network
    decoding.check(network.vocab_size, network.special_ids, network.max_positions)


def _fitting(decoding: DecodingConfig, positions: int | None, prefix: int) -> DecodingConfig:
    """Return `decoding` with answers that fit the positions after a prefix."""
    room = decoding.max_new_tokens if positions is None else positions - prefix
    room = min(decoding.max_new_tokens, room)
    least = min(decoding.min_length, room - 1)
    return dataclasses.replace(decoding, max_new_tokens=room, min_length=least)


def _prefixes(session: Session, group: batching.Group) -> jax.Array:
    network = session.model.network
    for row in group.rows:
        for id in row.prefix_ids:
            if not 0 < id < network.vocab_size or id == network.special_ids.eos:
                raise UserError(
                    f"record {row.id!r}: its prefix has token {id}; a prefix has tokens 1 to "
                    f"{network.vocab_size - 1}, but not {network.special_ids.eos}, which ends texts"
                )
    length = group.prefix_length
    if network.max_positions is not None:
        # One position is left to the answer, whatever the padding.
        length = min(length, network.max_positions - 1)
    for row in group.rows:
        if len(row.prefix_ids) > length:
            raise UserError(
                f"record {row.id!r}: its prefix has {len(row.prefix_ids)} tokens and this network "
                f"{network.max_positions} positions: no answer can follow; give a shorter one"
            )
    array = np.zeros((session.batch_size, length), np.int32)
    for place, row in enumerate(group.rows):
        array[place, : len(row.prefix_ids)] = row.prefix_ids
    return _put(session, {"prefix": array})["prefix"]


def _inputs(session: Session, group: batching.Group) -> jax.Array:
    batch = datasets.make_batch(group.rows, session.batch_size, group.inputs_length, None)
    return _put(session, batch)["encoder_input_tokens"]


def _row_keys(session: Session, group: batching.Group, seed: int) -> jax.Array:
    missing = session.batch_size - len(group.rows)  # rows of padding; their answers are dropped
    seeds = [row_seed(seed, row.id) for row in group.rows] + [0] * missing
    return jax.vmap(jax.random.key)(np.array(seeds))


def _texts(session: Session, group: batching.Group, decoded: Decoded) -> list[Answer]:
    tokens_BNT, scores_BN = np.asarray(decoded.tokens), np.asarray(decoded.scores)
    answers = []
    # Not strict: rows of padding at the end of the batch have no row here.
    for row, tokens_NT, scores_N in zip(group.rows, tokens_BNT, scores_BN, strict=False):
        # A search may find fewer hypotheses than it has places.
        real_N = scores_N > IMPOSSIBLE / 10
        real_N[0] = True
        texts = tuple(session.vocabulary.decode(ids.tolist()) for ids in tokens_NT[real_N])
        count = int(np.count_nonzero(tokens_NT[real_N]))  # 0 is padding
        answers.append(Answer(row, texts, tuple(map(float, scores_N[real_N])), count))
    return answers


def choosing(session: Session, choices: Sequence[Sequence[int]]) -> Work:
    """Return the work of scoring each choice after each row's inputs: exact log-likelihoods, nats.

    Choices are token ids, ending in EOS if nothing may follow them. A softmax over the scores is
    the posterior of the choices. Raises UserError for an empty choice or two equal ones.
    """
    options = check_choices(choices, session.model.network.vocab_size)
    if session.ctranslate2 is not None:
        return _ctranslate2_choosing(session.ctranslate2, options)
    run = _compiled(generate.score_choices, session.model, session.layout, choices=options)

    def start(group):
        return run(session.params, _inputs(session, group))

    def finish(group, scores_BC):
        # Not strict, as in `_texts`: rows of padding have no row here.
        rows = zip(group.rows, np.asarray(scores_BC).tolist(), strict=False)
        return [Answer(row, scores=tuple(scores)) for row, scores in rows]

    return Work(start, finish, targets=False)


def choosing_then_generating(
    session: Session,
    choices: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    seed: int = 0,
    continues: Sequence[bool] | None = None,
) -> Work:
    """Return the work of taking each row's likeliest choice and generating after it.

    `predictions` and `scores` are of the text after the choice. `continues` has for each choice
    whether text follows; None means after choices that do not end in EOS. One encoder pass serves
    both.
    """
    options = check_choices(choices, session.model.network.vocab_size)
    # A tuple, because compiled programs are looked up by it.
    continues = None if continues is None else tuple(map(bool, continues))
    if session.ctranslate2 is not None:
        return _ctranslate2_continuing(
            session.ctranslate2, session, options, decoding, seed, continues
        )
    fixed = {"choices": options, "config": decoding, "continues": continues}
    run = _compiled(generate.choose_and_continue, session.model, session.layout, **fixed)

    def start(group):
        keys = _row_keys(session, group, seed)
        return run(session.params, _inputs(session, group), row_keys=keys)

    def finish(group, chosen):
        taken, scores_BC = np.asarray(chosen.choice).tolist(), np.asarray(chosen.scores).tolist()
        texts = _texts(session, group, chosen.continuation)
        return [
            dataclasses.replace(found, choice=choice, choice_scores=tuple(scores))
            for found, choice, scores in zip(texts, taken, scores_BC, strict=False)
        ]

    return Work(start, finish, targets=False)


class ChoiceAndText:
    """The work of `choosing_then_generating` in two calls: choices are known before any text.

    `read` sends a batch to the devices and `choices` waits for its scores. `write` then sends the
    generation after each row's choice, from the same encoder pass, and `texts` waits for it.

    Inputs are padded for `write` to the next of `write_lengths`, if any is as long. Generation
    then is a program for each of these, not for each length that is read.
    """

    def __init__(
        self,
        session: Session,
        choices: Sequence[Sequence[int]],
        decoding: DecodingConfig,
        seed: int = 0,
        write_lengths: Sequence[int] = (),
    ):
        session.check_jax("labelling for callers who wait (a guard, a server)")
        check_decoding(session.model, decoding)
        options = check_choices(choices, session.model.network.vocab_size)
        model, layout = session.model, session.layout
        self._session, self._seed = session, seed
        self._write_lengths = sorted(write_lengths)
        read = functools.partial(_compiled, generate.read_choices, model, layout, choices=options)
        self._reader = functools.cache(lambda length: read(kept_length=length))
        fixed = {"choices": options, "config": decoding}
        self._write = _compiled(generate.continue_choice, model, layout, **fixed)

    def write_length(self, length: int) -> int:
        """Return the length to which inputs of `length` tokens are padded for `write`."""
        return next((n for n in self._write_lengths if n >= length), length)

    def read(self, group: batching.Group) -> generate.Read:
        """Send the inputs of a batch; return what the other calls need of it."""
        run = self._reader(self.write_length(group.inputs_length))
        return run(self._session.params, _inputs(self._session, group))

    def choices(self, group: batching.Group, read: generate.Read) -> list[Answer]:
        """Return each row's answer with the scores of the choices."""
        rows = zip(group.rows, np.asarray(read.scores).tolist(), strict=False)
        return [Answer(row, scores=tuple(scores)) for row, scores in rows]

    def write(
        self, group: batching.Group, read: generate.Read, taken: Sequence[int | None]
    ) -> Decoded:
        """Send the generation after each row's choice, given by its number; None: no text."""
        length = self.write_length(group.inputs_length)
        inputs = _inputs(self._session, group._replace(inputs_length=length))
        missing = [None] * (self._session.batch_size - len(group.rows))
        rows = [*taken, *missing]
        arrays = {
            "choice": np.array([number or 0 for number in rows], np.int32),
            "ended": np.array([number is None for number in rows]),
        }
        put = _put(self._session, arrays)
        keys = _row_keys(self._session, group, self._seed)
        return self._write(
            self._session.params, inputs, read.layers, put["choice"], put["ended"], row_keys=keys
        )

    def texts(self, group: batching.Group, written: Decoded) -> list[Answer]:
        """Return each row's answer with the text and its score."""
        return _texts(self._session, group, written)


def scoring(session: Session) -> Work:
    """Return the work of scoring each row's targets (nats). Raises UserError if a row has none."""
    if session.ctranslate2 is not None:
        return _ctranslate2_scoring(session.ctranslate2)
    run = _compiled(generate.score, session.model, session.layout)

    def start(group):
        _check_targets(group)
        batch = datasets.make_batch(
            group.rows, session.batch_size, group.inputs_length, group.targets_length
        )
        return run(session.params, _put(session, batch))

    def finish(group, results):
        out = {name: np.asarray(values) for name, values in results.items()}
        return [
            Answer(
                row,
                scores=(float(out["score"][i]),),
                num_tokens=int(out["num_tokens"][i]),
                num_correct=int(out["num_correct"][i]),
            )
            for i, row in enumerate(group.rows)
        ]

    return Work(start, finish, targets=True)


def _check_targets(group: batching.Group) -> None:
    for row in group.rows:
        if row.target_ids is None:
            raise UserError(f"record {row.id!r} has no targets to score")


def _ctranslate2_generation(
    model: ctranslate2_model.Model, session: Session, decoding: DecodingConfig, seed: int
) -> Work:
    ctranslate2_model.check_decoding(decoding)

    def start(group):
        if group.prefix_length:
            raise UserError(
                "answers after a given prefix need the backend jax: leave out", setting="BACKEND"
            )
        return model.generate(_input_ids(group), decoding, _group_seed(seed, group))

    def finish(group, wait):
        found = zip(group.rows, wait(), strict=True)
        return [_of_generated(session, row, generated) for row, generated in found]

    return Work(start, finish, targets=False, prefixes=True)


def _ctranslate2_choosing(model: ctranslate2_model.Model, options: Sequence[Sequence[int]]) -> Work:
    # Every choice reads the inputs anew: CTranslate2 keeps no encoder's output between calls.
    def start(group):
        pairs = [(inputs, choice) for inputs in _input_ids(group) for choice in options]
        return model.log_likelihoods([i for i, _ in pairs], [choice for _, choice in pairs])

    def finish(group, wait):
        scores, count = wait(), len(options)
        return [
            Answer(row, scores=tuple(scores[place * count : (place + 1) * count]))
            for place, row in enumerate(group.rows)
        ]

    return Work(start, finish, targets=False)


def _ctranslate2_continuing(
    model: ctranslate2_model.Model,
    session: Session,
    options: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    seed: int,
    continues: Sequence[bool] | None,
) -> Work:
    ctranslate2_model.check_decoding(decoding)
    eos = session.model.network.special_ids.eos
    continues = [ids[-1] != eos for ids in options] if continues is None else continues
    choosing = _ctranslate2_choosing(model, options)

    def start(group):
        chosen = choosing.finish(group, choosing.start(group))
        taken = [found.scores.index(max(found.scores)) for found in chosen]
        inputs = _input_ids(group)
        places = [place for place, choice in enumerate(taken) if continues[choice]]
        wait = model.generate(
            [inputs[place] for place in places],
            decoding,
            _group_seed(seed, group),
            [options[taken[place]] for place in places],
        )
        return chosen, taken, places, wait

    def finish(group, started):
        chosen, taken, places, wait = started
        # A choice that nothing follows has an empty text, as the engine gives it.
        texts = [ctranslate2_model.Generated([[]], [0.0])] * len(taken)
        for place, generated in zip(places, wait(), strict=True):
            texts[place] = generated
        return [
            dataclasses.replace(
                _of_generated(session, found.row, generated),
                choice=choice,
                choice_scores=found.scores,
            )
            for found, choice, generated in zip(chosen, taken, texts, strict=True)
        ]

    return Work(start, finish, targets=False)


def _ctranslate2_scoring(model: ctranslate2_model.Model) -> Work:
    def start(group):
        _check_targets(group)
        targets = [row.target_ids[: group.targets_length] for row in group.rows]
        return targets, model.log_likelihoods(_input_ids(group), targets)

    def finish(group, started):
        targets, wait = started
        return [
            Answer(row, scores=(score,), num_tokens=len(ids))
            for row, ids, score in zip(group.rows, targets, wait(), strict=True)
        ]

    return Work(start, finish, targets=True)


def _input_ids(group: batching.Group) -> list[Sequence[int]]:
    return [row.input_ids[: group.inputs_length] for row in group.rows]


def _group_seed(seed: int, group: batching.Group) -> int:
    return row_seed(seed, "\n".join(row.id for row in group.rows))


def _of_generated(
    session: Session, row: datasets.Row, generated: ctranslate2_model.Generated
) -> Answer:
    texts = tuple(session.vocabulary.decode(ids) for ids in generated.tokens)
    count = sum(id != 0 for ids in generated.tokens for id in ids)  # 0 is padding
    return Answer(row, texts, tuple(generated.scores), count)


def answer(
    session: Session,
    rows: Sequence[datasets.Row],
    work: Work,
    on_batch: OnBatch = lambda counts: None,
) -> list[Answer]:
    """Return answers to `rows`, in order. Rows of similar length share a batch.

    `on_batch` is called for every finished batch with `batching.counts` and `new_tokens`.
    """
    answers: list[Any] = [None] * len(rows)
    groups = batching.groups(
        rows,
        session.batch_size,
        session.lengths,
        targets=work.targets,
        bucketed=session.bucketed,
        prefixes=work.prefixes,
    )
    # One batch ahead: JAX returns before the devices have finished, and reading a result waits.
    for group, sent in _one_ahead((group, work.start(group)) for group in groups):
        finished = work.finish(group, sent)
        # Groups come by length; each answer goes to the place of its row.
        for place, found in zip(group.places, finished, strict=True):
            answers[place] = found
        # Padding is counted too: a report shows what the lengths of the rows cost.
        counts = batching.counts(group, session.batch_size)
        on_batch(counts + Counter(new_tokens=sum(found.num_tokens for found in finished)))
    return answers


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield the items in order, each only after the next one was made."""
    for item in items:
        for following in items:
            yield item
            item = following
        yield item


def row_seed(seed: int, row_id: str) -> int:
    """Return a 32-bit seed for a record, the same in any batch."""
    # SHA-256, because Python's own hash of a text differs between processes.
    digest = hashlib.sha256(json_lines.encode(f"{seed}:{row_id}")).digest()
    # jax.random.key takes 32 bits.
    return int.from_bytes(digest[:4], "little")


def _put(session: Session, batch: datasets.HostBatch) -> models.Batch:
    """Put this process's share of a batch on the devices. Every process has the whole batch."""
    share = session.batch_size // jax.process_count()
    # Processes own neighbouring rows: `Partitioner.mesh` keeps a host's devices together.
    first = jax.process_index() * share
    local = {name: array[first : first + share] for name, array in batch.items()}
    return partitioning.put_batch(local, session.layout.mesh)


def record(answer: Answer, mode: str) -> dict[str, Any]:
    """Return an answer as a line of output: {id, inputs, targets, prediction, score}.

    "cut" is true in a line whose input was cut to fit the model.
    """
    line: dict[str, Any] = {
        "id": answer.row.id,
        # Inputs and targets too, so that a file of answers can be judged without its source.
        "inputs": answer.row.inputs,
        "targets": answer.row.targets,
    }
    if mode == "predict":
        line["prediction"] = answer.predictions[0]
        line["score"] = answer.scores[0]
        if len(answer.predictions) > 1:  # the best one is above, where readers of one look
            line["predictions"] = list(answer.predictions)
            line["scores"] = list(answer.scores)
    else:
        line["score"] = answer.scores[0]
        line["num_tokens"] = answer.num_tokens
    if answer.row.cut:
        line["cut"] = True
    return line
