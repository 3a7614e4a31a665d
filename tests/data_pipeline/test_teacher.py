"""The scripted teacher by itself."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from data_pipeline.co3 import prompts
from data_pipeline.co3.teacher import server, voice
from tests.data_pipeline import loopback

PROMPTS = prompts.load()
STORY = "Ann takes the first step, and Ann moves closer to the goal."
ASKED = {
    "narrative": dict(literal="Ann took the first step. Ann moves a step closer to the goal."),
    "speaker": dict(narrative=STORY, x="Ann"),
    "dialogue": dict(narrative=STORY, x="Ann", y="her coach"),
    "continuation": dict(
        narrative=STORY, x="Ann", y="her coach", so_far="Ann: Hi.\nCoach: Hello.", next="Ann"
    ),
    "human": dict(speaker="Coach"),
    "head": dict(context=STORY, question="Ann moves, is this true?"),
    "head_alone": dict(question="Ann moves, is this true?"),
}


def request(stage: str, form: str) -> tuple[str, bytes]:
    asked = PROMPTS.request(stage, "t1", **ASKED[stage])
    body = {"model": "teacher", "logprobs": 5 if form == "completion" else True}
    if form == "completion":
        return "/v1/completions", json.dumps({**body, "prompt": asked.prompt}).encode()
    messages = [{"role": role, "content": text} for role, text in asked.messages]
    return "/v1/chat/completions", json.dumps({**body, "messages": messages}).encode()


@pytest.mark.parametrize("form", ["completion", "chat"])
@pytest.mark.parametrize("stage", ASKED)
def test_prompts_are_recognised_and_answered_alike(stage, form):
    """Oracle: the stage that the prompt was made for; the same question, the same answer."""
    path, data = request(stage, form)
    asked = json.loads(data)
    words = asked["prompt"] if form == "completion" else asked["messages"]
    assert voice.Voice(PROMPTS).recognise(form, words)[0] == stage
    first, second = (server.Teacher(server.Manners()).answer("POST", path, "", data) for _ in "12")
    assert first == second and first[0] == 200
    choice = json.loads(first[1])["choices"][0]
    text = choice["message"]["content"] if form == "chat" else choice["text"]
    assert text.strip()
    assert (choice["logprobs"] is not None) == (stage in ("human", "head", "head_alone"))
    other = server.Teacher(server.Manners(seed=1)).answer("POST", path, "", data)
    assert json.loads(other[1])["id"] != json.loads(first[1])["id"]


def test_misbehaviour_comes_at_its_rate():
    """Oracle: 30% of 3,000 questions, within four standard deviations; all kinds occur."""
    taught = server.Teacher(server.Manners(misbehave=0.3))
    for number in range(3000):
        data = json.dumps({"model": "teacher", "prompt": f"Question {number}"}).encode()
        taught.answer("POST", "/v1/completions", "", data)
    assert not taught.counts["errors"]
    bad = {name: n for name, n in taught.counts.items() if name.startswith("misbehaved")}
    # Two draws (answers that last, and ways to fail) that may both hit: 1 - (1-a)(1-b).
    share = 1 - (1 - 0.3 * 3 / 8) * (1 - 0.3 * 5 / 8)
    assert abs(sum(bad.values()) / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5
    assert len(bad) == 8


@pytest.mark.parametrize("kind", server.LASTING)
def test_spoilt_answers_can_be_said(kind):
    """Every phrase of a kind. Oracle: no error, and only "empty" says nothing."""
    for seed in range(60):
        assert bool(voice.spoiled(kind, seed).text) == (kind != "empty")


def connect(base_url: str) -> socket.socket:
    host, port = base_url.removeprefix("http://").removesuffix("/v1").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def http_request(body: bytes, *headers: str, path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: teacher", *headers]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


def asked(**fields) -> bytes:
    return json.dumps({"model": "teacher", "prompt": "Hello", **fields}).encode()


def answers(file, count: int) -> list[tuple[int, dict]]:
    """The next `count` answers of a connection, as (status, body)."""
    found = []
    for _ in range(count):
        status = int(file.readline().split()[1])
        length = 0
        while (line := file.readline().strip().lower()) != b"":
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        found.append((status, json.loads(file.read(length))))
    return found


def test_pipelined_requests_are_answered_in_their_order():
    """3,000 requests in one write, cut anywhere. Oracle: the answers of single requests."""
    bodies = [asked(prompt=f"Question {number}") for number in range(3000)]
    alone = [server.Teacher(server.Manners()).answer("POST", "/v1/completions", "", bodies[0])]
    with loopback.teacher() as (base_url, taught), connect(base_url) as caller:
        data = b"".join(http_request(body) for body in bodies)
        reading = caller.makefile("rb")
        found = []
        # No more in flight than sockets hold, or both sides would wait for each other.
        for start in range(0, 3000, 100):
            part = b"".join(http_request(body) for body in bodies[start : start + 100])
            caller.sendall(part[: len(part) // 3])
            caller.sendall(part[len(part) // 3 :])
            found += answers(reading, 100)
        assert len(data) > 2**18
        assert taught.counts["completions"] == 3000 and not taught.counts["errors"]
    assert {status for status, _ in found} == {200}
    assert found[0][1] == json.loads(alone[0][1])
    assert len({body["id"] for _, body in found}) == 3000


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": None},
        {"prompt": 5},
        {"prompt": ["a"]},
        {"model": None},
        {"model": ["teacher"]},
        {"max_tokens": "many"},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"max_tokens": 1.5},
        {"max_completion_tokens": []},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"stop": 5},
        {"stop": [5]},
        {"stop": [""]},
        {"stop": {}},
        {"stop": {"a": 1}},
        {"logprobs": "yes"},
        {"stream": True},
        {"stream": "yes"},
    ],
    ids=str,
)
def test_wrong_types_are_answered_with_400(fields):
    """Oracle: status 400 and a reason, and nothing counted as the teacher's own error."""
    taught = server.Teacher(server.Manners())
    status, body, kind = taught.answer("POST", "/v1/completions", "", asked(**fields))
    assert (status, kind) == (400, "") and json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [None, [], {}, "Hi", ["Hi"], [{}], [{"role": "user"}], [{"role": "user", "content": ["Hi"]}]],
    ids=str,
)
def test_wrong_messages_are_answered_with_400(messages):
    """Oracle: status 400."""
    body = json.dumps({"model": "teacher", "messages": messages}).encode()
    answer = server.Teacher(server.Manners()).answer("POST", "/v1/chat/completions", "", body)
    assert answer[0] == 400


