"""The HTTP ground of all servers, over real sockets and in process."""

import asyncio
import contextlib
import gzip
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from cosmo.engine.base.errors import UserError
from cosmo.engine.web import app, errors, metrics, run, sse

# --- server-sent events ---

# The examples of WHATWG HTML, 9.2.6 "Interpreting an event stream", with what it says they are.
STANDARD = [
    (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n",
     [("first event", "message", "1"), ("second event", "message", "")]),
    (b"data: YHOO\ndata: +2\ndata: 10\n\n", [("YHOO\n+2\n10", "message", "")]),
    (b"data\n\ndata\ndata\n\ndata:\n", [("", "message", ""), ("\n", "message", "")]),
    (b"data:test\n\ndata: test\n\n", [("test", "message", ""), ("test", "message", "")]),
    (b"event: add\ndata: 73857293\n\n", [("73857293", "add", "")]),
    (b"\xef\xbb\xbfdata: a\r\rdata: b\r\n\r\ndata: c\n\n",
     [("a", "message", ""), ("b", "message", ""), ("c", "message", "")]),
    ("data: a\u2028b\x0b\x85\n\n".encode(), [("a\u2028b\x0b\x85", "message", "")]),
]  # fmt: skip


@pytest.mark.parametrize("data,expected", STANDARD, ids=range(len(STANDARD)))
def test_events_are_those_of_the_standard(data, expected):
    """Oracle: the standard's own examples; cut at every place they are the same."""
    assert sse.Parser().feed(data) == expected
    for size in (1, 2, 3):
        parser = sse.Parser()
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        assert [event for piece in pieces for event in parser.feed(piece)] == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text()),
    st.lists(st.integers(1, 9), min_size=1),
    st.sampled_from(["\n", "\r", "\r\n"]),
)
@example(["😀 é", "a\r\nb"], [1], "\r\n")
def test_what_is_written_is_read_again_however_it_is_cut(texts, cuts, newline):
    """Oracle: the texts that were written, their line ends as LF."""
    data = b"".join(map(sse.event, texts)).replace(b"\n", newline.encode())
    parser, found, place, turn = sse.Parser(), [], 0, 0
    while place < len(data):
        size = cuts[turn % len(cuts)]
        found += parser.feed(data[place : place + size])
        place, turn = place + size, turn + 1
    plain = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]
    whole = [t.encode("utf-8", "backslashreplace").decode() for t in plain]
    assert [event.data for event in found] == whole


def test_an_event_without_an_end_costs_no_memory():
    """Oracle: the limit that is set."""
    parser = sse.Parser(max_chars=1000)
    for _ in range(9):
        parser.feed(b"data: " + b"x" * 100)
    with pytest.raises(sse.TooLongError):
        parser.feed(b"data: " + b"x" * 100)


# --- JSON ---


