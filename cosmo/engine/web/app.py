"""Make an ASGI application with keys, limits, a check of hosts, and errors in OpenAI's shape."""

import asyncio
import contextlib
import hmac
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cosmo.engine.base import json_lines
from cosmo.engine.base.errors import shortened, shown
from cosmo.engine.web.errors import ApiError
from cosmo.engine.web.metrics import Metrics

log = logging.getLogger("cosmo.web")

MAX_BODY_BYTES = 4 * 2**20  # a dialogue of 1,000 turns of 4,000 characters
BODY_SECONDS = 30.0  # in which a client must have sent its body
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Read and dropped before an early answer: a client that is still sending would lose the answer.
_DROPPED_BYTES, _DROPPED_SECONDS = 64 * 2**20, 2.0
_CLOSE = {"connection": "close"}


def application(
    routes: Sequence[BaseRoute],
    *,
    api_key: str | None,
    hosts: Collection[str] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    body_seconds: float = BODY_SECONDS,
    open_paths: Collection[str] = ("/health",),
    metrics: Metrics | None = None,
    log_requests: bool = True,
    error_page: Callable[[ApiError], Response] | None = None,
    lifespan: Callable[[Starlette], contextlib.AbstractAsyncContextManager[Any]] | None = None,
) -> Starlette:
    """Return an application that serves `routes`.

    Args:
        routes: Starlette's; a handler raises ApiError for what it refuses.
        api_key: the key that a client must send as `Authorization: Bearer KEY`; None asks for none.
        hosts: names that the header Host may have, see `allowed_hosts`; None allows all.
        max_body_bytes: of a request; a larger one gets status 413.
        body_seconds: a client that takes longer to send its body gets status 408.
        open_paths: paths that need no key.
        metrics: counts the requests by route and status.
        log_requests: log a line for each request.
        error_page: makes the answer for an error; by default `error_response`.
        lifespan: Starlette's, entered before the first request and left after the last.

    Requests of pages of other origins get status 403. No CORS header is sent.
    """
    paths = frozenset(path for route in routes if (path := getattr(route, "path", None)))
    respond = error_page or error_response

    async def http_error(request: Request, error: Exception) -> Response:
        return respond(_http_error(request, error))

    made = Starlette(
        routes=list(routes),
        middleware=[
            Middleware(
                _Outermost,
                metrics=metrics or Metrics(),
                paths=paths,
                respond=respond,
                log_requests=log_requests,
            ),
            Middleware(_Gate, api_key=api_key, hosts=hosts, open_paths=frozenset(open_paths)),
            Middleware(_BodyLimits, most=max_body_bytes, seconds=body_seconds),
        ],
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )
    # A path with a slash too many is an unknown one: an answer names no address of a client's.
    made.router.redirect_slashes = False
    return made


def allowed_hosts(host: str) -> frozenset[str] | None:
    """Return the names that requests may give as Host to a server that listens at `host`.

    For a loopback address these are loopback's names. A page on the web then cannot reach the
    server under a name of its own (DNS rebinding). None allows every name.
    """
    return frozenset({*LOOPBACK, host}) if is_loopback(host) else None


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server at `host`."""
    return host in LOOPBACK or host.startswith("127.")


class _Outermost:
    """Turn exceptions into answers, count and log requests."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        paths: frozenset[str],
        respond: Callable[[ApiError], Response],
        log_requests: bool = True,
    ):
        self.app, self.metrics, self.paths, self.respond = app, metrics, paths, respond
        self.log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                await self.app(scope, receive, noting)
            except Exception as error:
                if status:  # the answer has begun: uvicorn closes the connection
                    if not isinstance(error, ClientDisconnect):
                        log.exception("%s %s failed", scope["method"], shown(scope["path"]))
                    raise
                await self.respond(_as_api_error(error, scope))(scope, receive, noting)
        finally:
            # A client that left before its answer began has 499, as in nginx's logs.
            seconds, status = time.monotonic() - began, status or 499
            route = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.request(route, scope["method"], status, seconds)
            # The path alone: queries and bodies may hold what people wrote.
            path = shortened(scope["path"].encode("unicode_escape").decode())
            if self.log_requests:
                method = shortened(scope["method"])  # a client may invent one
                log.info("%s %s %d %.0f ms", method, path, status, seconds * 1000)


def _as_api_error(error: Exception, scope: Scope) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client has left")
    # Its text may name files: it goes to the log, not to the client.
    log.error("%s %s failed", scope["method"], shown(scope["path"]), exc_info=error)
    return ApiError(500, "the server failed; its log has the reason", "server_error")


def error_response(error: ApiError) -> Response:
    """Return the answer for an error."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


def _http_error(request: Request, error: Exception) -> ApiError:
    """Return the error for a path or method that no route has."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {shortened(request.url.path)}"
    texts = {404: f"Unknown request URL: {where}", 405: f"Method not allowed: {where}"}
    message = texts.get(error.status_code, str(error.detail))
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, message, code=code, headers=error.headers)


