"""Run an ASGI application with uvicorn: limits of time, port in use, signals, end."""

import asyncio
import contextlib
import errno
import http
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cosmo.engine.base.errors import UserError
from cosmo.engine.web import errors, sse
from cosmo.engine.web.app import is_loopback

log = logging.getLogger("cosmo.web")

DRAIN_SECONDS = 30.0
HEAD_SECONDS = 10.0  # in which a connection must have sent the head of its next request
KEEP_ALIVE_SECONDS = 30.0  # of a connection between two requests
BACKLOG = 2048
_MAX_HEAD_BYTES = 64 * 1024
_REFUSED_SECONDS = 2.0  # in which a client reads why its bytes are no request


def listen(host: str, port: int) -> socket.socket:
    """Bind a TCP socket; port 0 takes a free one. Raises UserError if it cannot be bound."""
    if not 0 <= port <= 65535:
        raise UserError(f"port {port}: a port is 0 (any free one) to 65535", setting="port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: a label of more than 63 letters
        raise UserError(f"host {host!r}: {error}", setting="host") from error
    # IPv4 first: "localhost" is often both, and clients try 127.0.0.1.
    family, kind, protocol, _, address = min(found, key=lambda item: item[0] != socket.AF_INET)
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        # At once, so that a second server on this port fails now and not after loading a model.
        made.listen(BACKLOG)
        made.setblocking(False)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} at {host} is in use: stop the program that has it, or give another "
                "port; port 0 takes a free one",
                setting="port",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UserError(
                f"port {port}: this user may not take it; give one of 1024 or above",
                setting="port",
            ) from error
        raise UserError(f"{host}:{port}: {error.strerror}", setting=("host", "port")) from error
    return made


def address(listener: socket.socket) -> str:
    """Return the URL of a socket that listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def warn_if_open(host: str, api_key: str | None) -> None:
    """Log a warning for a server that others reach without a key."""
    if not is_loopback(host) and api_key is None:
        log.warning(
            "--host=%s: everybody who reaches this machine may use the server, which asks for no "
            "key; --api_key_env=NAME asks for one",
            host,
        )


_STARTING = errors.unavailable("the server is starting: its model is being loaded")


@contextlib.contextmanager
def starting(listener: socket.socket) -> Iterator[None]:
    """Answer every request with status 503 from a thread, while a model is loaded and compiled.

    A question for /health gets this answer too. SIGTERM and SIGINT end the process with exit code
    0, as they do once it serves. The thread imports nothing.
    """
    body = json.dumps(_STARTING.body()).encode()
    head = (
        f"HTTP/1.1 503 Service Unavailable\r\nretry-after: {_STARTING.headers['retry-after']}\r\n"
    )
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    answer = f"{head}connection: close\r\n\r\n".encode() + body
    ended = threading.Event()

    def run(signals: socket.socket) -> None:
        while not ended.is_set():
            ready, _, _ = select.select([listener, signals], [], [], 0.05)
            if signals in ready:
                _leave_at_once(signals.recv(1)[0])
            if listener in ready:
                with contextlib.suppress(OSError):
                    _refuse(listener.accept()[0], answer)

    with _signals_as_bytes() as signals:
        thread = threading.Thread(target=run, args=(signals,), name="starting", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextlib.contextmanager
def _signals_as_bytes() -> Iterator[socket.socket]:
    """Yield a socket that gets the number of each SIGTERM and SIGINT as a byte.

    Python calls a handler only between two steps of the main thread, and compiling is one long
    step. Outside the main thread, which alone may set handlers, the socket gets nothing.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        if threading.current_thread() is not threading.main_thread():
            yield reader
            return
        writer.setblocking(False)
        before = {
            number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        wakeup = signal.set_wakeup_fd(writer.fileno())
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


def _leave_at_once(number: int) -> None:
    """End the process: nothing is in flight, and a compilation cannot be interrupted."""
    log.warning("%s: stopped before the model was loaded", signal.Signals(number).name)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _refuse(connection: socket.socket, answer: bytes) -> None:
    with connection:
        connection.settimeout(0.5)  # one at a time: a slow client must not hold up the others
        connection.recv(_MAX_HEAD_BYTES)
        connection.sendall(answer)
        # Closing with bytes unread would reset the connection before the answer is read.
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(_MAX_HEAD_BYTES):
            pass


def serve(
    app: Any,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    on_ready: Callable[[str], None] | None = None,
    on_drain: Callable[[], None] = lambda: None,
    drain_seconds: float = DRAIN_SECONDS,
    listener: socket.socket | None = None,
    write_seconds: float = sse.WRITE_SECONDS,
) -> None:
    """Serve an application until SIGTERM or SIGINT, then finish the requests in flight.

    Args:
        app: an ASGI application.
        host: where to listen.
        port: 0 takes a free port.
        on_ready: called with the URL; by default prints `listening on URL`.
        on_drain: called once when a signal came. The server accepts nothing more then.
        drain_seconds: requests that take longer after a signal are cut.
        listener: a socket of `listen`, instead of host and port.
        write_seconds: a client that does not read for so long is dropped.

    Raises UserError if the port cannot be bound.
    """
    listener = listener or listen(host, port)
    _allow_many_connections()
    server = _server(app, drain_seconds, write_seconds, on_drain)
    url = address(listener)

    async def run() -> None:
        task = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if not task.done():
            (on_ready or _print_ready)(url)
        await task

    asyncio.run(run())


def _print_ready(url: str) -> None:
    print(f"listening on {url}", flush=True)


@contextlib.contextmanager
def background(
    app: Any,
    host: str = "127.0.0.1",
    *,
    drain_seconds: float = 5.0,
    write_seconds: float = sse.WRITE_SECONDS,
    on_drain: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Serve an application from a thread, for tests and benchmarks; yield its URL."""
    listener = listen(host, 0)
    server = _server(app, drain_seconds, write_seconds, on_drain)
    server.config.load()  # imports, which no thread of ours does
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True
    )
    thread.start()
    try:
        yield address(listener)
    finally:
        server.leave()
        thread.join(drain_seconds + 10.0)
        if thread.is_alive():
            raise RuntimeError("the server's thread did not end")


def _allow_many_connections() -> None:
    """Raise this process's limit of open files as far as it may: a connection is a file."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses its own "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _server(
    app: Any, drain_seconds: float, write_seconds: float, on_drain: Callable[[], None]
) -> "_Server":
    # A subclass for these numbers: uvicorn makes the protocol without arguments of ours.
    protocol = type("Protocol", (_Protocol,), {"write_seconds": write_seconds})
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,  # `app` logs requests
        server_header=False,
        proxy_headers=False,  # anybody could send them
        timeout_keep_alive=int(KEEP_ALIVE_SECONDS),
        timeout_graceful_shutdown=drain_seconds,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        backlog=BACKLOG,
    )
    # Its notes repeat ours: `app` logs failures.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    return _Server(config, on_drain)


