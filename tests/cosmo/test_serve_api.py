"""The server's routes over real sockets, with a scheduler and a labeller that play a script."""

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import threading
import time

import httpx2
import pytest

from canary.guard import upstream
from canary.module import Chirp
from cosmo.engine.base.errors import QueueFull
from cosmo.engine.web import app, run, sse
from cosmo.serve import api
from cosmo.tasks import safety
from tests.canary import guard_doubles as doubles
from tests.cosmo.serve_parts import ScriptedScheduler, scripted_model

HELLO = {"model": "scripted", "messages": [{"role": "user", "content": "Hello!"}]}


class ScriptedLabeller:
    """Labels what has "scare" in its last turn; `full` refuses."""

    queued, full, closed = 0, False, False

    async def label(self, turns, *, rots):
        if self.full:
            raise QueueFull("256 dialogues wait for a label")
        label = "__needs_caution__" if "scare" in turns[-1] else "__casual__"
        shares = {name: 0.8 if name == label else 0.05 for name in safety.LABELS}
        found = ("It is wrong to scare people.",) if rots and label != "__casual__" else ()
        return Chirp(label, shares, found, False, label)

    def close(self):
        self.closed = True


@contextlib.contextmanager
def served(scheduler=None, **settings):
    """(client, service) of a server."""
    labeller = settings.pop("labeller", None)
    limits = settings.pop("limits", {})
    scheduler = scheduler or ScriptedScheduler()
    service = api.Service(
        scripted_model(), scheduler, labeller=labeller, settings=api.Settings(**settings)
    )
    made = api.application(service, hosts=app.allowed_hosts("127.0.0.1"), **limits)
    with (
        run.background(made, write_seconds=0.5) as url,
        httpx2.Client(base_url=url, trust_env=False, timeout=20) as client,
    ):
        yield client, service


@pytest.fixture(scope="module")
def server():
    with served(labeller=ScriptedLabeller()) as made:
        yield made


def events(body: bytes):
    found = [event.data for event in sse.Parser().feed(body)]
    return [data if data == "[DONE]" else json.loads(data) for data in found]


def ask(client, path="/v1/chat/completions", **changes):
    return client.post(path, json={**HELLO, **changes})


def wait_for(condition):
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_guard_in_the_same_process_adds_no_line_to_the_log(caplog):
    caplog.set_level("INFO", logger="cosmo.web")
    service = api.Service(scripted_model(), ScriptedScheduler())
    for made, lines in ((api.inner(service), 0), (api.application(service), 1)):
        caplog.clear()
        work = doubles.request(made, "/v1/models", {}, method="GET")
        assert asyncio.run(work)[0] == 200
        assert len([r for r in caplog.records if r.name == "cosmo.web"]) == lines


def test_without_canary_its_routes_name_the_flag():
    with served() as (client, _):
        for path in ("/v1/moderations", "/guard/v1/chat/completions", "/guard/v1/models"):
            answer = ask(client, path)
            assert answer.status_code == 404
            assert "it was started without --canary" in answer.json()["error"]["message"]


# --- bad input ---


@pytest.mark.parametrize(
    "content,param",
    [
        (b"{", None),
        (b"[]", None),
        (b'{"model": "scripted", "messages": [{"role": "user", "content": "\\ud800"}]}',
         "messages[0].content"),
        (b'{"model": "scripted", "temperature": NaN}', None),
        (b'{"model": "scripted", "model": "scripted"}', None),
        (b'{"messages": []}', "model"),
        (b'{"model": "scripted"}', "messages"),
        (b'{"model": "scripted", "messages": []}', "messages"),
        (b'{"model": "scripted", "messages": [' + b"3," * 10_000 + b"3]}", "messages"),
        (b'{"model": "scripted", "n": 100000}', "n"),
        (b'{"model": "scripted", "top_m": 1}', "top_m"),
    ],
)  # fmt: skip
def test_bad_requests_get_status_400_in_openais_shape(server, content, param):
    """Oracle: the fault that was put in."""
    client, service = server
    before = len(service.scheduler.seen)
    answer = client.post("/v1/chat/completions", content=content)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error"
    assert len(service.scheduler.seen) == before


