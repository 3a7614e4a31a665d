"""Continuous batching: each request gets the answer that it would get alone.

The oracle of answers is `infer.generation`, which answers the request in a batch of its own.
"""

import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.data import datasets
from cosmo.engine.infer import batching, continuous, infer
from cosmo.engine.infer.continuous import Finished, Sampling
from cosmo.engine.model import blenderbot, held_params, models, partitioning
from cosmo.engine.model.decoding import DecodingConfig
from tests.engine import tiny_network
from tests.engine.job_settings import Words

LENGTHS = {"inputs": 70, "targets": 16}  # 70, so that there are programs of two lengths


def make_session(model, params, parts=1):
    partitioner = partitioning.Partitioner(parts)
    mesh = partitioner.mesh()
    axes = models.logical_axes(model)
    params = jax.device_put(params, partitioner.param_shardings(mesh, params, axes))
    layout = partitioner.layout(mesh)
    held = held_params.hold(model, dict(params), layout)
    return infer.Session(model, held, Words(), layout, 2, LENGTHS, bucketed=True)


@pytest.fixture(scope="module")
def session(tiny_config, make_params):
    model = models.EncoderDecoderModel(tiny_config(num_encoder_layers=1, num_decoder_layers=2))
    return make_session(model, make_params(model))


@pytest.fixture(scope="module")
def warming():
    """The calls of `on_progress` while `scheduler` warms up."""
    return []


@pytest.fixture(scope="module")
def scheduler(session, warming):
    """Three rows, warmed up."""
    made = continuous.Scheduler(session, slots=3, max_queue=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous, "PROGRESS_SECONDS", 0.01)  # report often
        made.warm_up(lambda done, total: warming.append((done, total)))
    yield made
    made.close(drain=False)


def alone(session, ids, name, **fields):
    """(tokens [N, T], scores [N]) of `infer.generation` for one request, without a batch."""
    prefix = tuple(fields.pop("prefix_ids", ()))
    row = datasets.Row(name, "", tuple(ids), prefix_ids=prefix)
    # Of one length, so that each of the settings compiles once.
    (group,) = batching.groups([row], 2, LENGTHS, targets=False, bucketed=False, prefixes=True)
    found = infer.generation(session, DecodingConfig(**fields)).start(group)
    return np.asarray(found.tokens)[0], np.asarray(found.scores)[0]


class Receiver:
    """Collects the events of one request, and says when all its samples have ended."""

    def __init__(self, samples=1, on_token=lambda: None):
        self.tokens = [[] for _ in range(samples)]
        self.ends = [None] * samples
        self.on_token = on_token
        self.ended = threading.Event()

    def __call__(self, number, event):
        assert self.ends[number] is None, "an event after the last one"
        if isinstance(event, Finished):
            self.ends[number] = event
            if all(self.ends):
                self.ended.set()
        else:
            self.tokens[number].append(event)
            self.on_token()

    def wait(self):
        assert self.ended.wait(60), "no end within a minute"
        return self


def test_programs_are_counted_up(scheduler, warming):
    done = [count for count, _ in warming]
    (total,) = {total for _, total in warming}
    assert done == sorted(done) and done[0] == 0 and done[-1] == total


def inputs(count, seed=0):
    rng = np.random.default_rng(seed)
    return [[*map(int, rng.integers(2, 40, n)), 1] for n in rng.integers(3, 69, count)]


SETTINGS = {
    "greedy": dict(max_new_tokens=12),
    "samples": dict(max_new_tokens=9, temperature=1.2, num_samples=2),
    "truncated": dict(max_new_tokens=11, temperature=0.8, top_k=12, top_p=0.9),
    "limited": dict(max_new_tokens=10, min_length=6, block_ngram=2, banned_ids=(7, 9)),
    "not_copied": dict(
        max_new_tokens=9, temperature=1.0, context_block_ngram=1, block_ngram=3, min_length=3
    ),
    "begun": dict(max_new_tokens=8, temperature=1.0, min_length=2, prefix_ids=(5, 6, 11)),
}


