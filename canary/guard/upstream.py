"""Send a request on to the guarded server: over HTTP, or to an application in this process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import httpx2

from canary.guard.policy import Limits
from cosmo.engine.base.errors import UserError

Headers = list[tuple[str, str]]

# Headers of one connection, not of the message (RFC 9110, section 7.6.1).
HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
    "te", "trailer", "transfer-encoding", "upgrade",
}  # fmt: skip
# Headers of the body as it was sent: the guard decodes it and writes a new one.
_OF_THE_BODY = {"content-length", "content-encoding", "content-md5", "digest", "etag"}
_NOT_SENT = {*HOP_BY_HOP, *_OF_THE_BODY, "host", "accept-encoding", "expect", "origin", "referer"}
_NOT_RETURNED = {*HOP_BY_HOP, *_OF_THE_BODY, "date", "server", "accept-ranges", "content-range"}
# Shorter than servers' own, so that no call meets a connection that is just being closed.
KEEP_ALIVE_SECONDS = 2.0


class UpstreamError(Exception):
    """A call that got no answer, or not a whole one. `status` is what the client gets for it."""

    def __init__(self, status: int, message: str, code: str):
        super().__init__(message)
        self.status, self.code = status, code


class Answer(NamedTuple):
    """A server's answer; `chunks` are the decoded body, which may raise UpstreamError.

    Closing `chunks` (`aclose`) ends the call.
    """

    status: int
    headers: Headers
    chunks: AsyncIterator[bytes]


class Chunks:
    """The body of an answer. Closing it ends the call, also before its first piece was asked for.

    An async generator that was never started runs nothing when it is closed.
    """

    def __init__(self, source: AsyncIterator[bytes], end: Callable[[], Awaitable[None]]):
        self._source, self._end = source, end

    def __aiter__(self) -> "Chunks":
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._source)

    async def aclose(self) -> None:
        """End the call."""
        close = getattr(self._source, "aclose", None)
        if close is not None:
            await close()
        await self._end()


class Upstream(Protocol):
    """The guarded server."""

    async def send(self, method: str, path: str, headers: Headers, body: bytes | None) -> Answer:
        """Return the answer to one call, which is made once. Raises UpstreamError.

        `path` begins after /v1, and may have a query.
        """

    async def close(self) -> None:
        """Close all connections."""


class HttpUpstream:
    """A server at a URL, with or without /v1 at its end."""

    def __init__(self, url: str, limits: Limits, key: str | None = None):
        """Check the URL. Raises UserError.

        `key` is sent in place of the client's own; "" sends none.
        """
        self.url, self.key, self.limits = base_url(url), key, limits
        waits = httpx2.Timeout(
            limits.first_byte_seconds, connect=limits.connect_seconds, pool=limits.connect_seconds
        )
        self._client = httpx2.AsyncClient(
            timeout=waits,
            # A redirect would take the client's key elsewhere.
            follow_redirects=False,
            limits=httpx2.Limits(
                max_connections=None,
                max_keepalive_connections=64,
                keepalive_expiry=KEEP_ALIVE_SECONDS,
            ),
        )
        # The client's headers are handed on as they are, and none is added.
        self._client.headers.clear()

    async def send(self, method: str, path: str, headers: Headers, body: bytes | None) -> Answer:
        """Make one call; see `Upstream`."""
        sent = [*forwarded(headers, _NOT_SENT), ("accept-encoding", "identity")]
        if self.key is not None:
            sent = [(name, value) for name, value in sent if name.lower() != "authorization"]
            sent += [("authorization", f"Bearer {self.key}")] if self.key else []
        with _as_upstream_error():
            request = self._client.build_request(
                # Bytes: a header may hold any, and the library takes texts for ASCII.
                method,
                f"{self.url}{path}",
                headers=_as_bytes(sent),
                content=body,
            )
            async with asyncio.timeout(self.limits.first_byte_seconds):
                answer = await self._client.send(request, stream=True)
        got = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in answer.headers.raw]
        returned = forwarded(got, _NOT_RETURNED)
        return Answer(answer.status_code, returned, Chunks(_decoded(answer), answer.aclose))

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


async def _decoded(answer: httpx2.Response) -> AsyncIterator[bytes]:
    with _as_upstream_error():
        async for chunk in answer.aiter_bytes():
            yield chunk


class AsgiUpstream:
    """An application in this process; `prefix` is where its API is."""

    def __init__(self, app: Any, prefix: str = "/v1"):
        self.app, self.prefix = app, prefix

    async def send(self, method: str, path: str, headers: Headers, body: bytes | None) -> Answer:
        """Make one call; see `Upstream`."""
        path, _, query = f"{self.prefix}{path}".partition("?")
        sent = forwarded(headers, {*HOP_BY_HOP, *_OF_THE_BODY, "accept-encoding", "expect"})
        sent.append(("content-length", str(len(body or b""))))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(k.lower(), v) for k, v in _as_bytes(sent)],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
        }
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        # One message waits, as on a connection that the client reads slowly. The end needs no room:
        # an application that is ended would wait for a reader who has left.
        room = asyncio.Semaphore(1)
        gone = asyncio.Event()
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body or b"", "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            await room.acquire()
            messages.put_nowait(message)

        async def run() -> None:
            try:
                await self.app(scope, receive, send)
            finally:
                messages.put_nowait(None)

        task = asyncio.ensure_future(run())
        try:
            start = await messages.get()
            room.release()
        except BaseException:
            await _end(task, gone)
            raise
        if start is None:
            await _end(task, gone)
            raise UpstreamError(502, "the server failed before it answered", "upstream_failed")
        got = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in start["headers"]]
        chunks = Chunks(_messages(messages, room), lambda: _end(task, gone))
        return Answer(start["status"], forwarded(got, _NOT_RETURNED), chunks)

    async def close(self) -> None:
        """Do nothing: the application is someone else's."""


