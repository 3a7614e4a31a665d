"""Bodies, answers and waiting times of the client; limits by a clock of our own."""

import asyncio
import base64
import contextlib
import dataclasses
import datetime
import email.utils
import gzip
import json

import pytest

from cosmo.engine.base import retries
from cosmo.engine.base.errors import UserError
from data_pipeline.calls import client, secrets
from data_pipeline.calls.client import Reply, Server
from data_pipeline.calls.limits import Allowance, Bucket, ClosedError, Limits
from data_pipeline.calls.requests import Request, Response, Sampling
from tests.data_pipeline.loopback import teacher

ASK = Request(
    "t1",
    "head",
    0,
    "Q: Is it?\nA:",
    (("user", "Is it?"),),
    Sampling(8, 0, stop=(".",), top_logprobs=5),
)


def body(**settings) -> dict:
    return json.loads(client.request_body(ASK, Server("http://x/v1", "m", **settings), seed=3))


def test_bodies_are_what_the_api_wants():
    """Oracle: OpenAI's API reference for both endpoints."""
    completion, chat = body(), body(form="chat")
    assert completion["prompt"] == ASK.prompt and completion["logprobs"] == 5
    assert chat["messages"] == [{"role": "user", "content": "Is it?"}]
    assert chat["logprobs"] is True and chat["top_logprobs"] == 5 and "prompt" not in chat
    for made in (completion, chat):
        assert made["max_tokens"] == 8 and made["stop"] == ["."] and made["seed"] == 3
        assert made["stream"] is False
    changed = body(extra_body='{"seed": null, "max_tokens": null, "max_completion_tokens": 8}')
    assert "seed" not in changed and "max_tokens" not in changed
    assert changed["max_completion_tokens"] == 8


def test_a_chat_form_without_sampling():
    """Oracle: agents/gpt.py of CO3's released code, whose chat calls have model and messages.

    The limit of tokens is ours: caps on tokens and cost count on it.
    """
    ask = dataclasses.replace(ASK, sampling=Sampling(completion_only=True))
    chat, completion = (
        json.loads(client.request_body(ask, Server("http://x/v1", "m", form=form)))
        for form in ("chat", "completion")
    )
    assert set(chat) == {"model", "messages", "max_tokens", "seed", "stream"}
    assert (completion["max_tokens"], completion["presence_penalty"]) == (1024, 0.6)
    # Journals of earlier versions have the keys of requests without the new field.
    assert ASK.key("m", "chat") == "52ac3114270e1331539994e4e5cb3f5b"


def test_answers_are_read_in_both_forms():
    """Oracle: answers written down from OpenAI's reference, and servers' variations of them."""
    usage = {"prompt_tokens": 4, "completion_tokens": 1}
    top = [{" Yes": -0.1, " No": -2.5}]
    choice = {"text": " Yes", "finish_reason": "length", "logprobs": {"top_logprobs": top}}
    said = client.parse_answer(json.dumps({"choices": [choice], "usage": usage}), "completion")
    assert said == Response(" Yes", "length", ({" Yes": -0.1, " No": -2.5},), None, 4, 1)
    token = {"token": "Yes", "logprob": -0.1, "top_logprobs": [{"token": "Yes", "logprob": -0.1}]}
    choice = {"message": {"content": "Yes"}, "logprobs": {"content": [token]}}
    said = client.parse_answer(json.dumps({"choices": [choice]}), "chat")
    assert said == Response("Yes", "stop", ({"Yes": -0.1},))
    choice = {"message": {"content": None, "refusal": "I can't"}, "logprobs": None}
    assert client.parse_answer(json.dumps({"choices": [choice]}), "chat").text == "I can't"
    half = '{"choices": [{"text": "a\\ud83d", "finish_reason": "stop"}]}'
    assert client.parse_answer(half, "completion").text == "a?"
    scores = {"results": [{"category_scores": {"hate": 0.7, "sexual": None}}]}
    assert client.parse_answer(json.dumps(scores), "moderation").scores == {
        "hate": 0.7,
        "sexual": 0.0,
    }


@pytest.mark.parametrize(
    "text",
    [
        *("", '{"choices": [{"te', "[]", '{"choices": []}', '{"choices": [{"text": 3}]}', "null"),
        *("[" * 100_000, "data: {}", "<html>", '{"error": {"code": 429}}', '{"choices": null}'),
    ],
)
def test_what_is_no_answer_is_said_to_be_none(text):
    """Oracle: these lack what an answer has."""
    with pytest.raises(client.AnswerError):
        client.parse_answer(text, "completion")