def check_alike(session, name, ids, fields, receiver):
    tokens_NT, scores_N = alone(session, ids, name, **fields)
    eos = session.model.network.special_ids.eos
    for found, end, wanted_T, score in zip(
        receiver.tokens, receiver.ends, tokens_NT.tolist(), scores_N, strict=True
    ):
        length = wanted_T.index(eos) + 1 if eos in wanted_T else fields["max_new_tokens"]
        assert [token.id for token in found] == wanted_T[:length]
        assert end == Finished("stop" if eos in wanted_T else "length")
        np.testing.assert_allclose(sum(t.logprob for t in found), score, rtol=1e-4, atol=1e-4)


def submit(scheduler, ids, name, fields, **named):
    fields = dict(fields)
    samples = fields.pop("num_samples", 1)
    receiver = Receiver(samples, **named)
    sampling = Sampling(seed=infer.row_seed(0, name), **fields)
    receiver.handle = scheduler.submit(ids, [sampling] * samples, receiver)
    return receiver


def test_a_request_gets_the_answer_that_it_gets_alone(session, scheduler):
    """Oracle: `infer.generation` on each request alone. All kinds share steps; nothing compiles."""
    asked = [(name, ids) for ids in inputs(3) for name in SETTINGS]
    asked = [(f"{place}", name, inputs(18)[place]) for place, (name, _) in enumerate(asked)]
    # In two waves: the second one comes while the first is being written.
    begun = threading.Event()
    first = [
        submit(scheduler, ids, id, SETTINGS[name], on_token=begun.set)
        for id, name, ids in asked[:9]
    ]
    assert begun.wait(60)
    second = [submit(scheduler, ids, id, SETTINGS[name]) for id, name, ids in asked[9:]]
    for (id, name, ids), receiver in zip(asked, [*first, *second], strict=True):
        check_alike(session, id, ids, SETTINGS[name], receiver.wait())
    assert scheduler.compilations == 0
    counts = scheduler.counts
    assert counts.active == counts.queued == 0
    # Hand calculation: 3 of the 18 requests have two samples; steps are shared.
    assert counts.requests == 18 and sum(counts.finished.values()) == 21
    assert counts.steps < counts.tokens


def test_likeliest_tokens(scheduler):
    """Oracle: the definition. A greedy token is the first of the likeliest; they are sorted."""
    receiver = submit(scheduler, [3, 4, 1], "a", dict(max_new_tokens=4, top_logprobs=5)).wait()
    for token in receiver.tokens[0]:
        assert len(token.top) == 5
        assert token.top[0] == (token.id, pytest.approx(token.logprob))
        assert sorted(token.top, key=lambda pair: -pair[1]) == list(token.top)
    plain = submit(scheduler, [3, 4, 1], "a", dict(max_new_tokens=4)).wait()
    assert [t.id for t in plain.tokens[0]] == [t.id for t in receiver.tokens[0]]
    assert all(t.top == () for t in plain.tokens[0])


LONG = dict(max_new_tokens=16, min_length=15)  # steps enough to act between them


def test_a_cancelled_sample_ends_and_its_row_is_free(session, scheduler):
    """Property: four requests for three rows; one is cancelled at its first token, the others get
    what they get alone."""
    ids = inputs(4, seed=3)
    # Called in the scheduler's thread, after `handle` was set: `held` sees to that.
    held = threading.Event()
    scheduler.run_exclusive(lambda: held.wait(60))
    left = submit(scheduler, ids[0], "0", LONG, on_token=lambda: left.handle.cancel())
    others = [submit(scheduler, ids[n], str(n), LONG) for n in (1, 2, 3)]
    held.set()
    left.wait()
    assert left.ends == [Finished("cancelled")]
    assert len(left.tokens[0]) < 15
    for number, other in zip((1, 2, 3), others, strict=True):
        check_alike(session, str(number), ids[number], LONG, other.wait())


def test_one_sample_of_a_request_is_cancelled(scheduler):
    """Property: the other sample goes on to its own length."""
    both = submit(scheduler, [5, 1], "n", {**LONG, "temperature": 1.0, "num_samples": 2})
    both.handle.cancel(0)
    both.wait()
    assert both.ends[0].reason == "cancelled" and len(both.tokens[1]) >= 15


