"""Write and read server-sent events (WHATWG HTML, section 9.2).

A response of events closes its source when the client leaves.
"""

import asyncio
import codecs
import contextlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cosmo.engine.base import json_lines

MEDIA_TYPE = "text/event-stream"
WRITE_SECONDS = 30.0  # after which a client that does not read is dropped
PING_SECONDS = 15.0  # of silence before a comment is sent, so that proxies keep the connection
MAX_EVENT_CHARS = 16 * 2**20


class Event(NamedTuple):
    """An event: its data, its name ("message" if it has none) and the last id given."""

    data: str
    name: str = "message"
    id: str = ""


def event(data: Any, name: str | None = None) -> bytes:
    """Return an event as it is sent. A text is sent as it stands, another value as JSON."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    lines = [f"event: {name}"] if name else []
    # A carriage return alone would end a line too.
    lines += [
        f"data: {line}" for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    ]
    return json_lines.encode("\n".join(lines) + "\n\n")


DONE = event("[DONE]")  # the last event of OpenAI's streams
PING = b": ping\n\n"


class TooLongError(ValueError):
    """A stream has an event of more than MAX_EVENT_CHARS characters."""


class Parser:
    """Read events from pieces of bytes that are cut anywhere.

    Lines end with LF, CR or CRLF. An event that the stream does not finish is dropped, as the
    standard asks. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, max_chars: int = MAX_EVENT_CHARS):
        self._max = max_chars
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True  # whether no character was read yet
        self._after_cr = False  # whether a line feed that comes next belongs to the last line
        self._line: list[str] = []  # pieces of a line that has not ended
        self._data: list[str] = []
        self._chars = 0  # of the event so far
        self._name = self._id = ""

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that `data` finishes. Raises TooLongError."""
        text = self._decoder.decode(data)
        if text and self._first:
            self._first = False
            text = text.removeprefix("\ufeff")
        if text and self._after_cr:
            self._after_cr = False
            text = text.removeprefix("\n")
        if not text:
            return []
        # Only these three end a line: str.splitlines knows many more.
        self._after_cr = text.endswith("\r")
        *whole, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        found = []
        for line in whole:
            self._count(line)
            made = self._end_line("".join((*self._line, line)))
            self._line = []
            if made is not None:
                found.append(made)
        if rest:
            self._count(rest)
            self._line.append(rest)
        return found

    def _count(self, text: str) -> None:
        self._chars += len(text)
        if self._chars > self._max:
            raise TooLongError(f"an event of more than {self._max:,} characters")

    def _end_line(self, line: str) -> Event | None:
        if not line:
            data, name = self._data, self._name or "message"
            self._data, self._name, self._chars = [], "", 0
            return Event("\n".join(data), name, self._id) if data else None
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
        elif field == "id" and "\0" not in value:
            self._id = value
        elif not field:  # a comment is no part of the event
            self._chars -= len(line)
        return None


async def parse(
    chunks: AsyncIterable[bytes], max_chars: int = MAX_EVENT_CHARS
) -> AsyncIterator[Event]:
    """Yield the events of a stream that comes in any pieces; see `Parser`."""
    parser = Parser(max_chars)
    async for chunk in chunks:
        for found in parser.feed(chunk):
            yield found


class EventStream(Response):
    """A response of events. `source` yields them as bytes, made by `event`.

    The source is closed (`aclose`) when it ends, when the client leaves, and when the client takes
    none of a piece for `write_seconds`. After `ping_seconds` of silence a comment is sent.
    `on_close` is called then too: a generator that never began runs no `finally` of its own.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self,
        source: AsyncIterator[bytes],
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        write_seconds: float = WRITE_SECONDS,
        ping_seconds: float = PING_SECONDS,
        on_close: Callable[[], None] = lambda: None,
    ):
        self.source, self.on_close = source, on_close
        self.status_code = status
        self.background = None
        self.write_seconds, self.ping_seconds = write_seconds, ping_seconds
        # Buffering proxies would hold tokens back.
        usual = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        self.init_headers({**usual, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the source ends or the client has left."""
        pump = asyncio.ensure_future(self._pump(send))
        watch = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pump, watch):
                if not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError, Exception):
                        await task
            try:
                await close(self.source)
            finally:
                self.on_close()
        if pump.done() and not pump.cancelled():
            pump.result()  # raises what the source raised

    async def _pump(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await self._send(send, {**start, "headers": self.raw_headers})
        following = asyncio.ensure_future(anext(self.source, None))
        try:
            while True:
                done, _ = await asyncio.wait({following}, timeout=self.ping_seconds)
                chunk = following.result() if done else PING
                if chunk is None:
                    break
                body = {"type": "http.response.body", "body": chunk, "more_body": True}
                await self._send(send, body)
                if done:
                    following = asyncio.ensure_future(anext(self.source, None))
        finally:
            if not following.done():
                following.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                    await following
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: Any) -> None:
        try:
            # Not asyncio.wait_for: Python 3.11's loses a cancellation that comes with the result.
            async with asyncio.timeout(self.write_seconds):
                await send(message)
        except TimeoutError:
            # `run` cuts the connection, because closing it would wait for the client.
            raise ClientDisconnect("the client did not read") from None


def stream(source: AsyncIterator[bytes], **settings: Any) -> EventStream:
    """Return a response of events; `settings` are those of EventStream."""
    return EventStream(source, **settings)


async def close(source: Any) -> None:
    """Close an async generator; other iterators have nothing to close."""
    aclose = getattr(source, "aclose", None)
    if aclose is not None:
        await aclose()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