@pytest.mark.parametrize(
    "body,fault",
    [
        (b"", "Expecting value"),
        (b"{", "column 2"),
        (b"[1]", "got a list"),
        (b"3", "got a number"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": -Infinity}', "no JSON number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b"\xff{}", "not UTF-8"),
        (b'{"a":' + b"[" * 101 + b"]" * 101 + b"}", "nested too deeply"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4,300 digits"),
    ],
)
def test_bodies_that_are_no_json_object_are_refused_in_words(body, fault):
    """Oracle: the fault that was put in."""
    with pytest.raises(errors.ApiError, match=fault) as caught:
        app.parse_object(body)
    assert caught.value.status == 400
    assert caught.value.body()["error"]["type"] == "invalid_request_error"


def test_half_a_character_is_named_by_its_place():
    """Oracle: the place it was put at; a whole pair of escapes is a character."""
    with pytest.raises(errors.ApiError) as caught:
        app.parse_object(rb'{"messages": [{"content": "ok"}, {"content": "\ud83d"}]}')
    assert caught.value.param == "messages[1].content"
    assert app.parse_object(rb'{"a": "\ud83d\ude00"}') == {"a": "😀"}


def test_hostile_bodies_cost_no_more_than_their_size():
    """Oracle: an error that is short, and seconds; both grew with the square of the size."""
    name, count = "n" * 1_000_000, 300_000
    names = ",".join(f'"{n}":0' for n in range(count))
    bodies = {
        "given twice": "{" + names + ',"last":0,"last":0}',
        "half a character": '{"' + name + '":[' + "0," * count + '"\\ud83d"]}',
    }
    for fault, body in bodies.items():
        began = time.monotonic()
        with pytest.raises(errors.ApiError, match=fault) as caught:
            app.parse_object(body.encode())
        assert time.monotonic() - began < 10 and len(str(caught.value)) < 1000


# --- over a socket ---

closed = threading.Event()


async def echo(request):
    return JSONResponse(await app.json_object(request))


async def fail(request):
    raise RuntimeError("secret of the server")


async def full(request):
    raise errors.overloaded("the queue is full", 3)


async def health(request):
    return PlainTextResponse("ok")


async def endless(request):
    closed.clear()

    async def source():
        try:
            while True:
                yield sse.event({"text": "x" * int(request.query_params.get("size", 10))})
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    return sse.stream(source(), write_seconds=0.5)


async def broken(request):
    async def source():
        yield sse.event("first")
        raise RuntimeError("secret of the server")

    return sse.stream(source())


async def silent(request):
    async def source():
        await asyncio.sleep(0.3)
        yield sse.DONE

    return sse.stream(source(), ping_seconds=0.1)


COUNTS = metrics.Metrics()
ROUTES = [
    Route("/echo", echo, methods=["POST"]),
    Route("/fail", fail),
    Route("/full", full),
    Route("/health", health),
    Route("/endless", endless),
    Route("/broken", broken),
    Route("/silent", silent),
    COUNTS.route(),
]


@pytest.fixture(scope="module")
def url():
    made = app.application(
        ROUTES,
        api_key="the key",
        hosts=app.allowed_hosts("127.0.0.1"),
        max_body_bytes=1000,
        body_seconds=0.3,
        metrics=COUNTS,
    )
    with run.background(made, write_seconds=0.5) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    headers = {"authorization": "Bearer the key"}
    with httpx2.Client(base_url=url, headers=headers, trust_env=False) as made:
        yield made


def connect(url) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def head(method, path, *headers):
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", "authorization: Bearer the key"]
    return "\r\n".join([*lines, *headers, "", ""]).encode()


def read_all(made: socket.socket) -> bytes:
    pieces = []
    with contextlib.suppress(ConnectionError):
        while piece := made.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def wait_for(condition):
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_every_error_has_openais_shape(client):
    """Oracle: OpenAI's documented body, and the status of each error."""
    for method, path, status, type, code in (
        ("GET", "/nowhere", 404, "invalid_request_error", "unknown_url"),
        ("GET", "/echo", 405, "invalid_request_error", "method_not_allowed"),
        ("POST", "/echo", 400, "invalid_request_error", "invalid_json"),
        ("GET", "/full", 429, "rate_limit_error", "queue_full"),
        ("GET", "/fail", 500, "server_error", None),
    ):
        answer = client.request(method, path)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (status, type, code)
        assert error.keys() == {"message", "type", "param", "code"}
        assert "secret" not in answer.text and "Traceback" not in answer.text
    assert client.get("/full").headers["retry-after"] == "3"
    packed = {"content": gzip.compress(b"{}"), "headers": {"content-encoding": "gzip"}}
    answer = client.post("/echo", **packed)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")


def test_the_key_is_asked_for_but_for_health(client, url):
    """Oracle: the key given to the application."""
    for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "the key"}):
        answer = httpx2.post(f"{url}/echo", headers=headers, json={}, trust_env=False)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx2.get(f"{url}/health", trust_env=False).text == "ok"
    assert client.post("/echo", json={"a": "é"}).json() == {"a": "é"}


def test_foreign_hosts_and_pages_are_refused(client):
    """Oracle: the attacks, DNS rebinding and a page of another site; no CORS header is sent."""
    for headers, status in (
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:80"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "localhost:99"}, 200),
        ({"host": "[::1]:99"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"host": "localhost:99", "origin": "http://localhost:99"}, 200),
        ({"host": "localhost:99", "origin": "http://localhost:98"}, 403),
    ):
        answer = client.post("/echo", headers=headers, json={})
        assert answer.status_code == status, headers
        assert "access-control-allow-origin" not in answer.headers
    assert app.allowed_hosts("0.0.0.0") is None