def test_a_model_that_is_not_there_gets_status_404(server):
    """Oracle: OpenAI's code for it."""
    client, _ = server
    for answer in (ask(client, model="gpt"), client.get("/v1/models/gpt")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/scripted").json()["id"] == "scripted"


def test_a_turn_of_100_000_characters_is_read_from_its_end(server):
    """Oracle: the model's 64 tokens, and that the input is called cut."""
    client, service = server
    text = "word " * 20_000
    made = ask(client, messages=[{"role": "user", "content": f"{text} the end"}]).json()
    ids, _ = service.scheduler.seen[-1]
    assert len(ids) == made["usage"]["prompt_tokens"] == 64
    assert service.model.session.vocabulary.decode(ids).endswith("the end")
    assert made["input_cut"] is True
    prompt = client.post("/v1/completions", json={"model": "scripted", "prompt": text})
    assert prompt.json()["error"]["code"] == "context_length_exceeded"


# --- answers ---


def test_what_the_model_reads_and_how_it_samples(server):
    """Oracle: Cosmo's format of an input, by hand; the request's numbers."""
    client, service = server
    body = {
        "messages": [
            {"role": "system", "content": "At home.\n\nYou are Bo."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo"},
            {"role": "user", "content": "Well?"},
        ],
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "max_tokens": 9,
    }  # fmt: skip
    ask(client, **body)
    ids, samplings = service.scheduler.seen[-1]
    vocabulary = service.model.session.vocabulary
    text = "At home. <sep> You are Bo. <sep> Hi <turn> Yo <turn> Well?"
    assert ids == (*vocabulary.encode(text), vocabulary.eos_id)
    assert len(samplings) == 2
    one = samplings[0]
    assert (one.temperature, one.top_p, one.top_k, one.seed) == (0.5, 0.9, 7, 3)
    assert one.max_new_tokens == 9


def test_a_stream_holds_the_same_answer(server):
    """Oracle: the answer in one piece, with its counts."""
    client, _ = server
    for changes in ({}, {"stop": ", my"}, {"n": 3}, {"max_tokens": 2}):
        whole = ask(client, **changes).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        found = events(ask(client, **options, **changes).content)
        assert found[-1] == "[DONE]"
        counts = found[-2]
        assert counts["usage"] == whole["usage"] and counts["choices"] == []
        for choice in whole["choices"]:
            mine = [c for e in found[:-2] for c in e["choices"] if c["index"] == choice["index"]]
            text = "".join(one["delta"].get("content", "") for one in mine)
            assert text == choice["message"]["content"]
            assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [
                choice["finish_reason"]
            ]
            assert mine[0]["delta"]["role"] == "assistant"
        assert len({e["id"] for e in found[:-1]}) == 1


def test_why_answers_end(server):
    """Oracle: the script's text; a stop string is no part of the answer."""
    client, service = server
    for changes, text, reason in (
        ({}, "Hello there, my friend.", "stop"),
        ({"stop": [", my", "zz"]}, "Hello there", "stop"),
        ({"max_tokens": 1}, service.model.session.vocabulary.decode(
            service.model.session.vocabulary.encode(service.scheduler.text)[:1]), "length"),
    ):  # fmt: skip
        choice = ask(client, **changes).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)
    assert service.scheduler.active == 0


def test_log_probabilities_stand_beside_their_tokens(server):
    """Oracle: the script's: -0.5, -1.5, ... and its likeliest; bytes join to the text."""
    client, _ = server
    made = ask(client, logprobs=True, top_logprobs=2).json()["choices"][0]
    content = made["logprobs"]["content"]
    assert [one["logprob"] for one in content] == [-0.5 - n for n in range(len(content))]
    data = bytes(byte for one in content for byte in one["bytes"])
    assert data.decode().strip() == made["message"]["content"]
    assert [len(one["top_logprobs"]) for one in content] == [2] * len(content)
    streamed = events(ask(client, logprobs=True, top_logprobs=2, stream=True).content)
    parts = [c["logprobs"] for e in streamed[:-1] for c in e["choices"] if c["logprobs"]]
    assert [one for part in parts for one in part["content"]] == content
    cut = ask(client, logprobs=True, stop=", my").json()["choices"][0]["logprobs"]["content"]
    text = b"".join(bytes(one["bytes"]) for one in cut).decode().strip()
    assert text.startswith("Hello there") and "my" not in text
    body = {"model": "scripted", "prompt": "Hi", "logprobs": 1}
    found = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [one["logprob"] for one in content]
    assert [len(top) for top in found["top_logprobs"]] == [1] * len(content)
    assert found["text_offset"][0] == 0


def test_several_prompts_have_their_choices_in_order(server):
    """Oracle: OpenAI's order, prompt by prompt; each prompt is read once."""
    client, service = server
    before = len(service.scheduler.seen)
    body = {"model": "scripted", "prompt": ["Hi", "Well?"], "n": 2}
    made = client.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in made["choices"]] == [0, 1, 2, 3]
    assert len(service.scheduler.seen) == before + 2
    ids = [ids for ids, _ in service.scheduler.seen[-2:]]
    assert made["usage"]["prompt_tokens"] == sum(map(len, ids))


