"""Serve the chat page with scripted answers: for its tests and pictures, without a model.

The last user turn chooses the answer. `Script` holds what a test may change.
"""

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cosmo.serve.page import page
from cosmo.tasks import safety

MODEL = "scripted-answers"
SET_TEXT = (
    "I am a computer program and may not be the help that you need now. "
    "Please talk to someone whom you trust, or call your local emergency number."
)
# A part of a user's turn -> its label, its rules of thumb.
VERDICTS = {
    "never find out": (2, ("You shouldn't encourage others to lie.",)),
    "boss": (3, ("You shouldn't lie to your boss.", "It's better to ask for a day off.")),
    "nobody would notice": (4, ("You should reach out to someone whom you trust.",)),
    "possibly": (1, ("It's good to think before you speak.",)),
    "probably": (2, ("You should be kind to your friends.",)),
}
# A part of a user's turn -> the guarded answer, the answer without a guard.
ANSWERS = {
    "boss": (
        "I understand, a good concert is hard to miss. Still, your boss relies on what you say. "
        "Could you ask for a day off next time?",
        "Nice! Your boss will never find out. Which band was it?",
    ),
    "new city": (
        "That sounds exciting, and a little lonely too. What brought you there?",
        "That sounds exciting, and a little lonely too. What brought you there?",
    ),
    "a job": (
        "Congratulations on the new job! Do you like your colleagues so far?",
        "Congratulations on the new job! Do you like your colleagues so far?",
    ),
}
DEFAULT_ANSWER = "I am glad that you told me. How do you feel about it now?"