class _Server(uvicorn.Server):
    """uvicorn's server, which ends with exit code 0 on a signal."""

    def __init__(self, config: uvicorn.Config, on_drain: Callable[[], None]):
        super().__init__(config)
        self.on_drain = on_drain

    def leave(self) -> None:
        """Stop accepting, and end once the requests in flight are answered."""
        if not self.should_exit:
            self.should_exit = True
            self.on_drain()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT; uvicorn's own raises the signal again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        if self.should_exit:  # the second signal does not wait
            self.force_exit = True
            return
        log.info("stopping: requests in flight are finished; a second signal cuts them")
        self.leave()


class _Protocol(H11Protocol):
    """A connection with limits of time: heads that do not come, answers that are not read."""

    write_seconds = sse.WRITE_SECONDS

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refused = False  # what still comes is dropped

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; uvicorn would wait for ever."""
        super().connection_made(transport)
        # The system closes a connection whose peer takes nothing, also after we have closed it.
        made = transport.get_extra_info("socket")
        if made is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(self.write_seconds * 1000)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Read on. A head that comes byte by byte must end in time too."""
        if self._refused:
            return
        self._await_head()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel_head()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not an HTTP request with an error in OpenAI's shape."""
        self._refused = True
        self._cancel_head()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun
            self.transport.abort()
            return
        # uvicorn calls this while it handles h11's error, which has the status.
        caught = sys.exception()
        status = getattr(caught, "error_status_hint", 400)
        problem = f"the request's line and headers have more than {_MAX_HEAD_BYTES:,} bytes"
        if status != 431:
            problem = f"this is no HTTP request: {caught or msg}"
        body = json.dumps(errors.ApiError(status, problem, code="bad_http").body()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        for event in (
            h11.Response(
                status_code=status,
                headers=list(headers.items()),
                reason=http.HTTPStatus(status).phrase,
            ),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        # Closing with bytes unread would reset the connection before the answer is read.
        self.transport.write_eof()
        self.loop.call_later(_REFUSED_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """End all waiting."""
        self._cancel_head()
        self._cancel_write()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not read."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_seconds, self._abort)

    def resume_writing(self) -> None:
        """Note that the client reads again."""
        self._cancel_write()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that asked for nothing."""
        super().timeout_keep_alive_handler()
        # Closing waits for what is still to be written: a client that reads nothing stays.
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _await_head(self) -> None:
        if self._head_timer is None and self.conn.their_state is h11.IDLE:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._abort)

    def _cancel_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _cancel_write(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _abort(self) -> None:
        self._head_timer = self._write_timer = None
        self.transport.abort()