# --- labels ---


def test_moderations_are_canarys_labels(server):
    """Oracle: the scripted labels, in OpenAI's shape."""
    client, _ = server
    texts = ["Nice day!", "I want to scare my kids."]
    made = client.post("/v1/moderations", json={"input": texts}).json()
    casual, caution = made["results"]
    assert (casual["flagged"], caution["flagged"]) == (False, True)
    assert caution["label"] == "__needs_caution__" and caution["rots"]
    assert list(caution["categories"]) == list(safety.LABELS)
    assert [name for name, on in caution["categories"].items() if on] == ["__needs_caution__"]
    assert sum(caution["category_scores"].values()) == pytest.approx(1.0)
    talk = [{"role": "user", "content": texts[1]}, {"role": "assistant", "content": "Why?"}]
    talk.append({"role": "user", "content": "Never mind."})
    body = {"messages": talk, "model": "omni-moderation-latest"}
    assert client.post("/v1/moderations", json=body).json()["results"][0]["flagged"] is False
    parts = {"input": [{"type": "text", "text": texts[1]}]}  # as OpenAI's newer models take it
    assert client.post("/v1/moderations", json=parts).json()["results"][0]["flagged"] is True
    assert client.post("/v1/moderations", json={"input": 3}).json()["error"]["param"] == "input"
    wrong = client.post("/v1/moderations", json={"input": "a", "model": "gpt"})
    assert wrong.status_code == 404
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == ["scripted", "canary"]


def test_a_full_labeller_gets_status_429():
    """Oracle: the labeller's own limit."""
    labeller = ScriptedLabeller()
    labeller.full = True
    with served(labeller=labeller) as (client, _):
        assert client.post("/v1/moderations", json={"input": "a"}).status_code == 429
    assert labeller.closed


# --- limits ---


def test_a_full_queue_gets_status_429():
    """Oracle: the status and the header that clients wait by."""
    scheduler = ScriptedScheduler()
    scheduler.full = True
    with served(scheduler) as (client, _):
        for changes in ({}, {"stream": True}):
            answer = ask(client, **changes)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
        without = client.post("/v1/moderations", json={"input": "a"})
        assert without.json()["error"]["code"] == "model_not_found"


def test_the_deadline_ends_an_answer_and_frees_its_slot():
    """Oracle: status 504 before the first token, an error event after it; no slot in use."""
    with served(ScriptedScheduler(seconds=60), deadline=0.3) as (client, service):
        for changes in ({}, {"stream": True}):
            assert ask(client, **changes).status_code == 504
        wait_for(lambda: service.scheduler.active == 0)
    with served(ScriptedScheduler(mode="hang"), deadline=0.3) as (client, service):
        *texts, error = events(ask(client, stream=True).content)
        assert texts and error["error"]["code"] == "deadline_exceeded"
        wait_for(lambda: service.scheduler.active == 0)


def test_a_failing_model_is_an_error_without_its_reason():
    """Oracle: the scripted reason is for the log."""
    with served(ScriptedScheduler(mode="error")) as (client, _):
        assert ask(client).status_code == 500
        body = ask(client, stream=True).content
        assert events(body)[-1]["error"]["type"] == "server_error"
        assert b"secret" not in body


def test_a_client_that_leaves_frees_its_slot():
    """Oracle: the number of slots in use, for answers in one piece and for streams."""
    with served(ScriptedScheduler(mode="hang")) as (client, service):
        for changes in ({"n": 2}, {"n": 2, "stream": True}):
            with contextlib.suppress(httpx2.TimeoutException):
                body = {**HELLO, **changes}
                with client.stream("POST", "/v1/chat/completions", json=body, timeout=0.5) as made:
                    next(made.iter_bytes())
                    assert service.scheduler.active == 2
            wait_for(lambda: service.scheduler.active == 0)


