"""The guard over real sockets: the openai client, a misbehaving teacher, 64 clients, a kill."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import openai
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from canary.__main__ import main
from canary.cli import guard as verb
from canary.guard import audit, judging, people, policy, routes, upstream
from canary.labeller import Labeller
from cosmo.engine.web import run
from cosmo.tasks import safety
from tests.canary import guard_doubles as doubles
from tests.canary.guard_doubles import ROTS, Labels, Memory, changed, delta, sse
from tests.data_pipeline import loopback

SENTENCES = [f"Sentence number {n} is here. " for n in range(5)]


@contextlib.contextmanager
def guarding(url, labels=None, rules=None, log=None, key=None):
    """(URL of a guard in front of `url`, its log)."""
    rules, log = rules or policy.load(), log or Memory()
    judge = judging.Judge(labels or Labels(), rules, len, 4000)
    server = upstream.HttpUpstream(url, rules.limits, key)
    parts = {"log_file": log, "people": people.People(rules.intervention), "audit_text": False}
    app = verb.application(server, judge, rules, parts, None, "127.0.0.1")
    with run.background(app) as address:
        yield f"{address}/v1", log


def client(url, **more):
    return openai.OpenAI(base_url=url, api_key="secret-key", max_retries=0, timeout=20, **more)


def words(text):
    return {"model": "teacher", "messages": [{"role": "user", "content": text}]}


class Speaker:
    """A server that streams, and counts its calls and those that were left."""

    def __init__(self):
        self.calls, self.left, self.seen, self.keys = 0, 0, [], set()
        routes = [Route("/v1/chat/completions", self.chat, methods=["POST"])]
        self.app = Starlette(routes=[*routes, Route("/v1/models", self.models)])

    async def models(self, request):
        return JSONResponse({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def chat(self, request):
        asked = await request.json()
        self.calls += 1
        self.seen.append(asked["messages"])
        self.keys.add(request.headers.get("authorization"))
        return StreamingResponse(self.events(asked), media_type="text/event-stream")

    async def events(self, asked):
        whole = False
        name = asked["messages"][-1]["content"]
        try:
            texts = [f"It is for {name} alone. ", *SENTENCES * asked.get("max_tokens", 1)]
            for piece in sse(*[delta(content=text) for text in texts], delta(finish="stop")):
                yield piece
                await asyncio.sleep(0.002)
            whole = True
        finally:
            self.left += not whole


@pytest.fixture(scope="module")
def speaking():
    speaker = Speaker()
    with run.background(speaker.app) as address, guarding(address) as (url, log):
        yield speaker, url, log


def test_the_openai_client_streams(speaking):
    """Oracle: the texts that the server wrote; the guard's field in the first chunk."""
    speaker, url, _ = speaking
    with client(url) as api:
        chunks = list(api.chat.completions.create(**words("Ann"), stream=True))
        assert [model.id for model in api.models.list()] == ["m"]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "It is for Ann alone. " + "".join(SENTENCES)
    assert chunks[0].guard["action"] == "pass" and speaker.keys == {"Bearer secret-key"}
    labels = [
        one
        for chunk in chunks
        for one in (chunk.model_extra.get("guard") or {}).get("answer_labels", [])
    ]
    assert len(labels) == 6 and {one["action"] for one in labels} == {"pass"}


def test_guidance_and_interventions_reach_the_client(speaking):
    speaker, url, _ = speaking
    with client(url) as api:
        api.chat.completions.create(**words("a rude plan"))
        assert ROTS[1].rstrip(".") in speaker.seen[-1][0]["content"]
        before = speaker.calls
        answer = api.chat.completions.create(**words("danger"))
    assert answer.choices[0].message.content == policy.load().texts.intervention
    assert answer.guard["needs_human"] and speaker.calls == before


def test_64_clients_lose_and_double_no_call(speaking):
    """Oracle: each client's own text, and the server's count of calls."""
    speaker, url, log = speaking
    before = speaker.calls

    async def one(api, number):
        asked = words(f"client{number}")
        if number % 2:
            answer = await api.chat.completions.create(**asked)
            return answer.choices[0].message.content
        chunks = await api.chat.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def everybody():
        async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0, timeout=60) as api:
            return await asyncio.gather(*(one(api, number) for number in range(64)))

    texts = asyncio.run(everybody())
    assert texts == [f"It is for client{n} alone. " + "".join(SENTENCES) for n in range(64)]
    assert speaker.calls == before + 64
    for _ in range(100):  # an end is recorded after the last byte
        ended = {one["request"] for one in log.of("end") if one["outcome"] == "answered"}
        if len(ended) >= 64:
            return
        time.sleep(0.05)
    pytest.fail(f"{len(ended)} calls ended")


