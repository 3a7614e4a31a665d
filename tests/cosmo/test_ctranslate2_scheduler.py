"""The scheduler over CTranslate2. The oracle of answers is one call of its own for each request."""

import dataclasses
import threading
import types

import pytest

from cosmo.engine.base.errors import QueueFull, UserError
from cosmo.engine.infer import any_checkpoint, ctranslate2_scheduler, infer
from cosmo.engine.infer.continuous import Finished, Sampling
from cosmo.engine.model.decoding import DecodingConfig
from cosmo.tasks import vocabularies
from tests.cosmo.serve_parts import write_model

pytest.importorskip("ctranslate2", reason="CTranslate2 is in the extra ct2")

LENGTHS = {"inputs": 64, "targets": 24}
NATS_ERROR = 1e-3  # of an answer: batches of other lengths add in another order
LONG = dict(max_new_tokens=24, min_length=23)  # steps enough to act between them


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> infer.Session:
    """A tiny T5 of random weights, by CTranslate2, two batches at a time."""
    config, _ = any_checkpoint.session_config(
        str(write_model(tmp_path_factory.mktemp("tiny"))),
        vocabularies.load,
        usual_lengths=LENGTHS,
        batch_size=1,
        backend="ctranslate2",
    )
    return dataclasses.replace(config, ctranslate2_batches=2).open()[0]


@pytest.fixture
def scheduler(session):
    made = ctranslate2_scheduler.Scheduler(session, slots=4, max_queue=5)
    made.warm_up()
    yield made
    made.close(drain=False)


class Receiver:
    """Collects the events of one request."""

    def __init__(self, samples=1, on_token=lambda: None):
        self.tokens = [[] for _ in range(samples)]
        self.ends = [None] * samples
        self.on_token = on_token
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self, number, event):
        assert self.ends[number] is None, "an event after the last one"
        if isinstance(event, Finished):
            self.ends[number] = event
            if all(self.ends):
                self.ended.set()
        else:
            self.tokens[number].append(event)
            self.begun.set()
            self.on_token()

    def wait(self):
        assert self.ended.wait(60), "no end within a minute"
        return self


def submit(scheduler, ids, fields, *, samples=1, timeout=None, **named) -> Receiver:
    receiver = Receiver(samples, **named)
    samplings = [Sampling(**fields)] * samples
    receiver.handle = scheduler.submit(ids, samplings, receiver, timeout=timeout)
    return receiver


def check_alike(session, ids, fields, receiver):
    """Compare a greedy answer with that of a call for it alone."""
    fields = dict(fields)
    prefix = fields.pop("prefix_ids", ())
    (wanted,) = session.ctranslate2.generate([ids], DecodingConfig(**fields), prefixes=[prefix])()
    eos = session.model.network.special_ids.eos
    for found, end in zip(receiver.tokens, receiver.ends, strict=True):
        assert [token.id for token in found] == wanted.tokens[0]
        assert end == Finished("stop" if wanted.tokens[0][-1] == eos else "length")
        assert sum(t.logprob for t in found) == pytest.approx(wanted.scores[0], abs=NATS_ERROR)
        assert all(token.top == () for token in found)


WAYS = {
    "greedy": dict(max_new_tokens=24),
    "short": dict(max_new_tokens=3),  # joins the batch of "greedy"
    "limited": dict(max_new_tokens=12, min_length=6, block_ngram=2, banned_ids=(7, 9)),
    "begun": dict(max_new_tokens=9, prefix_ids=(5, 6, 11)),
    "ends": dict(max_new_tokens=24, banned_ids=tuple(range(40, 100))[:64]),
}


def inputs(session, count):
    words = ["so", "it", "is", "what", "you", "said", "to", "me", "when", "we"]
    texts = [" ".join(words[: 2 + n % 9]) + f" {n}" for n in range(count)]
    return [(*session.vocabulary.encode(text), session.vocabulary.eos_id) for text in texts]