def test_a_client_that_does_not_read_holds_no_slot():
    """Oracle: the answer is written to its end while nothing is read."""
    text = "Hello there, my friend. " * 5
    with served(ScriptedScheduler(text, mode="stop")) as (client, service):
        data = json.dumps({**HELLO, "stream": True, "n": 4}).encode()
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address) as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            head += f"content-length: {len(data)}"
            made.sendall(f"{head}\r\n\r\n".encode() + data)
            wait_for(lambda: service.scheduler.seen)
            wait_for(lambda: service.scheduler.active == 0)
        assert ask(client).status_code == 200


def test_many_clients_are_answered_together():
    """Oracle: 32 answers that take 0.3 seconds each, in less than 3 seconds."""
    scheduler = ScriptedScheduler(seconds=0.03)
    with served(scheduler) as (client, _):

        async def go():
            limits = httpx2.Limits(max_connections=32)
            async with httpx2.AsyncClient(trust_env=False, timeout=20, limits=limits) as many:
                url = f"{client.base_url}/v1/chat/completions"
                return await asyncio.gather(*(many.post(url, json=HELLO) for _ in range(32)))

        began = time.monotonic()
        found = asyncio.run(go())
        assert time.monotonic() - began < 3.0
        assert {one.status_code for one in found} == {200}


# --- operators ---


def test_health_and_draining():
    """Oracle: 200 while it serves, 503 once it stops; the scheduler is closed at the end."""
    with served(labeller=ScriptedLabeller()) as (client, service):
        assert client.get("/health").json() == {"status": "ok"}
        service.drain()
        assert client.get("/health").status_code == 503
        assert ask(client).status_code == 503
    assert service.scheduler.closed and service.labeller.closed


class HeldLabeller(ScriptedLabeller):
    """Labels nothing until `release` is set."""

    def __init__(self):
        self.asked, self.release = threading.Event(), threading.Event()

    async def label(self, turns, *, rots):
        self.asked.set()
        await asyncio.to_thread(self.release.wait, 10)
        return await super().label(turns, rots=rots)


@pytest.mark.parametrize("stream", [False, True])
def test_a_guarded_request_that_is_being_judged_is_answered(stream):
    """Oracle: the scripted answer, although the server drains; a later request gets 503."""
    labeller = HeldLabeller()
    service = api.Service(scripted_model(), ScriptedScheduler("Hello."), labeller=labeller)
    guard = doubles.guard(upstream.AsgiUpstream(api.inner(service)), labeller)
    made = api.application(service, further=guard.routes("/guard/v1"), around=guard.running)
    body = {**HELLO, "stream": stream}
    with (
        run.background(made, on_drain=service.drain) as url,
        httpx2.Client(base_url=url, trust_env=False, timeout=20) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        asked = pool.submit(client.post, "/guard/v1/chat/completions", json=body)
        assert labeller.asked.wait(10)
        service.drain()
        assert ask(client).status_code == 503
        labeller.release.set()
        answer = asked.result()
    assert answer.status_code == 200 and "Hello." in answer.text


def test_metrics_count_tokens_and_times(server):
    """Oracle: the requests made here."""
    client, service = server
    before = service.completion_tokens._value.get()
    usage = ask(client).json()["usage"]
    text = client.get("/metrics").text
    assert service.completion_tokens._value.get() == before + usage["completion_tokens"]
    for line in (
        "cosmo_active_slots 0.0",
        "cosmo_slots 4.0",
        "cosmo_queued_requests 0.0",
        "cosmo_compilations 0.0",
        'cosmo_answers_total{reason="stop"}',
        "cosmo_first_token_seconds_count",
        'cosmo_requests_total{method="POST",route="/v1/chat/completions",status="200"}',
    ):
        assert line in text, line


def test_no_text_is_logged(server, caplog):
    """Oracle: the words of a request and of its answer."""
    client, _ = server
    with caplog.at_level("DEBUG", "cosmo"):
        ask(client, messages=[{"role": "user", "content": "my-secret-word"}], stream=True)
        ask(client, messages=[{"role": "robot", "content": "my-secret-word"}])
        # Written after the answers.
        wait_for(lambda: {"200", "400"} <= set(caplog.text.split()))
    assert "my-secret-word" not in caplog.text and "my friend" not in caplog.text


def test_the_api_key_is_asked_for():
    """Oracle: the key of the application."""
    with served(limits={"api_key": "k"}) as (client, _):
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        headers = {"authorization": "Bearer k"}
        assert client.get("/v1/models", headers=headers).status_code == 200