@dataclasses.dataclass
class Script:
    """Behaviour of the scripted server, and the `requests` that it got as (path, body)."""

    canary: bool = True
    takes_seed: bool = True
    key: str | None = None
    seconds_between_words: float = 0.0
    held: bool = False  # while it is set, a stream waits after its third word
    failures: int = -1  # of the scripted errors, as many happen; -1 is all
    answer: str | None = None  # instead of a scripted one
    bytes_at_a_time: int = 0  # cuts the stream into pieces, with CR LF as ends of lines
    verdict: dict[str, Any] | None = None
    requests: list[tuple[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    left: int = 0  # streams that the client left


def verdict(text: str) -> dict[str, Any]:
    """Return label, probabilities, rules of thumb and `needs_human` of a turn."""
    found = [value for part, value in VERDICTS.items() if part in text.lower()]
    rank, rots = found[0] if found else (0, ())
    shares = (0.86, 0.07, 0.04, 0.02, 0.01)
    probabilities = {label: shares[abs(rank - place)] for place, label in enumerate(safety.LABELS)}
    total = sum(probabilities.values())
    return {
        "label": safety.LABELS[rank],
        "probabilities": {label: share / total for label, share in probabilities.items()},
        "rots": list(rots),
        "needs_human": rank == len(safety.LABELS) - 1,
    }


def failure(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Return an error in OpenAI's shape."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


# A part of a user's turn -> the refusal that it gets.
FAILURES = {
    "error 400": (400, "temperature must be at least 0, got -1", None),
    "error 429": (429, "the queue of 256 requests is full", {"Retry-After": "7"}),
    "error 500": (500, "the model failed", None),
}


def application(script: Script) -> Starlette:
    """Return the page and an API that answers as `script` has it."""

    def refused(request: Request) -> Response | None:
        given = request.headers.get("authorization")
        if script.key is not None and given != f"Bearer {script.key}":
            return failure(401, "no valid API key")
        return None

    async def models(request: Request) -> Response:
        model = {"id": MODEL, "object": "model", "canary": script.canary}
        model["takes_seed"] = script.takes_seed
        return refused(request) or JSONResponse({"object": "list", "data": [model]})

    async def moderations(request: Request) -> Response:
        body = await request.json()
        script.requests.append((request.url.path, body))
        if refusal := refused(request):
            return refusal
        text = body["messages"][-1]["content"]
        if "error label" in text:
            return failure(503, "Canary is loading")
        found = script.verdict or verdict(text)
        result = {
            "flagged": found["label"] != safety.LABELS[0],
            "categories": {label: label == found["label"] for label in safety.LABELS},
            "category_scores": found["probabilities"],
            **{name: found[name] for name in ("label", "rots", "needs_human")},
        }
        return JSONResponse({"id": "modr-1", "model": "canary", "results": [result]})

    async def completions(request: Request) -> Response:
        body = await request.json()
        script.requests.append((request.url.path, body))
        text = body["messages"][-1]["content"]
        if refusal := refused(request):
            return refusal
        for part, (status, message, headers) in FAILURES.items():
            if part in text and script.failures:
                script.failures -= 1
                return failure(status, message, headers)
        guarded = request.url.path.startswith("/guard/")
        stream = chunks(script, text, guarded)
        if script.bytes_at_a_time:
            stream = pieces(stream, script.bytes_at_a_time)
        return StreamingResponse(stream, headers={"Content-Type": "text/event-stream"})

    return Starlette(
        routes=[
            Route("/", page),
            Route("/v1/models", models),
            Route("/v1/moderations", moderations, methods=["POST"]),
            Route("/v1/chat/completions", completions, methods=["POST"]),
            Route("/guard/v1/chat/completions", completions, methods=["POST"]),
        ]
    )


async def chunks(script: Script, text: str, guarded: bool) -> AsyncIterator[bytes]:
    """Yield the server-sent events of an answer to `text`, a word a chunk."""
    found = script.verdict or verdict(text)
    answers = next((pair for part, pair in ANSWERS.items() if part in text.lower()), None)
    answer = script.answer or (answers[0 if guarded else 1] if answers else DEFAULT_ANSWER)
    guard: dict[str, Any] = {}
    if guarded:
        rank = safety.LABELS.index(found["label"])
        action = "intervene" if found["needs_human"] else "guide" if rank else "pass"
        guard = {**found, "action": action, "answer_labels": []}
        if action == "intervene":
            answer = SET_TEXT
    try:
        yield event({"delta": {"role": "assistant", "content": ""}}, guard)
        if "garbage" in text:
            yield b"data: {not JSON\n\n"
        words = answer.split(" ")
        for place, word in enumerate(words):
            labels: list[dict[str, str]] = []
            if guarded and action != "intervene" and word.endswith((".", "?", "!")):
                labels = [{"label": safety.LABELS[0], "action": "pass"}]
            piece = {"delta": {"content": word if place == 0 else f" {word}"}}
            yield event(piece, {"answer_labels": labels} if labels else {})
            await asyncio.sleep(script.seconds_between_words)
            while place == 2 and script.held:
                await asyncio.sleep(0.01)
            if place == 2 and "cut" in text:
                # Chromium drops what it has not handed on when a connection breaks.
                await asyncio.sleep(0.1)
                raise ConnectionError("the script cuts this stream")
            if place == 2 and "stream error" in text:
                yield b'data: {"error": {"message": "the device was lost"}}\n\n'
                return
            if place == 2 and "never ends" in text:
                await asyncio.sleep(60)
        yield event({"delta": {}, "finish_reason": "length" if "long" in text else "stop"})
        usage = {"prompt_tokens": 9, "completion_tokens": len(words), "total_tokens": 9}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode()
        yield b"data: [DONE]\n\n"
    except asyncio.CancelledError:
        script.left += 1
        raise


async def pieces(stream: AsyncIterator[bytes], size: int) -> AsyncIterator[bytes]:
    """Yield the bytes of `stream` in pieces, each sent by itself, with CR LF as ends of lines."""
    async for data in stream:
        whole = data.replace(b"\n", b"\r\n")
        for start in range(0, len(whole), size):
            yield whole[start : start + size]
            await asyncio.sleep(0)


def event(choice: dict[str, Any], guard: dict[str, Any] | None = None) -> bytes:
    """Return one chunk of a streamed answer as a server-sent event."""
    choice = {"index": 0, "finish_reason": None, **choice}
    chunk = {"object": "chat.completion.chunk", "model": MODEL, "choices": [choice]}
    chunk |= {"guard": guard} if guard else {}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


@contextlib.contextmanager
def running(script: Script) -> Iterator[str]:
    """Run the scripted server in a thread; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(application(script), log_level="critical", lifespan="off")
        config.load()  # imports here, because no thread of ours may import
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