def test_a_request_gets_the_answer_that_it_gets_alone(session):
    """Oracle: a call for each request alone. Settings and lengths are mixed."""
    scheduler = ctranslate2_scheduler.Scheduler(session, slots=4, max_queue=50)
    scheduler.warm_up()
    asked = [(ids, WAYS[way]) for ids, way in zip(inputs(session, 20), [*WAYS] * 4, strict=True)]
    receivers = [submit(scheduler, ids, fields) for ids, fields in asked]
    for (ids, fields), receiver in zip(asked, receivers, strict=True):
        check_alike(session, ids, fields, receiver.wait())
    two = submit(scheduler, asked[0][0], WAYS["greedy"], samples=2)
    check_alike(session, asked[0][0], WAYS["greedy"], two.wait())
    scheduler.close(drain=True)
    counts = scheduler.counts
    assert (counts.active, counts.queued, counts.requests) == (0, 0, 21)
    assert counts.tokens == sum(len(t) for r in [*receivers, two] for t in r.tokens)
    assert sum(counts.finished.values()) == 22
    assert counts.encoder_batches < 21 and counts.steps < counts.tokens
    assert scheduler.compilations == 0


def test_samples(session, scheduler):
    """Oracles: nearly cold samples are the likeliest tokens; warm ones differ."""
    ids = inputs(session, 1)[0]
    cold = submit(scheduler, ids, dict(max_new_tokens=8, temperature=1e-3), samples=2).wait()
    check_alike(session, ids, dict(max_new_tokens=8), cold)
    how = dict(max_new_tokens=8, min_length=7, temperature=1.0, top_p=0.9)
    warm = submit(scheduler, ids, how, samples=4).wait()
    assert len({tuple(t.id for t in tokens) for tokens in warm.tokens}) > 1


def test_log_probabilities_of_samples_are_the_model_s(session, scheduler):
    """Oracle: `score_batch` of the same tokens, which knows no temperature, `top_k` or `top_p`."""
    ids = inputs(session, 1)[0]
    how = dict(max_new_tokens=20, temperature=2.0, top_p=0.9, top_k=50)
    found = submit(scheduler, ids, how, samples=4).wait()
    answers = [[token.id for token in tokens] for tokens in found.tokens]
    wanted = session.ctranslate2.log_likelihoods([ids] * 4, answers)()
    nats = [sum(token.logprob for token in tokens) for tokens in found.tokens]
    assert nats == pytest.approx(wanted, abs=NATS_ERROR)


def test_the_end_token_ends_an_answer(session, scheduler):
    """Property: of hot samples, those with EOS end by it, and it is an event."""
    eos = session.model.network.special_ids.eos
    how = dict(max_new_tokens=24, temperature=50.0)
    ends = set()
    for _ in range(400):
        found = submit(scheduler, (3, 1), how, samples=4).wait()
        for tokens, end in zip(found.tokens, found.ends, strict=True):
            ids = [token.id for token in tokens]
            assert end == Finished("stop" if ids[-1] == eos else "length")
            assert eos not in ids[:-1] and len(ids) <= 24
            ends.add(end.reason)
        if ends == {"stop", "length"}:
            return
    raise AssertionError(f"only {ends} in 1600 answers")


def test_a_short_request_does_not_wait_for_a_long_one(session, scheduler):
    """Property: the first answer stands still until the second one, which came later, has ended."""
    first, second = inputs(session, 2)
    short = threading.Event()
    held = submit(scheduler, first, LONG, on_token=lambda: short.wait(60))
    assert held.begun.wait(60)
    check_alike(session, second, LONG, submit(scheduler, second, LONG).wait())
    assert not held.ended.is_set()
    short.set()
    check_alike(session, first, LONG, held.wait())


def test_a_cancelled_sample_ends_and_its_slot_is_free(session, scheduler):
    """Property: of four samples in four slots one is cancelled; then a fifth begins."""
    ids = inputs(session, 1)[0]
    go = threading.Event()
    four = submit(scheduler, ids, LONG, samples=4, on_token=lambda: go.wait(60))
    assert four.begun.wait(60)
    other = submit(scheduler, ids, LONG)
    assert not other.begun.wait(0.2) and scheduler.counts.queued == 1
    four.handle.cancel(2)
    go.set()
    check_alike(session, ids, LONG, other.wait())
    assert [end.reason for end in four.wait().ends].count("cancelled") == 1
    assert four.ends[2] == Finished("cancelled") and len(four.tokens[2]) < 23
    assert scheduler.counts.active == 0