def test_a_client_that_leaves_frees_the_upstream(speaking):
    speaker, url, _ = speaking
    before = speaker.left
    with client(url) as api:
        stream = api.chat.completions.create(**words("Bob"), stream=True, max_tokens=500)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
    for _ in range(100):
        if speaker.left > before:
            return
        time.sleep(0.05)
    pytest.fail("the server still speaks to a client that has left")


def test_the_key_is_logged_nowhere(speaking, caplog):
    _, url, log = speaking
    with caplog.at_level("DEBUG"), client(url) as api:
        api.chat.completions.create(**words("Hi"))
    assert "secret-key" not in caplog.text + json.dumps(log.records)


def outcome(api, asked):
    """What a client gets: its text, or the error's type, status, body and Retry-After."""
    try:
        return api.chat.completions.create(**asked).choices[0].message.content
    except openai.APIStatusError as error:
        return error.status_code, error.response.text, error.response.headers.get("retry-after")
    except (openai.APIConnectionError, json.JSONDecodeError) as error:
        return type(error).__name__


@pytest.mark.parametrize(
    "kind", ["429", "500", "slow", "cut", "truncated", "garbage", "empty", "refusal"]
)
def test_a_misbehaving_teacher_is_handed_on(kind):
    """Oracle: the teacher's own answers to the same requests."""
    manners = {"misbehave": 1.0, "kinds": (kind,), "slow_seconds": 0.05, "retry_after": "3"}
    asked = [words(f"What about number {n}?") for n in range(3)]
    with loopback.teacher(**manners) as (url, _), client(url) as api:
        direct = [outcome(api, one) for one in asked]
    with loopback.teacher(**manners) as (url, taught), guarding(url) as (guarded_url, _):
        with client(guarded_url) as api:
            guarded = [outcome(api, one) for one in asked]
        assert taught.counts["completions"] == 3 and taught.in_flight == 0
    if kind in ("cut", "truncated"):  # the guard holds the answer, so its client gets a status
        assert [one[0] for one in guarded] == [502] * 3
    else:
        assert [one or None for one in guarded] == [one or None for one in direct]


@pytest.mark.parametrize("length", [0, 70_000])
def test_headers_and_queries_of_any_bytes_are_handed_on(length):
    """Oracle: the bytes that each side sent; a query too long for a URL is an error of status 502.

    The client's own name of the body is not: the guard has read it as JSON.
    """
    seen = []

    async def chat(request):
        seen.append(dict(request.scope["headers"]))
        answer = JSONResponse(json.loads(doubles.body("It is fine here.")))
        answer.raw_headers.append((b"x-note", "naïve →".encode()))
        return answer

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    with run.background(app) as url, guarding(url) as (address, _):
        host = address.removeprefix("http://").removesuffix("/v1")
        connection = http.client.HTTPConnection(host, timeout=20)
        data = json.dumps(words("Hi")).encode()
        kind = "application/json; charset=utf-7"
        headers = {"x-odd": b"\xe9\xff", "content-type": kind}
        path = f"/v1/chat/completions?{'q' * length}"
        connection.request("POST", path, data, headers)
        answer = connection.getresponse()
        answer.read()
        connection.close()
    if length:
        assert answer.status == 502 and not seen
        return
    assert answer.status == 200
    assert answer.getheader("x-note").encode("latin-1").decode() == "naïve →"
    assert (seen[0][b"x-odd"], seen[0][b"content-type"]) == (b"\xe9\xff", b"application/json")


def test_an_upstream_that_is_down_or_slow_is_an_error():
    with guarding("http://127.0.0.1:1") as (url, _), client(url) as api:
        status, text, _ = outcome(api, words("Hi"))
        assert status == 502 and "upstream_unreachable" in text
    limits = {"first_byte_seconds": 0.1}
    with (
        loopback.teacher(latency=3.0) as (there, _),
        guarding(there, rules=changed(limits=limits)) as (url, _),
        client(url) as api,
    ):
        assert outcome(api, words("Hi"))[0] == 504