def test_large_bodies_are_refused_and_the_answer_is_read(client, url):
    """Oracle: the limit of 1,000 bytes, of declared lengths and of chunks."""
    fits = json.dumps({"a": "x" * 980}).encode()
    assert client.post("/echo", content=fits).status_code == 200
    assert client.post("/echo", content=b"x" * 5_000_000).status_code == 413
    answer = client.post("/echo", content=(b"x" * 100 for _ in range(1000)))
    assert answer.json()["error"]["code"] == "body_too_large"


def test_slow_bodies_are_refused(url):
    """Oracle: the limit of 0.3 seconds."""
    with connect(url) as made:
        made.sendall(head("POST", "/echo", "content-length: 10") + b"{")
        assert read_all(made).startswith(b"HTTP/1.1 408")


def test_heads_that_never_end_are_cut(url, monkeypatch):
    """Oracle: the limit, set to 0.3 seconds, also where a byte comes now and then."""
    monkeypatch.setattr(run, "HEAD_SECONDS", 0.3)
    with connect(url) as idle, connect(url) as slow:
        assert read_all(idle) == b""
        with contextlib.suppress(ConnectionError):
            for _ in range(10):
                slow.sendall(b"G")
                time.sleep(0.1)
        assert not read_all(slow)


def test_a_source_is_closed_when_the_client_leaves(client):
    """Oracle: the source's own `finally`."""
    with client.stream("GET", "/endless") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        pieces = answer.iter_bytes()  # dropped, it would close the connection at once
        next(pieces)
        assert not closed.is_set()
    assert closed.wait(5)


def test_a_client_that_does_not_read_is_dropped(url):
    """Oracle: the limit of 0.5 seconds; the source is closed, the connection cut."""
    with connect(url) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.sendall(head("GET", "/endless?size=100000"))
        assert closed.wait(10)


def test_a_source_that_never_began_is_closed_too():
    """Oracle: `on_close`; the client has left before the first piece."""
    noted = []

    async def source():
        yield sse.DONE

    async def left():
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.sleep(5)

    made = sse.stream(source(), on_close=lambda: noted.append("closed"))
    asyncio.run(made({"type": "http"}, left, send))
    assert noted == ["closed"]


def test_a_stream_that_fails_is_cut(client):
    """Oracle: an HTTP body without its end, which clients notice."""
    with (
        pytest.raises(httpx2.RemoteProtocolError),
        client.stream("GET", "/broken") as answer,
    ):
        assert b"secret" not in b"".join(answer.iter_bytes())


def test_silence_is_filled_with_comments(client):
    """Oracle: the events read are the source's alone."""
    body = client.get("/silent").content
    assert body.count(sse.PING) >= 1
    assert [event.data for event in sse.Parser().feed(body)] == ["[DONE]"]


def test_metrics_count_by_route_and_status(client):
    """Oracle: the requests made here; paths of no route share one label."""
    client.get("/health")
    client.get("/nowhere/secret-words")
    text = client.get("/metrics").text
    assert 'cosmo_requests_total{method="GET",route="/health",status="200"}' in text
    assert 'route="other",status="404"' in text
    assert "secret-words" not in text
    assert 'cosmo_request_seconds_bucket{le="0.005",route="/health"}' in text


def test_the_log_has_paths_and_no_texts(client, caplog):
    """Oracle: the words that were sent."""
    with caplog.at_level("INFO", "cosmo.web"):
        client.post("/echo?q=in-the-query", json={"content": "in-the-body"})
        wait_for(lambda: "POST /echo 200" in caplog.text)  # written after the answer
    assert "in-the-body" not in caplog.text and "in-the-query" not in caplog.text


# --- start and end ---


def test_a_port_in_use_is_an_error_that_names_it(url):
    """Oracle: the port of the server that runs."""
    port = int(url.rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"port {port} at 127.0.0.1 is in use"):
        run.listen("127.0.0.1", port)
    for host, number, fault in (
        ("127.0.0.1", 70000, "0 .any free one. to 65535"),
        ("no.such.host.invalid", 0, "no.such.host.invalid"),
    ):
        with pytest.raises(UserError, match=fault):
            run.listen(host, number)