class _Gate:
    """Refuse requests without the key, under foreign names of the host, and of foreign pages."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        hosts: Collection[str] | None,
        open_paths: frozenset[str],
    ):
        self.app = app
        self.key = None if api_key is None else f"Bearer {api_key}".encode()
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope)
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        # Only HTTP/1.0 has none, and no browser speaks it.
        if host and self.hosts is not None and hostname(f"//{host}") not in self.hosts:
            raise ApiError(
                403,
                f"the host {shown(host)} is not this server's: call it by a name of this machine, "
                "or start it with --host",
                code="unknown_host",
            )
        origin = headers.get(b"origin")
        # A page of another site could otherwise spend this machine's time.
        if origin is not None and _netloc(origin.decode("latin-1").lower()) != host:
            raise ApiError(403, "pages of other origins may not call", code="foreign_origin")
        if self.key is None or scope["path"] in self.open_paths:
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, self.key):
            what = "Incorrect API key provided" if given else "You didn't provide an API key"
            raise ApiError(
                401,
                f"{what}: send it as the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def hostname(url: str) -> str | None:
    """Return the name of the host in a URL, None if it has none or is broken."""
    try:
        return urlsplit(url).hostname
    except ValueError:  # such as half an IPv6 address
        return None


def _netloc(url: str) -> str | None:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


class _BodyLimits:
    """Refuse bodies that are too large, or that take too long to arrive."""

    def __init__(self, app: ASGIApp, most: int, seconds: float):
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        deadline = time.monotonic() + self.seconds
        size, whole = 0, False

        async def limited() -> Message:
            nonlocal size, whole
            if whole:  # now it only waits for the client to leave
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not arrive within {self.seconds:g} seconds",
                    code="slow_body",
                    headers=_CLOSE,
                ) from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.most:
                if not whole:
                    await _drop_body(receive)
                raise self._too_large()
            return message

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.most:
            await _drop_body(receive)
            raise self._too_large()
        await self.app(scope, limited, send)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body has more than {self.most:,} bytes",
            code="body_too_large",
            headers=_CLOSE,
        )


async def _drop_body(receive: Receive) -> None:
    """Read the rest of a body for a moment, so that the client gets to read its answer."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DROPPED_SECONDS):
            while size < _DROPPED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def json_object(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body.

    Raises ApiError of status 400 for broken JSON, a value that is not an object, or a field given
    twice. Numbers that are not finite, deep nesting and half a character are refused too. A
    compressed body gets status 415.
    """
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() not in ("", "identity"):
        raise ApiError(
            415,
            f"content-encoding {shown(coding)}: send the body uncompressed",
            code="unsupported_encoding",
        )
    return parse_object(await request.body())


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`; raises ApiError as `json_object` does."""
    try:
        text = data.decode("utf-8-sig")
        found = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_doubles,
        )
        json_lines.check_depth(found, text)
    except UnicodeDecodeError as error:
        raise _bad_json(f"not UTF-8 text (byte {data[error.start]:#x})") from None
    except (ValueError, RecursionError) as error:
        raise _bad_json(json_lines.fault(error)) from None
    if not isinstance(found, dict):
        raise _bad_json(f"got {_kind(found)}, expected an object")
    # Only an escape can spell half a character: plain UTF-8 refuses it.
    if "\\u" in text and (field := _half_character(found)) is not None:
        raise ApiError(
            400, f"{field}: not valid text (half a character)", param=field, code="invalid_text"
        )
    return found


def _bad_json(problem: str) -> ApiError:
    return ApiError(400, f"the body is not what was expected: {problem}", code="invalid_json")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shortened(text, 30)} is too large")
    return number


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the field {shown(name)} is given twice")
            seen.add(name)
    return found


def _half_character(value: Any) -> str | None:
    """Return the place of the first text that holds half a surrogate pair; None if none does."""
    steps = _steps_to_half(value)
    if steps is None:
        return None
    # A place is written once it is found: names and lists of a hostile body are long.
    place = ""
    for step in steps:
        name = f"[{step}]" if isinstance(step, int) else shortened(step)
        place += name if isinstance(step, int) or not place else f".{name}"
    return place or "a field's name"


def _steps_to_half(value: Any) -> list[str | int] | None:
    """Return the names and numbers that lead to the first such text."""
    if isinstance(value, str):
        return None if json_lines.is_whole(value) else []
    if isinstance(value, dict):
        if not all(map(json_lines.is_whole, value)):
            return []
        parts: Any = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    else:
        return None
    for name, item in parts:
        steps = _steps_to_half(item)
        if steps is not None:
            return [name, *steps]
    return None


async def left(receive: Receive) -> None:
    """Wait until the client has left. For use after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def body_chunks(request: Request) -> AsyncIterator[bytes]:
    """Yield the pieces of a request's body as they come, without empty ones."""
    async for chunk in request.stream():
        if chunk:
            yield chunk
