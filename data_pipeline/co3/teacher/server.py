"""Serve the scripted teacher: as much of HTTP and of OpenAI's API as CO3 needs.

One process, one event loop, connections kept open. `GET /stats` returns the counts of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import http
import json
import signal
from collections import Counter
from typing import Any

from data_pipeline.co3 import prompts as prompt_files
from data_pipeline.co3.teacher import voice

# Kinds of misbehaviour. Another try draws the passing ones anew. The lasting ones are answers, and
# the same request gets the same answer always.
PASSING = ("429", "500", "slow", "cut", "truncated")
LASTING = ("garbage", "empty", "refusal")
MAX_HEAD_BYTES, MAX_BODY_BYTES = 2**16, 2**24
LINGER_SECONDS = 1.0  # to read on after the last answer of a connection
# The types of a request's fields, all of which may be missing or null.
_INTEGERS = ("max_tokens", "max_completion_tokens", "n", "seed", "top_logprobs")
_NUMBERS = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
OPTIONAL: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_INTEGERS, (int,)),
    **dict.fromkeys(_NUMBERS, (int, float)),
    "logprobs": (int, bool),
    "stop": (str, list),
    "stream": (bool,),
}
FORMS = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}


@dataclasses.dataclass(frozen=True)
class Manners:
    """Settings of the teacher. Times are in seconds; `misbehave` is the share of bad answers."""

    latency: float = 0.0
    misbehave: float = 0.0
    kinds: tuple[str, ...] = PASSING + LASTING
    retry_after: str = "0.1"
    slow_seconds: float = 1.0
    logprobs: bool = True
    forms: tuple[str, ...] = ("completion", "chat")
    model: str = "teacher"
    key: str = ""  # if given, callers must show it
    most_at_once: int | None = None  # more calls in flight get status 429 at once
    seed: int = 0


class Teacher:
    """Answers requests and counts them."""

    def __init__(self, manners: Manners, prompts: prompt_files.Prompts | None = None):
        self.manners = manners
        self.voice = voice.Voice(prompts or prompt_files.load())
        self.seen: Counter = Counter()  # hash of a request -> times asked
        self.counts: Counter = Counter()
        self.in_flight = self.most = 0  # calls now, and at most so far

    def answer(self, method: str, path: str, key: str, data: bytes) -> tuple[int, bytes, str]:
        """Return (status, body, kind of misbehaviour or "") for one request."""
        try:
            return self._answer(method, path, key, data)
        except RefusedError as refused:
            return refused.status, _error(str(refused)), ""

    def _answer(self, method: str, path: str, key: str, data: bytes) -> tuple[int, bytes, str]:
        # Some clients add a query, such as ?api-version.
        path = path.partition("?")[0]
        # Before the key is checked: counts are no secret.
        if path == "/stats":
            return 200, self._stats(), ""
        if self.manners.key and key != f"Bearer {self.manners.key}":
            return 401, _error("Incorrect API key provided"), ""
        # This call is counted already.
        if self.manners.most_at_once is not None and self.in_flight > self.manners.most_at_once:
            self.counts["too many at once"] += 1
            return 429, _error("Too many requests at once"), "too many"
        if method == "GET" and path == "/v1/models":
            models = [{"id": self.manners.model, "object": "model", "owned_by": "teacher"}]
            return 200, _json({"object": "list", "data": models}), ""
        if path == "/v1/moderations":
            return self._moderation(data)
        form = FORMS.get(path)
        if method != "POST" or form not in self.manners.forms:
            return 404, _error(f"Unknown request URL: {method} {path}"), ""
        asked = _json_object(data)
        words = _words(form, asked)
        _check_types(asked)
        if asked["model"] != self.manners.model:
            return 404, _error(f"The model `{asked['model']}` does not exist"), ""
        return self._completion(form, asked, words, data)

    def _completion(
        self, form: str, asked: dict, words: Any, data: bytes
    ) -> tuple[int, bytes, str]:
        # By the content alone, so that the order of requests changes no answer.
        digest = hashlib.blake2b(data, digest_size=8, key=b"%d" % self.manners.seed).digest()
        number = int.from_bytes(digest, "big")
        kind = self._mood(number, self.seen[number])
        self.seen[number] += 1
        self.counts["completions"] += 1
        if kind:
            self.counts[f"misbehaved: {kind}"] += 1
        if kind == "429":
            return 429, _error("Rate limit reached"), kind
        if kind == "500":
            return 500, _error("The server had an error"), kind
        if kind in LASTING:
            said = voice.spoiled(kind, number)
        else:
            said = self.voice.answer(form, words, number)
        said = _shortened(said, asked)
        body = _json(self._worded(form, asked, said, digest.hex()))
        # Under a header that fits the shorter body: the caller sees whole HTTP and broken JSON.
        return 200, body[: len(body) * 2 // 3] if kind == "truncated" else body, kind

    def _mood(self, number: int, times: int) -> str:
        """Draw the misbehaviour for the `times`-th try of a request, from 0; mostly ""."""
        if not self.manners.misbehave:
            return ""
        for salt, kinds in (("lasting", LASTING), (f"passing {times}", PASSING)):
            kinds = [kind for kind in kinds if kind in self.manners.kinds]
            share = self.manners.misbehave * len(kinds) / len(self.manners.kinds)
            draw = hashlib.blake2b(f"{salt} {number}".encode(), digest_size=8).digest()
            chance = int.from_bytes(draw, "big") / 2**64
            if chance < share:
                return kinds[int(chance / share * len(kinds))]
        return ""

    def _worded(self, form: str, asked: dict, said: voice.Answer, name: str) -> dict:
        logprobs = None
        if said.likely and asked.get("logprobs") and self.manners.logprobs:
            likely = sorted(said.likely.items(), key=lambda item: -item[1])
            if form == "chat":
                top = [{"token": t.strip(), "logprob": p} for t, p in likely]
                first = {"token": said.text.strip(), "logprob": top[0]["logprob"]}
                logprobs = {"content": [{**first, "top_logprobs": top}]}
            else:
                first = {"tokens": [said.text], "token_logprobs": [likely[0][1]]}
                logprobs = {**first, "top_logprobs": [dict(likely)], "text_offset": [0]}
        words = json.dumps(asked.get("messages") or asked.get("prompt"))
        used = (voice.tokens(words), voice.tokens(said.text))
        choice: dict[str, Any] = {"index": 0, "finish_reason": said.finish_reason}
        if form == "chat":
            choice["message"] = {"role": "assistant", "content": said.text.strip()}
        else:
            choice["text"] = said.text
        usage = {"prompt_tokens": used[0], "completion_tokens": used[1], "total_tokens": sum(used)}
        return {
            "id": f"cmpl-{name}",
            "object": "chat.completion" if form == "chat" else "text_completion",
            # No clock, so that equal requests get equal bytes.
            "created": 0,
            "model": asked["model"],
            "choices": [{**choice, "logprobs": logprobs}],
            "usage": usage,
        }

    def _moderation(self, data: bytes) -> tuple[int, bytes, str]:
        self.counts["moderations"] += 1
        texts = _json_object(data).get("input")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RefusedError(400, "input is no text and no list of texts")
        results = []
        for text in texts:
            # A lone surrogate has no UTF-8.
            digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
            scores = voice.moderation(text, int.from_bytes(digest, "big"))
            flagged = {name: score > 0.5 for name, score in scores.items()}
            result = {"flagged": any(flagged.values()), "categories": flagged}
            results.append({**result, "category_scores": scores})
        return 200, _json({"id": "modr", "model": "teacher", "results": results}), ""

    def _stats(self) -> bytes:
        stats = {"distinct": len(self.seen), "now": self.in_flight, "most_at_once": self.most}
        return _json({**self.counts, **stats})


class RefusedError(Exception):
    """A request that is not answered: an HTTP status, and the reason as the text."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")  # Python reads NaN and Infinity