async def _messages(
    messages: "asyncio.Queue[dict[str, Any] | None]", room: asyncio.Semaphore
) -> AsyncIterator[bytes]:
    while True:
        message = await messages.get()
        room.release()
        if message is None:
            raise UpstreamError(502, "the server broke off its answer", "upstream_cut")
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body", False):
            return


async def _end(task: "asyncio.Task[None]", gone: asyncio.Event) -> None:
    """Let the application see that its client has left, and end it."""
    gone.set()
    if not task.done():
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


def forwarded(headers: Iterable[tuple[str, str]], without: set[str]) -> Headers:
    """Return headers to hand on: without those named, and those that Connection names."""
    kept = list(headers)
    named = [value for name, value in kept if name.lower() == "connection"]
    dropped = {word.strip().lower() for value in named for word in value.split(",")} | without
    return [(name, value) for name, value in kept if name.lower() not in dropped]


def _as_bytes(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def base_url(url: str) -> str:
    """Return the URL below which the API's paths are, without a slash at its end.

    A URL without a path gets /v1, as the address of a server. Any other is taken as it is, as
    OpenAI's clients take their base_url. Raises UserError.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"upstream {url!r}: expected http://HOST:PORT or https://HOST/v1")
    if parts.query or parts.fragment or parts.username or parts.password:
        raise UserError(
            "upstream: expected a URL without a query, a fragment, a user or a password; give a "
            "key by --upstream_key_env",
            setting="upstream",
        )
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


@contextlib.contextmanager
def _as_upstream_error():
    """Turn the library's errors into UpstreamError. The URL is in none: it may name a host."""
    try:
        yield
    except (httpx2.TimeoutException, TimeoutError) as error:
        raise UpstreamError(
            504, "the upstream did not answer in time", "upstream_timeout"
        ) from error
    except httpx2.ConnectError as error:
        raise UpstreamError(502, "no connection to the upstream", "upstream_unreachable") from error
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
        problem = f"the upstream broke off its answer ({type(error).__name__})"
        raise UpstreamError(502, problem, "upstream_cut") from error
