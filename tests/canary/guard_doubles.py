"""Doubles for tests of the guard: a labeller by keywords, an upstream by script, whole apps."""

import asyncio
import contextlib
import dataclasses
import json
import random

from canary.guard import audit, judging, people, policy, routes, upstream
from canary.module import Chirp
from cosmo.tasks import safety

CASUAL, POSSIBLY, PROBABLY, CAUTION, HUMAN = safety.LABELS
# The label of a text is that of the most severe word in it.
WORDS = {"danger": HUMAN, "nasty": CAUTION, "rude": PROBABLY, "odd": POSSIBLY}
ROTS = ("It's wrong to be nasty.", "You should be kind.")


def chirp(label: str, rots: bool = True) -> Chirp:
    shares = dict.fromkeys(safety.LABELS, 0.05) | {label: 0.8}
    rules = ROTS if rots and label != CASUAL else ()
    return Chirp(label, shares, rules, label == HUMAN, label)


class Labels:
    """Labels the last turn by WORDS. It keeps all that it was asked, and what it passed."""

    def __init__(self, label=None, seconds=0.0, seed=None):
        self.of = label or self.by_words
        self.seconds, self.random = seconds, random.Random(seed) if seed is not None else None
        self.asked: list[tuple[str, ...]] = []
        self.passed: list[str] = []  # last turns that got the label casual
        self.now = self.most = 0
        self.cancelled = 0

    @staticmethod
    def by_words(turns) -> str:
        found = [label for word, label in WORDS.items() if word in turns[-1]]
        return max(found, key=safety.LABELS.index, default=CASUAL)

    async def label(self, turns, *, rots):
        assert all(turn.strip() for turn in turns)
        self.asked.append(tuple(turns))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if self.seconds:
                await asyncio.sleep(self.seconds)
            for _ in range(self.random.randrange(4) if self.random else 0):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1
        found = self.of(turns)
        if isinstance(found, Exception):
            raise found
        if found == CASUAL:
            self.passed.append(turns[-1])
        return chirp(found, rots)


class Script:
    """An upstream that answers by a function: request body -> (status, headers, pieces).

    A piece is bytes, a number of seconds to wait, or an exception to raise.
    """

    def __init__(self, answer):
        self.answer = answer
        self.calls: list[tuple[str, str, list, dict]] = []
        self.closed = self.finished = 0

    async def send(self, method, path, headers, body):
        asked = json.loads(body) if body else {}
        self.calls.append((method, path, headers, asked))
        status, returned, pieces = self.answer(asked)
        returned = upstream.forwarded(returned, upstream._NOT_RETURNED)
        return upstream.Answer(status, returned, upstream.Chunks(self._chunks(pieces), self._close))

    async def _chunks(self, pieces):
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                yield piece
        self.finished += 1

    async def _close(self):
        self.closed += 1

    async def close(self):
        pass


class Memory:
    """An audit log in memory."""

    def __init__(self):
        self.records = []

    async def write(self, record):
        self.records.append(dict(record))

    async def close(self):
        pass

    def of(self, kind):
        return [record for record in self.records if record["kind"] == kind]


def changed(**sections) -> policy.Policy:
    """The default policy with some fields changed: changed(stream={"enabled": False})."""
    base = policy.load()
    new = {}
    for name, fields in sections.items():
        part = getattr(base, name)
        new[name] = (
            {**part, **fields} if isinstance(part, dict) else dataclasses.replace(part, **fields)
        )
    return dataclasses.replace(base, **new)


def no_letters(text) -> float:
    return 0.0


def guard(
    up, labels=None, rules=None, log=None, callers=None, unread=no_letters, **more
) -> routes.Guard:
    rules = rules or policy.load()
    judge = judging.Judge(labels or Labels(), rules, len, 4000, unread)
    callers = callers or people.People(rules.intervention)
    return routes.Guard(up, judge, rules, log or Memory(), callers, **more)


def body(text="Fine.", **more) -> bytes:
    """An answer of chat in one piece."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps(
        {"id": "c-1", "object": "chat.completion", "choices": [choice], **more}
    ).encode()


def sse(*chunks, done=True) -> list[bytes]:
    """Events of a stream."""
    events = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]
    return [*events, b"data: [DONE]\n\n"] if done else events


def delta(index=0, finish=None, **fields) -> dict:
    choice = {"index": index, "delta": fields, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}


JSON = [("content-type", "application/json")]
EVENTS = [("content-type", "text/event-stream; charset=utf-8")]


async def request(app, path, value, *, method="POST", headers=(), on_bytes=None, leave=None):
    """(status, headers, body) of one request to an ASGI application, without a socket.

    `on_bytes` is called with each piece that leaves. The client leaves once `leave` is set.
    """
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    given = [("content-type", "application/json"), ("host", "localhost"), *headers]
    path, _, query = path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": method,
        "path": path, "raw_path": path.encode(), "query_string": query.encode(),
        "http_version": "1.1", "scheme": "http", "root_path": "",
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in given],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    sent = [{"type": "http.request", "body": data, "more_body": False}]
    got = {"status": None, "headers": [], "body": b""}

    async def receive():
        if sent:
            return sent.pop()
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start":
            got["status"], got["headers"] = message["status"], message["headers"]
        elif message.get("body"):
            got["body"] += message["body"]
            if on_bytes:
                on_bytes(message["body"])

    got["error"] = None
    try:
        await app(scope, receive, send)
    except Exception as error:
        got["error"] = error
    names = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in got["headers"]]
    return got["status"], names, got["body"], got["error"]


def events(data: bytes) -> list:
    """The JSON values of a stream that our guard wrote, and "[DONE]"."""
    found = []
    for line in data.decode().split("\n"):
        if line.startswith("data: "):
            text = line.removeprefix("data: ")
            found.append(text if text == "[DONE]" else json.loads(text))
    return found


@contextlib.contextmanager
def log_file(path):
    """A real audit log for asyncio code."""
    log = audit.LineLog(path)
    yield log
    asyncio.run(log.close())