def _json_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in a request's body. Raises RefusedError."""
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise RefusedError(400, "the body is no JSON object")
    return value


def _words(form: str, asked: dict[str, Any]) -> Any:
    """Return the prompt or the messages of a request. Raises RefusedError."""
    if form == "completion":
        if not isinstance(asked.get("prompt"), str):
            raise RefusedError(400, "prompt is no text")
        return asked["prompt"]
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedError(400, "messages is no list of messages")
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise RefusedError(400, "a message has no role and content that are texts")
    return messages


def _check_types(asked: dict[str, Any]) -> None:
    """Raise RefusedError if a field of a request is of another type than OpenAI's API has."""
    if not isinstance(asked.get("model"), str):
        raise RefusedError(400, "model is no text")
    for name, kinds in OPTIONAL.items():
        value = asked.get(name)
        # A bool is an int in Python, and no number in JSON.
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if value is not None and wrong:
            raise RefusedError(400, f"{name} is of the wrong type")
    for name in ("max_tokens", "max_completion_tokens"):
        if asked.get(name) is not None and asked[name] < 1:
            raise RefusedError(400, f"{name} is below 1")
    if asked.get("stream"):
        raise RefusedError(400, "stream: the teacher answers in one piece")
    if not all(isinstance(stop, str) and stop for stop in _stops(asked)):
        raise RefusedError(400, "stop has an empty text, or something that is not text")


def _stops(asked: dict[str, Any]) -> list[str]:
    stop = asked.get("stop") or []
    return [stop] if isinstance(stop, str) else stop