@pytest.mark.parametrize(
    "body", [b"", b"null", b"5", b"[]", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000], ids=str
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/moderations"])
def test_a_body_that_is_no_object_is_answered_with_400(path, body):
    """Oracle: status 400."""
    assert server.Teacher(server.Manners()).answer("POST", path, "", body)[0] == 400


def test_a_text_as_stop_cuts_at_the_whole_text():
    """Oracle: the answer to the same request up to that text, which is in it."""
    taught = server.Teacher(server.Manners())

    def text(**fields):
        answer = taught.answer("POST", "/v1/completions", "", asked(**fields))
        return json.loads(answer[1])["choices"][0]["text"]

    assert text() == "That is hard to say."
    assert text(stop="hard") == text(stop=["hard"]) == "That is "


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /stats HTTP/1.1\r\nx: " + b"a" * 200_000, 431),
        (b"nonsense\r\n\r\n", 400),
        (b"GET  /stats HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),  # TLS
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: many\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: " + b"9" * 6000 + b"\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\ncontent-length: 99999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_no_request_is_answered_once_and_the_connection_ends(data, status):
    """Oracle: HTTP's status of each, then the end of the stream; the next caller is served."""
    with loopback.teacher() as (base_url, _):
        with connect(base_url) as caller:
            caller.sendall(data)
            reading = caller.makefile("rb")
            assert [code for code, _ in answers(reading, 1)] == [status]
            assert reading.read() == b""
        assert loopback.stats(base_url)["now"] == 1  # that very request


def test_expect_is_answered_once_before_the_body():
    """Oracle: one `100 Continue`, then the answer, though the body comes byte by byte."""
    data = http_request(asked(), "expect: 100-continue")
    end = data.index(b"\r\n\r\n") + 4
    with loopback.teacher() as (base_url, _), connect(base_url) as caller:
        reading = caller.makefile("rb")
        caller.sendall(data[:end])
        assert reading.readline() == b"HTTP/1.1 100 Continue\r\n" and reading.readline() == b"\r\n"
        for place in range(end, len(data)):
            caller.sendall(data[place : place + 1])
        assert answers(reading, 1)[0][0] == 200


def interpreter(version: str) -> str:
    """Return a Python of a version, on PATH or of pyenv; skip the test where there is none."""
    root = pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = [shutil.which(f"python{version}"), *root.glob(f"versions/{version}.*/bin/python")]
    for path in map(str, filter(None, found)):
        # pyenv's own commands on PATH fail where the version is not chosen.
        if subprocess.run([path, "-V"], capture_output=True).returncode == 0:
            return path
    pytest.skip(f"needs Python {version}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("version", ["this", "3.12", "3.13"])
def test_a_signal_ends_it_while_connections_are_open(version, number):
    """Connections that are idle, in the middle of a request, waiting. Property: exit code 0 within
    seconds, the counts as the last line, nothing on stderr."""
    python = sys.executable if version == "this" else interpreter(version)
    command = [python, "-m", "data_pipeline", "teacher", "--port=0", "--latency=60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        base_url = process.stdout.readline().split()[2].rstrip(",")
        idle, half, waiting, piped = (connect(base_url) for _ in range(4))
        idle.sendall(b"GET /stats HTTP/1.1\r\n\r\n")
        answers(idle.makefile("rb"), 1)
        half.sendall(http_request(asked())[:-3])
        waiting.sendall(http_request(asked()))
        piped.sendall(http_request(asked()) * 10)
        while loopback.stats(base_url)["now"] < 3:  # this request too
            pass
        process.send_signal(number)
        out, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, error) == (0, "")
    assert json.loads(out.splitlines()[-1])["completions"] == 2