SERVER = """
import sys
from canary.cli import guard as verb
from canary.guard import audit, judging, people, policy
from cosmo.engine.web import run
from cosmo.tasks import safety
from tests.canary import guard_doubles as doubles

rules = policy.load()
up = doubles.Script(lambda asked: (200, doubles.JSON, [doubles.body()]))
judge = judging.Judge(doubles.Labels(), rules, len, 4000)
parts = {"log_file": audit.LineLog(sys.argv[1]), "audit_text": False}
parts["people"] = people.People(rules.intervention, sys.argv[2])
run.serve(verb.application(up, judge, rules, parts, None, "127.0.0.1"), port=0)
"""


def test_a_kill_loses_no_decision_that_was_acted_on(tmp_path):
    """Oracle: every answer that a client has is in the log, and every intervention in the queue."""
    log, queue = tmp_path / "audit.jsonl", tmp_path / "queue.jsonl"
    command = [sys.executable, "-c", SERVER, str(log), str(queue)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    url = process.stdout.readline().split()[-1]
    got: list[tuple[str, bool]] = []

    def ask(number):
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                danger = len(got) % 3 == 0
                data = json.dumps(words("danger" if danger else "Hi")).encode()
                request = urllib.request.Request(
                    f"{url}/v1/chat/completions", data, {"content-type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=10) as answer:
                    got.append((answer.headers["x-guard-request-id"], danger))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    while len(got) < 60 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for thread in threads:
        thread.join()
    records = audit.read_lines(log)
    turns = {record["request"] for record in records if record["kind"] == "turn"}
    answers = {record["request"] for record in records if record["kind"] == "answer"}
    called = {record["request"] for record in audit.read_lines(queue)}
    assert len(got) >= 60
    for name, danger in got:
        assert name in turns and name in (called if danger else answers)


# The verb, and Canary itself


def test_the_verb_guards_with_a_real_canary(canary):
    """Oracle: Canary's own label of the same dialogue."""
    labels = Labeller(canary, batch_sizes=(1,))
    labels.warm_up()
    rules, log = policy.load(), Memory()
    judge = judging.Judge(labels, rules, *judging.of_model(canary))
    speaker = Speaker()
    parts = {"log_file": log, "people": people.People(rules.intervention), "audit_text": False}
    try:
        with run.background(speaker.app) as address:
            server = upstream.HttpUpstream(address, rules.limits)
            app = verb.application(server, judge, rules, parts, None, "127.0.0.1")
            with run.background(app) as url, client(f"{url}/v1") as api:
                answer = api.chat.completions.create(**words("Hello there, friend."))
    finally:
        labels.close()
    wanted = canary.chirp(["Hello there, friend."])
    assert answer.guard["label"] == wanted.label
    assert answer.guard["probabilities"][wanted.label] == pytest.approx(
        wanted.probabilities[wanted.label], abs=1e-4
    )
    assert log.records[0]["label"] == wanted.label


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--policy=none.toml"], "cannot read the policy none.toml"),
        (["--upstream=h:80"], "expected http://HOST:PORT"),
        (["--webhook=http://example.org"], "--webhook = 'http://example.org': expected https"),
        (["--upstream_key_env=NO_SUCH_KEY"], "NO_SUCH_KEY holds no key"),
        (["--port=99999"], "port 99999"),
        (["--audit=none/a.jsonl", "--port=0"], "cannot write none/a.jsonl"),
        (["--canary=none", "--port=0"], "none"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(flags, wanted, capsys):
    given = ["--upstream=http://127.0.0.1:1", "--canary=none"]
    assert main(["guard", *given, *flags]) == 1
    error = capsys.readouterr().err
    assert wanted in error and error.strip().splitlines()[-1].startswith("error: ")


def test_a_server_mounts_the_guard_over_itself(canary):
    """Oracle: the same application without the guard, and Canary's own label."""
    speaker, labels = Speaker(), Labeller(canary, batch_sizes=(1,))
    labels.warm_up()
    served = upstream.AsgiUpstream(speaker.app)
    speaker.app.routes.extend(
        routes.guard_routes(
            served, labels, changed(turn=dict.fromkeys(safety.LABELS, "pass")), prefix="/guard/v1"
        )
    )
    asked = {**words("Ann"), "stream": True}
    try:
        work = doubles.request(speaker.app, "/guard/v1/chat/completions", asked)
        _, _, data, _ = asyncio.run(work)
    finally:
        labels.close()
    told = doubles.events(data)[0]["guard"]
    assert told["label"] == canary.chirp(["Ann"], rots=False).label and speaker.calls == 1