async def _serve_connection(
    teacher: Teacher, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answer the requests of one connection, one after another, until the caller closes it."""
    try:
        while await _serve_request(teacher, reader, writer):
            pass
        await _hang_up(reader, writer)
    except (ConnectionError, asyncio.IncompleteReadError):
        pass  # the caller has left
    except asyncio.CancelledError:
        # The teacher ends. Python 3.11's streams would log the cancellation as an error.
        writer.transport.abort()
    finally:
        writer.close()


async def _serve_request(teacher: Teacher, reader: Any, writer: Any) -> bool:
    """Answer one request. Return whether the connection is kept."""
    try:
        method, path, headers, body = await _read_request(reader, writer)
    except RefusedError as refused:
        # Where the next request begins cannot be known.
        writer.write(_response(refused.status, _error(str(refused))))
        return False
    manners = teacher.manners
    teacher.in_flight += 1
    teacher.most = max(teacher.most, teacher.in_flight)
    try:
        try:
            answer = teacher.answer(method, path, headers.get("authorization", ""), body)
        except Exception as error:  # the caller must get a reply
            answer = 500, _error(f"the teacher failed: {type(error).__name__}: {error}"), ""
            teacher.counts["errors"] += 1
        status, body, kind = answer
        wait = manners.slow_seconds if kind == "slow" else manners.latency
        if wait and path != "/stats" and kind != "too many":
            await asyncio.sleep(wait)
    finally:
        teacher.in_flight -= 1
    retry_after = manners.retry_after if status == 429 and kind != "too many" else None
    data = _response(status, body, retry_after)
    if kind == "cut":
        # The connection ends before the promised length, as at a lost one.
        writer.write(data[: len(data) // 2])
        return False
    writer.write(data)
    # Waits for a slow reader, so that answers do not pile up here.
    await writer.drain()
    return headers.get("connection", "").lower() != "close"


async def _read_request(reader: Any, writer: Any) -> tuple[str, str, dict[str, str], bytes]:
    """Return (method, path, headers, body) of the next request. Raises RefusedError.

    Raises IncompleteReadError once the caller has closed the connection.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError as error:
        raise RefusedError(431, f"the header has more than {MAX_HEAD_BYTES} bytes") from error
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    request = first.split(" ")
    if len(request) != 3 or not request[2].startswith("HTTP/1."):
        raise RefusedError(400, "no request of HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip()
        # Two lengths would leave open where the next request begins.
        if not colon or (name == "content-length" and headers.get(name, value) != value):
            raise RefusedError(400, "a header without a name, or with two lengths")
        headers[name] = value
    if request[2] == "HTTP/1.0":
        headers["connection"] = "close"
    if "transfer-encoding" in headers:
        raise RefusedError(411, "give the body's content-length: chunks are not read")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise RefusedError(400, "content-length is not a number")
    # By its digits first: Python converts no number of 5,000 digits.
    if len(length) > 12 or int(length) > MAX_BODY_BYTES:
        raise RefusedError(413, f"the body has more than {MAX_BODY_BYTES} bytes")
    # curl waits for this before it sends a large body.
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return request[0], request[1], headers, await reader.readexactly(int(length))


def _response(status: int, body: bytes, retry_after: str | None = None) -> bytes:
    head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json"
    head += f"\r\ncontent-length: {len(body)}"
    head += f"\r\nretry-after: {retry_after}" if retry_after is not None else ""
    return head.encode() + b"\r\n\r\n" + body


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """End the stream of answers, and read on for a moment."""
    # Closing a socket with unread bytes resets it, and the caller may lose the last answer.
    await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
    with contextlib.suppress(asyncio.TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while await reader.read(MAX_HEAD_BYTES):
                pass


def _shortened(said: voice.Answer, asked: dict) -> voice.Answer:
    """Cut an answer at `stop` and at the limit of tokens."""
    text, reason = said.text, said.finish_reason
    for stop in _stops(asked):
        text = text.split(stop)[0]
    # As `voice.tokens` counts: four letters a token.
    most = 4 * (asked.get("max_tokens") or asked.get("max_completion_tokens") or 4096)
    if len(text) > most:
        text, reason = text[:most], "length"
    return dataclasses.replace(said, text=text, finish_reason=reason)


def _error(message: str) -> bytes:
    return _json({"error": {"message": message, "type": "teacher"}})


def _json(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


async def serve(teacher: Teacher, host: str, port: int) -> asyncio.Server:
    """Listen; port 0 takes a free port (`server.sockets[0].getsockname()[1]`)."""
    answer = functools.partial(_serve_connection, teacher)
    # asyncio's backlog of 100 is less than the callers that connect at once.
    return await asyncio.start_server(answer, host, port, backlog=1024, limit=MAX_HEAD_BYTES)


async def forever(teacher: Teacher, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM."""
    server = await serve(teacher, host, port)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    address = f"http://{host}:{server.sockets[0].getsockname()[1]}/v1"
    print(f"teacher at {address}, model {teacher.manners.model}", flush=True)
    # Not `async with server`: as of Python 3.12 it waits until every caller hangs up. asyncio.run
    # cancels the connections' tasks, which close them.
    with contextlib.closing(server):
        await stop.wait()
        print(json.dumps(json.loads(teacher._stats())), flush=True)