def test_a_late_request_ends(scheduler):
    """Property: a request whose time is over before the first step gets no token."""
    receiver = Receiver()
    scheduler.submit([5, 1], [Sampling(4)], receiver, timeout=0.0)
    assert receiver.wait().ends == [Finished("deadline")] and receiver.tokens == [[]]


def test_the_queue_is_bounded(session, scheduler):
    """Property: with the thread held up, the 21st request that waits is refused; others end."""
    held = threading.Event()
    future = scheduler.run_exclusive(lambda: held.wait(60))
    waiting = [submit(scheduler, [3, 1], "q", dict(max_new_tokens=1)) for _ in range(20)]
    with pytest.raises(continuous.QueueFull):
        submit(scheduler, [3, 1], "q", dict(max_new_tokens=1))
    held.set()
    assert future.result(60) is True
    assert {w.wait().ends[0].reason for w in waiting} <= {"stop", "length"}


def test_errors_end_requests_and_not_the_thread(session, scheduler, monkeypatch):
    """Property: an error of the device ends what was being written; the next request is whole."""

    def broken(*args):
        raise RuntimeError("device lost")

    names = [name for name in scheduler._programs.names() if name[0] == "step"]
    with monkeypatch.context() as patch:
        for name in names:
            patch.setitem(scheduler._programs._compiled, name, broken)
        failed = submit(scheduler, [3, 1], "e", dict(max_new_tokens=4)).wait()
        (end,) = failed.ends
        assert end.reason == "error" and "device lost" in end.error
        patch.setitem(scheduler._programs._compiled, ("empty",), broken)
        failed = submit(scheduler, [3, 1], "e", dict(max_new_tokens=4)).wait()
        assert failed.ends[0].reason == "error"
        for name in names:
            if name[0] == "encode":
                patch.setitem(scheduler._programs._compiled, name, broken)
    with pytest.raises(ZeroDivisionError):
        scheduler.run_exclusive(lambda: 1 / 0).result(60)
    ids = inputs(1, seed=5)[0]
    check_alike(session, "5", ids, LONG, submit(scheduler, ids, "5", LONG).wait())


class Lost:
    """Results of a step that failed on the device after it was started."""

    def __array__(self, *args, **named):
        raise RuntimeError("device lost")


@pytest.mark.parametrize("kind", ["insert", "choose"])
def test_an_error_ends_every_sample_of_its_request(session, scheduler, monkeypatch, kind):
    """Property: each sample gets its end, also one that has no row yet, or none any more."""
    compiled, calls = scheduler._programs._compiled, []

    def breaks(program):
        def second(*args):
            calls.append(1)
            if kind == "insert" and len(calls) == 2:
                raise RuntimeError("device lost")
            found = program(*args)
            return (found[0], Lost()) if kind == "choose" else found

        return second

    with monkeypatch.context() as patch:
        for name in scheduler._programs.names():
            if name[0] == kind:
                patch.setitem(compiled, name, breaks(scheduler._programs.program(name, None)))
        # As many samples as rows, and as short as the steps whose results are lost.
        receiver = Receiver(scheduler.slots)
        scheduler.submit([3, 1], [Sampling(max_new_tokens=1)] * scheduler.slots, receiver)
        assert {end.reason for end in receiver.wait().ends} == {"error"}
    ids = inputs(1, seed=6)[0]
    check_alike(session, "6", ids, LONG, submit(scheduler, ids, "6", LONG).wait())


def test_a_receiver_that_fails_ends_its_request_alone(session, scheduler):
    """Property: its error reaches neither the thread nor the other request."""

    def fail():
        raise RuntimeError("event loop is closed")

    ids = inputs(2, seed=6)
    bad = submit(scheduler, ids[0], "0", LONG, on_token=fail)
    good = submit(scheduler, ids[1], "1", LONG)
    check_alike(session, "1", ids[1], LONG, good.wait())
    assert bad.wait().ends == [Finished("cancelled")]


