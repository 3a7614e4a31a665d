"""From a question to its answer: what is kept of odd replies, and when a run is given up."""

import asyncio
import collections
import contextlib
import json

import pytest

from cosmo.engine.base.errors import UserError
from cosmo.engine.base.retries import RetryPolicy
from data_pipeline.calls.client import Reply, Server
from data_pipeline.calls.gateway import Gateway, RequestError
from data_pipeline.calls.journal import Journal, read_entries
from data_pipeline.calls.limits import Allowance, ClosedError, Concurrency, Limits
from data_pipeline.calls.requests import Request, Sampling
from data_pipeline.co3 import report, statistics

GOOD = json.dumps({"choices": [{"text": "Yes"}], "usage": {"completion_tokens": 1}})


async def answers(journal, replies: list, count: int = 1, body: str = "{}") -> list[str]:
    """The answers to `count` questions of a server with these replies, the last for ever."""

    async def post(form, data):
        return replies.pop(0) if len(replies) > 1 else replies[0]

    server = Server("http://x/v1", "m", extra_body=body)
    gateway = Gateway(post, server, journal, Limits(Allowance()), RetryPolicy(3, 0.0, 0.0))
    return [
        (await gateway.answer(Request(f"t{n}", "head", 0, "Is it?"))).text for n in range(count)
    ]


def test_a_broken_answer_is_kept_before_another_is_asked_for(tmp_path):
    """It may have been paid for. Oracle: the replies, in their order."""
    with Journal(tmp_path) as journal:
        assert asyncio.run(answers(journal, [Reply(200, GOOD[:20]), Reply(200, GOOD)])) == ["Yes"]
    kept = [(entry.kind, entry.raw) for entry in read_entries(tmp_path)]
    assert kept == [("failure", GOOD[:20]), ("answer", GOOD)]


@pytest.mark.parametrize(
    ("reply", "billed"),
    [
        (Reply(200, GOOD[:20]), True),
        (Reply(0, "no answer within 5 s"), True),
        (Reply(0, "ReadError"), True),
        (Reply(0, "ConnectTimeout"), False),
        (Reply(0, "ConnectError: All connection attempts failed"), False),
        (Reply(500, ""), False),
    ],
)
def test_what_may_have_been_billed_is_charged_at_its_most(tmp_path, reply, billed):
    """Oracle: 8 letters are 4 tokens at most, an answer has 10; of three tries two fit in 40."""
    request = Request("t", "head", 0, "Is it so?"[:8], sampling=Sampling(max_tokens=10))

    async def post(form, data):
        return reply

    async def asked(cap):
        limits = Limits(Allowance(token_cap=cap), journal.tokens_spent())
        gateway = Gateway(
            post, Server("http://x/v1", "m"), journal, limits, RetryPolicy(3, 0.0, 0.0)
        )
        with pytest.raises(ClosedError if billed else RequestError):
            await gateway.answer(request)
        return limits.spent_in, limits.spent_out

    with Journal(tmp_path) as journal:
        assert asyncio.run(asked(40)) == ((8, 20) if billed else (0, 0))
        assert asyncio.run(asked(30)) == ((8, 20) if billed else (0, 0))  # another start
        calls = report.calls_of(journal.spent(), (1e6, 2e6))
    if billed:
        assert (calls["head"]["estimated_tokens"], calls["head"]["estimated_cost"]) == (28, 48)
        assert calls["head"]["prompt_tokens"] == calls["head"]["cost"] == 0
        said = report.build({}, statistics.Statistics(), collections.Counter(), calls, {})
        assert "could not be read: 28 tokens; cost 48.0000" in report.table(said)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {"prompt_tokens": 10**30, "completion_tokens": 1},
        {"prompt_tokens": -(10**6), "completion_tokens": -(10**6)},
        {"prompt_tokens": 10**8, "completion_tokens": 10**8},
        {"prompt_tokens": 0, "completion_tokens": 0},
        ["many"],
    ],
    ids=["none", "huge", "negative", "absurd", "zero", "no object"],
)
def test_an_answer_without_usable_usage_is_counted_by_its_text(tmp_path, usage, caplog):
    """Oracle: 8 bytes are 3 tokens, 3 are 1; the next start counts them too; one warning."""
    request = Request("t", "head", 0, "Is it so?"[:8], sampling=Sampling(max_tokens=10))

    async def post(form, data):
        return Reply(200, json.dumps({"choices": [{"text": "Yes"}], "usage": usage}))

    async def answered():
        limits = Limits(Allowance(token_cap=30), journal.tokens_spent())
        gateway = Gateway(post, Server("http://x/v1", "m"), journal, limits)
        assert (await gateway.answer(request)).text == "Yes"
        return limits.spent_in, limits.spent_out

    with Journal(tmp_path) as journal:
        assert asyncio.run(answered()) == (3, 1)
        assert asyncio.run(answered()) == (3, 1)  # from the journal
    assert caplog.text.count("no possible count of tokens") == 1