def test_retry_after_in_all_its_spellings():
    """Oracle: RFC 9110, 10.2.3, and the milliseconds of OpenAI."""
    now = 1_700_000_000.0
    moment = datetime.datetime.fromtimestamp(now + 90, datetime.UTC)
    date = email.utils.format_datetime(moment, usegmt=True)
    assert retries.retry_after({"retry-after": "7"}) == 7
    assert retries.retry_after({"retry-after": date}, now) == 90
    assert retries.retry_after({"retry-after": date}, now + 1000) == 0
    assert retries.retry_after({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    assert retries.retry_after({"retry-after": "soon"}) is None
    assert retries.retry_after({}) is None


def test_a_key_that_no_header_carries_is_not_shown(monkeypatch):
    """Oracle: the secret is in no message; a line's end after it is forgiven."""
    monkeypatch.setenv("SECRET", "abra\ncadabra")
    with pytest.raises(UserError, match="SECRET") as refused:
        Server("http://x/v1", "m", key_variable="SECRET").key()
    assert "abra" not in str(refused.value)
    monkeypatch.setenv("SECRET", "abracadabra\n")
    assert Server("http://x/v1", "m", key_variable="SECRET").key() == "abracadabra"


def test_a_questions_name_is_of_what_is_sent():
    """Oracle: the name that journals have had; another one would pay for every answer again."""
    name = ASK.key("m", "completion")
    assert name == "9c6e9c150bd32ff2936ed92033eed385"
    said = dataclasses.replace(ASK, messages=(("user", "Is it so?"),))
    assert said.key("m", "completion") == name and said.key("m", "chat") != ASK.key("m", "chat")
    asked = dataclasses.replace(ASK, prompt="Q: Is it so?\nA:")
    assert asked.key("m", "completion") != name and asked.key("m", "chat") == ASK.key("m", "chat")
    assert len({ASK.key("m", "completion", b) for b in ("{}", '{"top_k": 1}', '{"n": 1}')}) == 3
    assert ASK.key("m", "completion", "{ }") == name


class Replies:
    """A client whose server gives these replies, the last one for ever."""

    server = Server("http://x/v1", "m")

    def __init__(self, *replies):
        self.replies = list(replies)

    async def post(self, form, data):
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


CHAT = '{"choices": [{"message": {"content": "Hi"}, "finish_reason": "length"}]}'


def test_a_form_is_not_guessed_from_an_overload(monkeypatch):
    """Oracle: what the server says once it has time; a redirection names the flag to mend."""
    sleep = asyncio.sleep
    monkeypatch.setattr(client.asyncio, "sleep", lambda seconds: sleep(0))
    busy, none, fine = Reply(503, "busy"), Reply(404, "no such path"), Reply(200, CHAT)
    assert asyncio.run(client.probe(Replies(busy, none, busy, fine), "auto")) == "chat"
    with pytest.raises(UserError, match="setting: form"):
        asyncio.run(client.probe(Replies(busy), "auto"))
    assert asyncio.run(client.probe(Replies(busy), "chat")) == "chat"
    with pytest.raises(UserError, match="setting: base_url"):
        asyncio.run(client.probe(Replies(Reply(307, "")), "chat"))


@pytest.mark.parametrize(
    "text", ["{}", "<html>Sign in</html>", 'data: {"choices": []}\n\n', '{"error": {"code": 429}}']
)
def test_a_server_whose_answers_cannot_be_read_is_given_up_at_once(monkeypatch, text):
    """Oracle: one line with the address and the beginning of the answer, after four tries."""
    sleep = asyncio.sleep
    monkeypatch.setattr(client.asyncio, "sleep", lambda seconds: sleep(0))
    for form in ("auto", "chat"):
        with pytest.raises(UserError, match="cannot be read") as odd:
            asyncio.run(client.probe(Replies(Reply(200, text)), form))
        assert text[:8].strip() in str(odd.value) and "\n" not in str(odd.value)
    # A server may be disturbed once.
    assert asyncio.run(client.probe(Replies(Reply(200, text), Reply(200, CHAT)), "chat")) == "chat"


def test_a_first_call_that_breaks_off_is_tried_again(monkeypatch):
    """Oracle: the answer that comes later; a server without a connection is not waited for."""
    slept, sleep = [], asyncio.sleep

    async def counted(seconds):
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(client.asyncio, "sleep", counted)
    cut, fine = Reply(0, "RemoteProtocolError: peer closed"), Reply(200, CHAT)
    assert asyncio.run(client.probe(Replies(cut, cut, fine), "chat")) == "chat"
    assert slept == [0.2, 1.0]
    with pytest.raises(UserError, match="does not answer"):
        asyncio.run(client.probe(Replies(cut), "auto"))
    assert len(slept) == 5
    for gone, more in (("ConnectError: refused", 0), ("no answer within 5 s", 1)):
        slept.clear()
        with pytest.raises(UserError, match="does not answer"):
            asyncio.run(client.probe(Replies(Reply(0, gone)), "chat"))
        assert len(slept) == more


def test_odd_numbers_leave_the_answer():
    """Oracle: the text is there; the alternative without a number is left out."""
    for number in ("Infinity", "NaN", "1" * 5000, '"many"', "[]", "{}", "true", "-3", "null"):
        usage = f'"usage": {{"prompt_tokens": {number}, "completion_tokens": 2}}'
        text = f'\ufeff{{"choices": [{{"text": "Yes"}}], {usage}}}'
        found = client.parse_answer(text, "completion")
        assert (found.text, found.completion_tokens) == ("Yes", 2)
        assert found.prompt_tokens in (0, 1, 10**308) or number == "1" * 5000
        top = f'"logprobs": {{"top_logprobs": [{{"Yes": -0.5, "No": {number}}}, null, 3]}}'
        text = f'{{"choices": [{{"text": "Yes", {top}}}], "usage": 7}}'
        first, second, third = client.parse_answer(text, "completion").logprobs
        assert first["Yes"] == -0.5 and (second, third) == ({}, {})
    for odd in ("[]", "3", '{"content": 3}', '{"content": [3, {"top_logprobs": [null]}]}'):
        text = f'{{"choices": [{{"text": "Yes", "logprobs": {odd}}}]}}'
        assert client.parse_answer(text, "completion").text == "Yes"


def test_refusals_that_cannot_heal():
    """Oracle: the meaning of the status codes; a quota is a 429 that waiting does not mend."""
    assert client.is_final(Reply(401, "")) and client.is_final(Reply(404, ""))
    assert client.is_final(Reply(429, '{"code": "insufficient_quota"}'))
    assert not client.is_final(Reply(429, "slow down")) and not client.is_final(Reply(500, ""))


class Clock:
    """A clock that moves when somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0)
        await asyncio.sleep(0)


def test_a_bucket_lets_its_rate_through():
    """Oracle: 120 a minute are 2 a second, of which a second's worth may come at once."""
    clock = Clock()
    bucket = Bucket(120, clock)
    assert [bucket.take(1) for _ in range(4)] == [0, 0, 0.5, 1.0]
    clock.now = 10.0
    assert bucket.take(2) == 0 and bucket.take(1) == 0.5


async def calls(limits: Limits, count: int, prompt_tokens=0, completion_tokens=0) -> int:
    """`count` calls in turn, as many as are allowed; how many were."""
    for number in range(count):
        try:
            async with limits.slot(ASK) as call:
                call.prompt_tokens, call.completion_tokens = prompt_tokens, completion_tokens
        except ClosedError:
            return number
    return count


def test_rates_and_pauses_hold_everybody():
    """Oracle: 60 requests a minute are one a second; a pause of 100 s stops all."""
    clock = Clock()
    limits = Limits(Allowance(requests_per_minute=60), clock=clock, sleep=clock.sleep)
    asyncio.run(calls(limits, 11))
    assert clock.now == 10
    limits.pause(100)
    asyncio.run(calls(limits, 1))
    assert clock.now == 110


def test_tokens_of_answers_are_counted_when_they_come():
    """Oracle: 600 tokens a minute, 30 each: 20 calls a minute once the estimate has learnt."""
    clock = Clock()
    limits = Limits(Allowance(tokens_per_minute=600), clock=clock, sleep=clock.sleep)
    asyncio.run(calls(limits, 21, 10, 20))
    assert 50 < clock.now < 70


def test_caps_count_earlier_starts_and_stop_before_they_are_passed():
    """Oracle: sums by hand; a call begins only if the most that it may take has room."""
    clock = Clock()
    # ASK may take 12 letters / 2 + 8 tokens; it takes 12 each time: 24 * 12 + 14 > 300.
    limits = Limits(Allowance(token_cap=1000), (300, 400), clock, clock.sleep)
    assert asyncio.run(calls(limits, 100, 4, 8)) == 24
    assert limits.spent_in + limits.spent_out == 988 and "token_cap" in limits.closed
    allowance = Allowance(cost_cap=1.0, price_in=1e4, price_out=2e4)  # 0.2 a call, at most 0.22
    limits = Limits(allowance, clock=clock, sleep=clock.sleep)
    assert asyncio.run(calls(limits, 100, 4, 8)) == 4 and "cost_cap" in limits.closed


def test_calls_at_once_share_a_cap():
    """Eight at once, room for three. Oracle: three run, the others wait for them and then stop."""
    limits = Limits(Allowance(concurrency=8, token_cap=50))

    async def one() -> bool:
        try:
            async with limits.slot(ASK) as call:
                await asyncio.sleep(0.01)
                call.prompt_tokens, call.completion_tokens = 6, 8
            return True
        except ClosedError:
            return False

    async def eight() -> list[bool]:
        return await asyncio.gather(*(one() for _ in range(8)))

    assert sum(asyncio.run(eight())) == 3 and limits.most_running == 3


@pytest.mark.parametrize("path", ["form", "key", "server"])
def test_a_server_is_tried_before_any_work(path, monkeypatch):
    """Oracle: what the teacher offers; errors name what to mend."""

    async def probed(base_url, **settings):
        async with client.Client(Server(base_url, "teacher", **settings), 2) as one:
            return await client.probe(one, "auto")

    if path == "form":
        for offered, form in ((("chat",), "chat"), (("completion", "chat"), "completion")):
            with teacher(forms=offered) as (url, _):
                assert asyncio.run(probed(url)) == form
        with teacher(forms=()) as (url, _), pytest.raises(UserError, match="setting: base_url"):
            asyncio.run(probed(url))
    elif path == "key":
        monkeypatch.setenv("SECRET", "abracadabra")
        with teacher(key="abracadabra") as (url, _):
            assert asyncio.run(probed(url, key_variable="SECRET")) == "completion"
            with pytest.raises(UserError, match="NO_SUCH_KEY") as refused:
                asyncio.run(probed(url, key_variable="NO_SUCH_KEY"))
            assert "abracadabra" not in str(refused.value)
    else:
        with pytest.raises(UserError, match="does not answer"):
            asyncio.run(probed("http://127.0.0.1:9/v1"))


async def post_all(server, bodies) -> list[Reply]:
    async with client.Client(server, 2) as one:
        return [await one.post("completion", data) for data in bodies]


def test_odd_replies_come_back_as_replies():
    """All kinds of replies over kept connections. Oracle: the same client on a good server."""
    asked = [dataclasses.replace(ASK, prompt=f"Question {n}") for n in range(40)]
    with teacher() as (url, _):
        server = Server(url, "teacher")
        good = asyncio.run(post_all(server, [client.request_body(one, server) for one in asked]))
    assert {reply.status for reply in good} == {200}
    manners = dict(misbehave=0.9, kinds=("429", "500", "cut", "truncated"), retry_after="7")
    with teacher(**manners) as (url, taught):
        server = Server(url, "teacher", timeout=5)
        replies = asyncio.run(post_all(server, [client.request_body(one, server) for one in asked]))
        kinds = {kind for kind in manners["kinds"] if taught.counts[f"misbehaved: {kind}"]}
    assert kinds == set(manners["kinds"])
    for reply, whole in zip(replies, good, strict=True):
        assert reply.retry_after == (7 if reply.status == 429 else None)
        assert reply.status in (0, 429, 500) or whole.text.startswith(reply.text)
        assert reply.status or reply.text.startswith("RemoteProtocolError")
    cut = [reply for reply in replies if reply.status == 0]
    assert cut and all(reply.billed for reply in cut)
    # The server is gone.
    refused = asyncio.run(post_all(server, [b"{}"]))[0]
    assert refused.status == 0 and not refused.billed


def test_an_error_page_need_not_be_utf8():
    """A proxy's page in Latin-1. Oracle: its text can be written to a UTF-8 file."""

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        page = "Zugriff verweigert: prüfen".encode("latin-1")
        writer.write(b"HTTP/1.1 502 Bad\r\ncontent-length: %d\r\n\r\n" % len(page) + page)

    (reply,) = asyncio.run(replies_of(answer, 1))
    assert reply.status == 502 and "verweigert: pr\ufffdfen" in reply.text
    assert reply.text.encode()


async def replies_of(answer, timeout: float) -> list[Reply]:
    """The reply of a server whose connections are handled by `answer`."""
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as serving:
        port = serving.sockets[0].getsockname()[1]
        server = Server(f"http://127.0.0.1:{port}/v1", "m", timeout=timeout)
        return await asyncio.wait_for(post_all(server, [b"{}"]), 5)


def test_a_slow_answer_is_given_up():
    """Oracle: the timeout is given, and named."""
    with teacher(latency=2.0) as (url, _):
        server = Server(url, "teacher", timeout=0.1)
        (reply,) = asyncio.run(post_all(server, [client.request_body(ASK, server)]))
    assert reply == Reply(0, "no answer within 0.1 s")


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\n", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "header", "100 Continue"],
)
def test_an_answer_in_drops_is_given_up(first, drop):
    """Bytes now and then, without end. Oracle: the timeout is of the call, not of a read."""

    async def drip(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(first)
        for _ in range(1000):
            writer.write(drop)
            try:
                await writer.drain()
            except OSError:
                return
            await asyncio.sleep(0.02)

    assert asyncio.run(replies_of(drip, 0.2)) == [Reply(0, "no answer within 0.2 s")]


HEAD = b"HTTP/1.1 200 OK\r\n"
BOMB = gzip.compress(bytes(1 << 22))  # 4 MiB in 4 kB


@pytest.mark.parametrize(
    ("first", "more", "said"),
    [
        (HEAD + b"\r\n", b"x" * 4096, "more than 1 MiB of answer"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"400\r\n" + b"x" * 1024 + b"\r\n", "1 MiB"),
        (HEAD + b"content-encoding: gzip\r\n\r\n" + BOMB, b"", "more than 1 MiB of answer"),
        (HEAD, b"a: b\r\n" * 999, "RemoteProtocolError"),
        (HEAD + b"content-encoding: gzip\r\n\r\nno gzip", None, "DecodingError"),
        (b"", None, "RemoteProtocolError"),
        (b"SSH-2.0-OpenSSH_9\r\n", None, "RemoteProtocolError"),
        (HEAD + b"content-length: 99\r\n\r\nx", None, "RemoteProtocolError"),
    ],
    ids=["body", "chunks", "bomb", "headers", "no gzip", "nothing", "SSH", "cut"],
)
def test_an_endless_or_odd_answer_is_a_reply(monkeypatch, first, more, said):
    """Oracle: no reply (status 0), which may have been billed, and the cause."""
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 1 << 20)

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(OSError):
            writer.write(first)
            for _ in range(5000):
                if more is None:
                    break
                writer.write(more)
                await writer.drain()
            writer.close()

    (reply,) = asyncio.run(replies_of(answer, 4))
    assert reply.status == 0 and said in reply.text and reply.billed


def test_an_address_with_user_query_and_fragment():
    """Oracle: RFC 3986 and 7617: the path before the query, the user as Basic, no fragment."""
    seen = []

    async def answer(reader, writer):
        seen.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(HEAD + b"content-length: 2\r\n\r\n{}")

    async def asked():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as serving:
            port = serving.sockets[0].getsockname()[1]
            url = f"http://a%40nn:p%3Aw@127.0.0.1:{port}/v1/?api-version=1&sig=s#top"
            return await post_all(Server(url, "m", timeout=5), [b"{}"])

    assert asyncio.run(asked())[0].status == 200
    assert seen[0].startswith("POST /v1/completions?api-version=1&sig=s HTTP/1.1\r\n")
    assert f"Authorization: Basic {base64.b64encode(b'a@nn:p:w').decode()}\r\n" in seen[0]


@pytest.mark.parametrize(
    "url", ["http://x:99999/v1", "http:///v1", "http://x:ab/v1", "http://x\x00"]
)
def test_an_address_that_none_can_have_is_one_line(url):
    """Oracle: RFC 3986 and 16 bits of a port."""
    with pytest.raises(UserError, match="base_url"):
        client.Client(Server(url, "m"), 1)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://a:secret@x/v1?sig=secret&api-version=2", "https://***@x/v1?sig=***&api-version=2"),
        ("https://x/v1?X-Amz-Signature=secret&code=secret#secret", "https://x/v1?X-Amz-Signature=***&code=***#***"),
        ("https://x/v1?auth=secret;sv=secret", "https://x/v1?auth=***;sv=***"),
        ("https://x/v1?a%75th=secret", "https://x/v1?a%75th=***"),
        ("https://x/v1?secret", "https://x/v1?***"),
        ("https://x/v1", "https://x/v1"),
        ("https://x/v1?&empty=", "https://x/v1?&empty="),
    ],
)  # fmt: skip
def test_an_address_is_shown_without_secrets(url, shown):
    """Oracle: by hand: any parameter may be a secret, but for a few that never are."""
    assert secrets.address(url) == shown