def test_requests_that_wait_end_too(session, scheduler):
    """Property: cancelled, late or refused while all slots are in use, which go on."""
    ids = inputs(session, 1)[0]
    go = threading.Event()
    four = submit(scheduler, ids, LONG, samples=4, on_token=lambda: go.wait(60))
    assert four.begun.wait(60)
    left = submit(scheduler, ids, LONG)
    left.handle.cancel()
    assert left.wait().ends == [Finished("cancelled")]
    late = submit(scheduler, ids, LONG, timeout=0.05)
    assert late.wait().ends == [Finished("deadline")] and late.tokens == [[]]
    waiting = [submit(scheduler, ids, LONG) for _ in range(5)]
    with pytest.raises(QueueFull, match="5 requests wait"):
        submit(scheduler, ids, LONG)
    go.set()
    for one in (four, *waiting):
        check_alike(session, ids, LONG, one.wait())


def test_a_deadline_ends_an_answer_between_tokens(session, scheduler):
    """Property: some tokens came in time, and no more."""
    pause = threading.Event()
    late = submit(
        scheduler, inputs(session, 1)[0], LONG, timeout=0.3, on_token=lambda: pause.wait(0.1)
    )
    assert late.wait().ends == [Finished("deadline")] and 1 <= len(late.tokens[0]) < 23


def test_exclusive_work_waits_for_batches_and_holds_them_up(session, scheduler):
    """Property: the order of a batch, the function, and a batch that was submitted after it."""
    ids, order, go = inputs(session, 1)[0], [], threading.Event()
    first = submit(scheduler, ids, LONG, on_token=lambda: go.wait(60))
    assert first.begun.wait(60)
    future = scheduler.run_exclusive(lambda: order.append(first.ended.is_set()))
    second = submit(scheduler, ids, LONG, on_token=lambda: order.append("second"))
    go.set()
    future.result(60)
    second.wait()
    assert order[:2] == [True, "second"]
    with pytest.raises(ZeroDivisionError):
        scheduler.run_exclusive(lambda: 1 / 0).result(60)


def test_errors_end_requests_and_not_the_threads(session, scheduler, monkeypatch):
    """Property: an error of CTranslate2 ends its batch; the next request is whole."""
    ids = inputs(session, 1)[0]

    def broken(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_model", types.SimpleNamespace(write=broken))
        (end,) = submit(scheduler, ids, LONG).wait().ends
    assert end.reason == "error" and "out of memory" in end.error

    def fail():
        raise RuntimeError("event loop is closed")

    bad, good = submit(scheduler, ids, LONG, on_token=fail), submit(scheduler, ids, LONG)
    check_alike(session, ids, LONG, good.wait())
    assert bad.wait().ends == [Finished("cancelled")]


@pytest.mark.parametrize("drain, reasons", [(True, {"length", "stop"}), (False, {"cancelled"})])
def test_closing(session, drain, reasons):
    """Property: with `drain` all requests end, without, they are cancelled; then none is taken."""
    made = ctranslate2_scheduler.Scheduler(session, slots=1)
    with pytest.raises(RuntimeError, match="warm_up"):
        submit(made, (3, 1), LONG)
    made.warm_up()
    go = threading.Event()
    first = submit(made, (3, 1), LONG, on_token=lambda: go.wait(60))
    assert first.begun.wait(60)
    receivers = [first, *(submit(made, (3, 1), LONG) for _ in range(2))]
    closing = threading.Thread(target=made.close, args=(drain,))
    closing.start()
    go.wait(0.1)
    go.set()
    closing.join(60)
    assert {r.wait().ends[0].reason for r in receivers} <= reasons
    with pytest.raises(RuntimeError, match="closed"):
        submit(made, (3, 1), LONG)


@pytest.mark.parametrize(
    "samplings, message",
    [
        ([Sampling(4, top_logprobs=2)], "top_logprobs=2: CTranslate2 has it not"),
        ([Sampling(4, context_block_ngram=2)], "context_block_ngram=2: CTranslate2 has it not"),
        ([Sampling(4), Sampling(4, temperature=1.0)], "differ in their settings"),
        ([Sampling(25)], "25 tokens"),
    ],
)
def test_what_it_cannot_answer(scheduler, samplings, message):
    """Oracle: the options of `translate_batch`; nothing reaches the queue."""
    with pytest.raises(UserError, match=message):
        scheduler.submit((3, 1), samplings, Receiver())


def test_a_session_of_jax_is_refused(session):
    """Oracle: it has no translator."""
    with pytest.raises(UserError, match="needs a model of CTranslate2's"):
        ctranslate2_scheduler.Scheduler(dataclasses.replace(session, ctranslate2=None))