def test_a_call_that_a_kill_broke_off_is_charged(tmp_path):
    """Oracle: the most that it may have taken, at the next start; none is counted twice."""
    request = Request("t", "head", 0, "Is it so?"[:8], sampling=Sampling(max_tokens=10))
    wide = Server("http://x/v1", "m", extra_body='{"max_completion_tokens": 100}')

    async def killed(server):
        async def post(form, data):
            raise asyncio.CancelledError  # nothing of this process runs on

        with contextlib.suppress(asyncio.CancelledError):
            await Gateway(post, server, journal, Limits(Allowance())).answer(request)

    for server, most in ((Server("http://x/v1", "m"), (4, 10)), (wide, (8, 110))):
        with Journal(tmp_path) as journal:
            asyncio.run(killed(server))
            assert [e.kind for e in read_entries(tmp_path)][-1] == "sent"
        with Journal(tmp_path) as journal:
            assert journal.tokens_spent() == most
            assert journal.spent()["head"].keys() == {"failure"}
    with Journal(tmp_path) as journal:
        assert asyncio.run(answers(journal, [Reply(429, ""), Reply(200, GOOD)])) == ["Yes"]
    kinds = [(entry.kind, entry.reason) for entry in read_entries(tmp_path)]
    assert [kind for kind, _ in kinds] == ["failure", "failure", "answer"]
    assert all("under way" in why for _, why in kinds[:2])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('data: {"choices": []}', "no JSON"),
        ('{"error": {"message": "Provider returned error"}}', "unexpected JSON"),
        ('{"choices": [{"text": "<think>Well", "finish_reason": "length"}]}', "max_tokens"),
        ('{"choices": [{"text": "<think>Well</think>"}]}', "without an answer"),
    ],
)
def test_paid_replies_without_an_answer_stop_the_run(tmp_path, text, said):
    """Good answers of another stage come in between. Oracle: one line after 20 of the bad ones."""
    asked: collections.Counter = collections.Counter()

    async def post(form, data):
        stage = "bad" if b"bad" in data else "good"
        asked[stage] += 1
        return Reply(200, text if stage == "bad" else GOOD)

    async def all_of_them(journal):
        gateway = Gateway(
            post, Server("http://x/v1", "m"), journal, Limits(Allowance()), RetryPolicy(8, 0, 0)
        )
        for number in range(100):
            for stage in ("good", "bad"):
                with contextlib.suppress(RequestError):
                    await gateway.answer(Request(f"t{number}", stage, 0, f"A {stage} one"))

    with Journal(tmp_path) as journal, pytest.raises(UserError, match=said) as stopped:
        asyncio.run(all_of_them(journal))
    assert asked["bad"] == 20 and "'bad'" in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_a_server_that_only_redirects_stops_the_run(tmp_path):
    """Oracle: an error that names the flag, not a rejection of every triple."""

    async def all_of_them(journal):
        for number in range(30):
            try:
                await answers_of.answer(Request(f"t{number}", "head", 0, "Is it?"))
            except UserError as error:
                return number, str(error)
            except Exception:
                continue

    async def post(form, data):
        return Reply(307, "")

    with Journal(tmp_path) as journal:
        answers_of = Gateway(post, Server("http://x/v1", "m"), journal, Limits(Allowance()))
        number, said = asyncio.run(all_of_them(journal))
    assert number == 19 and "base_url" in said