def test_a_row_keeps_nothing_of_the_request_before(session, scheduler):
    """Property: NaN in all caches of free rows, as an overflow leaves, changes no later answer."""

    def spoil():
        pool = scheduler._pool
        layers = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), pool.layers)
        scheduler._pool = jax.device_put(
            pool._replace(layers=layers), scheduler._programs.pool_shardings
        )

    scheduler.run_exclusive(spoil).result(60)
    ids = inputs(1, seed=8)[0]
    check_alike(session, "8", ids, LONG, submit(scheduler, ids, "8", LONG).wait())


@pytest.mark.parametrize(
    "ids, sampling, message",
    [
        ([], Sampling(4), "0 tokens"),
        ([3] * 71, Sampling(4), "71 tokens"),
        ([3, 40], Sampling(4), "1 to 39"),
        ([3, 1], Sampling(17), "17 tokens"),
        ([3, 1], Sampling(14, prefix_ids=(3, 4, 5)), "17 tokens"),
        ([3, 1], Sampling(4, prefix_ids=(1,)), "prefix ids"),
        ([3, 1], Sampling(4, banned_ids=(1,)), "banned ids"),
    ],
)
def test_what_the_model_cannot_answer(scheduler, ids, sampling, message):
    """Oracle: the rules of the docstring; nothing reaches the queue."""
    with pytest.raises(UserError, match=message):
        scheduler.submit(ids, [sampling], Receiver())


@pytest.mark.parametrize(
    "field, value",
    [("temperature", float("nan")), ("top_p", 0.0), ("seed", -1), ("max_new_tokens", 0)],
)
def test_settings_out_of_range(field, value):
    """Oracle: the ranges of `DecodingConfig`, and NaN."""
    with pytest.raises(UserError, match=field):
        Sampling(**{"max_new_tokens": 4, field: value})


def test_draining(session):
    """Property: `close(drain=True)` lets what was submitted end, and refuses what comes later."""
    made = continuous.Scheduler(session, slots=3)  # shares the programs: compiles nothing
    made.warm_up()
    receivers = [submit(made, [3, 5, 1], str(n), LONG) for n in range(5)]
    made.close(drain=True)
    assert all(r.ends[0].reason in ("stop", "length") for r in receivers)
    with pytest.raises(RuntimeError, match="closed"):
        submit(made, [3, 1], "late", LONG)


def test_absolute_positions():
    """Oracle: `infer.generation`, of a BlenderBot, whose positions are rows of a table."""
    network = blenderbot.BlenderbotConfig(
        vocab_size=40,
        emb_dim=16,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        mlp_dim=24,
        max_positions=70,
        dtype="float32",
    )
    model = models.EncoderDecoderModel(network)
    params = models.init(model, jax.random.key(0))
    params["token_embedder"] *= 3.0  # else all tokens are about equally likely
    session = make_session(model, params)
    made = continuous.Scheduler(session, slots=2)
    made.warm_up()
    fields = {**SETTINGS["begun"], "min_length": 7}
    asked = [(str(n), [t for t in ids if t > 2]) for n, ids in enumerate(inputs(5))]
    receivers = [submit(made, ids, id, fields) for id, ids in asked]
    for (id, ids), receiver in zip(asked, receivers, strict=True):
        check_alike(session, id, ids, fields, receiver.wait())
    made.close(drain=True)


def on_two_devices():
    """Called in a process with two devices: one model is split over them, two are refused."""
    model = models.EncoderDecoderModel(tiny_network.config(num_decoder_layers=1))
    params = models.init(model, jax.random.key(0))
    session = make_session(model, dict(params), parts=2)
    made = continuous.Scheduler(session, slots=2)
    made.warm_up()
    fields = SETTINGS["samples"]
    for number, ids in enumerate(inputs(3)):
        receiver = submit(made, ids, str(number), fields).wait()
        check_alike(session, str(number), ids, fields, receiver)
    made.close(drain=True)
    with pytest.raises(UserError, match="2 copies"):
        continuous.Scheduler(make_session(model, dict(params)))


@pytest.mark.slow
def test_a_model_split_over_two_devices():
    """Oracle: `infer.generation` on the same two devices; a copy on each is refused."""
    code = "from tests.engine import test_engine_continuous as t; t.on_two_devices()"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
