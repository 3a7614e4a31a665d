"""Serve the scripted teacher: as much of HTTP and of OpenAI's API as CO3 needs.

One process, one event loop, connections kept open. `GET /stats` returns the counts of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
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
        if path == "/stats":
            return 200, self._stats(), ""
        if self.manners.key and key != f"Bearer {self.manners.key}":
            return 401, _error("Incorrect API key provided"), ""
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
        try:
            asked = json.loads(data)
            words = asked["messages" if form == "chat" else "prompt"]
        except (ValueError, KeyError, TypeError):
            return 400, _error("the body is no JSON object with a prompt or messages"), ""
        if asked.get("model") != self.manners.model:
            return 404, _error(f"The model `{asked.get('model')}` does not exist"), ""
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
            "created": 0,
            "model": asked["model"],
            "choices": [{**choice, "logprobs": logprobs}],
            "usage": usage,
        }

    def _moderation(self, data: bytes) -> tuple[int, bytes, str]:
        self.counts["moderations"] += 1
        text = str(json.loads(data).get("input"))
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        scores = voice.moderation(text, number)
        flagged = {name: score > 0.5 for name, score in scores.items()}
        result = {"flagged": any(flagged.values()), "categories": flagged}
        result["category_scores"] = scores
        return 200, _json({"id": "modr", "model": "teacher", "results": [result]}), ""

    def _stats(self) -> bytes:
        stats = {"distinct": len(self.seen), "now": self.in_flight, "most_at_once": self.most}
        return _json({**self.counts, **stats})


class Connection(asyncio.Protocol):
    """One connection of a caller, with one request at a time."""

    def __init__(self, teacher: Teacher):
        self.teacher, self.buffer, self.busy, self.gone = teacher, bytearray(), False, False

    def connection_made(self, transport: Any) -> None:
        """Keep the transport of a new connection."""
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """Remember that the caller has left."""
        self.gone = True

    def data_received(self, data: bytes) -> None:
        """Collect bytes, and answer once a request is whole."""
        self.buffer += data
        if not self.busy:
            self._read()

    def _read(self) -> None:
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
        parts = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in parts}
        length = int(headers.get("content-length", 0))
        if len(self.buffer) < end + 4 + length:
            if headers.get("expect"):
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        body = bytes(self.buffer[end + 4 : end + 4 + length])
        del self.buffer[: end + 4 + length]
        method, path, _ = first.split(" ", 2)
        teacher, manners = self.teacher, self.teacher.manners
        self.busy = True
        teacher.in_flight += 1
        teacher.most = max(teacher.most, teacher.in_flight)
        try:
            answer = teacher.answer(method, path, headers.get("authorization", ""), body)
        except Exception as error:  # the caller must get a reply
            answer = 500, _error(f"the teacher failed: {type(error).__name__}: {error}"), ""
            teacher.counts["errors"] += 1
        wait = manners.slow_seconds if answer[2] == "slow" else manners.latency
        wait = 0 if path == "/stats" or answer[2] == "too many" else wait
        if wait:
            asyncio.get_running_loop().call_later(wait, self._write, *answer)
        else:
            self._write(*answer)

    def _write(self, status: int, body: bytes, kind: str) -> None:
        self.teacher.in_flight -= 1
        self.busy = False
        if self.gone:
            return
        reason = {200: "OK", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}
        head = f"HTTP/1.1 {status} {reason.get(status, 'Error')}\r\ncontent-type: application/json"
        head += f"\r\ncontent-length: {len(body)}"
        if status == 429 and kind != "too many":
            head += f"\r\nretry-after: {self.teacher.manners.retry_after}"
        data = head.encode() + b"\r\n\r\n" + body
        if kind == "cut":
            self.transport.write(data[: len(data) // 2])
            self.transport.close()
            return
        self.transport.write(data)
        if self.buffer:
            self._read()


def _shortened(said: voice.Answer, asked: dict) -> voice.Answer:
    """Cut an answer at `stop` and at the limit of tokens."""
    text, reason = said.text, said.finish_reason
    for stop in asked.get("stop") or []:
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
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: Connection(teacher), host, port, backlog=1024)


async def forever(teacher: Teacher, host: str, port: int, said: Any = print) -> None:
    """Serve until SIGINT or SIGTERM."""
    server = await serve(teacher, host, port)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    address = f"http://{host}:{server.sockets[0].getsockname()[1]}/v1"
    said(f"teacher at {address}, model {teacher.manners.model}", flush=True)
    # Not `async with server`: as of Python 3.12 it waits until every caller hangs up.
    with contextlib.closing(server):
        await stop.wait()
        said(json.dumps(json.loads(teacher._stats())), flush=True)