def test_fields_added_to_the_body_are_another_question(tmp_path):
    """Oracle: the answer given to these fields, not the one that was there to others."""
    other = GOOD.replace("Yes", "No")
    with Journal(tmp_path) as journal:
        assert asyncio.run(answers(journal, [Reply(200, GOOD)])) == ["Yes"]
        cold = '{"temperature": 0}'
        assert asyncio.run(answers(journal, [Reply(200, other)], body=cold)) == ["No"]
        assert asyncio.run(answers(journal, [Reply(500, "")])) == ["Yes"]


def test_a_journal_that_fails_stops_the_run(tmp_path):
    """Oracle: an error that names the file; no triple is rejected for it."""
    with Journal(tmp_path) as journal:
        asyncio.run(answers(journal, [Reply(200, GOOD)]))
        journal._database.execute("ALTER TABLE calls RENAME TO elsewhere")
        with pytest.raises(UserError, match=r"calls\.sqlite"):
            asyncio.run(answers(journal, [Reply(200, GOOD)]))
        journal._database.execute("ALTER TABLE elsewhere RENAME TO calls")
    with Journal(tmp_path) as journal:
        assert asyncio.run(answers(journal, [Reply(500, "")])) == ["Yes"]


@pytest.mark.parametrize("status", [429, 503])
def test_the_server_s_own_concurrency_is_found(tmp_path, status):
    """A server that refuses more than 8 calls in flight. Oracle: 8, within a factor of two."""
    in_flight, allowed = 0, []

    async def post(form, data):
        nonlocal in_flight
        allowed.append(limits.concurrency.allowed)
        in_flight += 1
        try:
            if in_flight > 8:
                await asyncio.sleep(0)  # the refusal has its way to come, too
                return Reply(status, "busy")
            await asyncio.sleep(0.004)
            return Reply(200, GOOD)
        finally:
            in_flight -= 1

    async def all_of_them(journal):
        gateway = Gateway(
            *(post, Server("http://x/v1", "m"), journal, limits, RetryPolicy(20, 0.002, 0.01))
        )
        requests = (Request(f"t{n}", "head", 0, "Is it?") for n in range(1200))

        async def worker():
            for request in requests:
                assert (await gateway.answer(request)).text == "Yes"

        await asyncio.gather(*(worker() for _ in range(64)))
        return gateway.counts

    limits = Limits(Allowance(concurrency=64))
    with Journal(tmp_path) as journal:
        counts = asyncio.run(all_of_them(journal))
    late = allowed[len(allowed) // 2 :]
    assert 4 <= sum(late) / len(late) <= 16
    assert limits.concurrency.least >= 2 and counts["calls"] < 1200 * 1.5


def test_one_overload_is_one_decrease():
    """64 calls refused together, then answers. Oracle: half; one more for each round of answers."""
    concurrency = Concurrency(64)
    numbers = [concurrency.begin() for _ in range(64)]
    for number in numbers:
        concurrency.overloaded(number)
    assert concurrency.allowed == 32 and concurrency.decreases == 1
    concurrency.overloaded(concurrency.begin())
    assert concurrency.allowed == 16

    async def answered(held: int, answers: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(held):
                await stack.enter_async_context(concurrency.place())
            for _ in range(answers):
                concurrency.answered()

    asyncio.run(answered(64, 16))  # a decrease takes no place from a call in flight
    assert 16.9 < concurrency.allowed <= 17
    asyncio.run(answered(9, 16))
    assert concurrency.allowed <= 17  # other places were free
    for held in range(16, 65):
        asyncio.run(answered(held, 200))
    assert concurrency.allowed == 64 and concurrency.least == 16