def test_while_a_model_is_loaded_the_answer_is_503():
    """Oracle: the status and OpenAI's shape; then the same socket serves."""
    listener = run.listen("127.0.0.1", 0)
    address = run.address(listener)
    with run.starting(listener), connect(address) as silent:
        for path in ("/health", "/v1/models"):
            answer = httpx2.get(f"{address}{path}", trust_env=False)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.json()["error"]["code"] == "unavailable"
        assert read_all(silent) == b""
    listener.close()


STARTING = """
import hashlib
from cosmo.engine.web import run

listener = run.listen("127.0.0.1", 0)
with run.starting(listener):
    print(run.address(listener), flush=True)
    # A minute of one call that holds the main thread, as compiling does.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_that_is_starting(number):
    """Oracle: exit code 0 within seconds, and the line that names the signal."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(number)
        try:
            assert process.wait(10) == 0
        finally:
            process.kill()
        assert f"{number.name}: stopped before the model was loaded" in process.stderr.read()


@pytest.mark.parametrize(
    "sent,status,says",
    [
        (b"hello\r\n\r\n", 400, "this is no HTTP request"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET / HTTP/1.1\r\nhost: a\r\na b: c\r\n\r\n", 400, "this is no HTTP request"),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n", 400, "Content-Length"),
        (b"GET /" + b"a" * 300_000, 431, "more than 65,536 bytes"),
        (b"GET / HTTP/1.1\r\nhost: a\r\na: " + b"b" * 300_000, 431, "more than 65,536 bytes"),
    ],
    ids=["words", "no host", "header", "length", "long line", "large headers"],
)
def test_what_is_no_http_gets_an_error_in_openais_shape(url, sent, status, says):
    """Oracle: the status of RFC 9110 and 6585, and the fields of OpenAI's errors."""
    with connect(url) as made:
        made.sendall(sent)
        top, _, body = read_all(made).partition(b"\r\n\r\n")
    assert top.startswith(f"HTTP/1.1 {status} ".encode())
    error = json.loads(body)["error"]
    assert says in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "bad_http")


SCRIPT = """
import asyncio, sys
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from cosmo.engine.web import app, run

async def slow(request):
    print("asked", flush=True)
    await asyncio.sleep(float(request.query_params["seconds"]))
    return PlainTextResponse("done")

made = app.application([Route("/slow", slow)], api_key=None)
run.serve(made, port=0, drain_seconds=float(sys.argv[1]),
          on_drain=lambda: print("draining", flush=True))
print("ended", flush=True)
"""


def test_sigterm_finishes_what_is_in_flight():
    """Oracle: the answer of the request in flight, the exit code 0; a second one is refused."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "5"], stdout=subprocess.PIPE, text=True
    ) as process:
        address = process.stdout.readline().removeprefix("listening on ").strip()
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx2.get(f"{address}/slow?seconds=0.6", trust_env=False)
            )
        )
        thread.start()
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "draining\n"
        time.sleep(0.2)
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{address}/slow?seconds=0", trust_env=False)
        thread.join()
        assert answers[0].text == "done"
        assert process.wait(10) == 0
        assert process.stdout.readline() == "ended\n"


def test_requests_that_outlast_the_drain_are_cut():
    """Oracle: the limit of 0.2 seconds; exit code 0."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "0.2"], stdout=subprocess.PIPE, text=True
    ) as process:
        address = process.stdout.readline().removeprefix("listening on ").strip()
        with connect(address) as made:
            made.sendall(head("GET", "/slow?seconds=60"))
            assert process.stdout.readline() == "asked\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0


@pytest.mark.slow
def test_a_thousand_idle_connections_block_nobody(client, url):
    """Oracle: a request that is answered in its usual time."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    idle = [connect(url) for _ in range(1000)]
    try:
        began = time.monotonic()
        assert client.get("/health").status_code == 200
        assert time.monotonic() - began < 1.0
    finally:
        for made in idle:
            made.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
