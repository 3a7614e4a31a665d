"""Calls to a plain http:// server by threads with the standard library's HTTP client.

Servers that answer hundreds of calls a second are near and speak plain HTTP (vLLM, llama.cpp).
There a helper process makes its calls this way, because it costs a quarter: 0.13 against 0.51 ms
of a core a call, and 1,200 against 1,050 calls a second of 64 at once at 50 ms. Everything else
(https://, proxies) goes through the openai library's client.
"""

from __future__ import annotations

import http.client
import os
import queue
import select
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable

from data_pipeline.client import FORMS, Reply, Server, retry_after


def serves(server: Server) -> bool:
    """Whether a server can be asked this way: plain HTTP, and no proxy between."""
    url = urllib.parse.urlsplit(server.base_url)
    proxied = "http" in urllib.request.getproxies() and not urllib.request.proxy_bypass(url.netloc)
    return url.scheme == "http" and not proxied


class Connection:
    """One kept connection. Not for several threads at once."""

    def __init__(self, server: Server, headers: dict[str, str]):
        url = urllib.parse.urlsplit(server.base_url)
        self.path, self.headers, self.timeout = url.path.rstrip("/"), headers, server.timeout
        self.http = http.client.HTTPConnection(url.hostname, url.port, timeout=server.timeout)

    def post(self, form: str, data: bytes) -> Reply:
        """One call, whatever comes of it."""
        try:
            until = time.monotonic() + self.timeout
            if self.http.sock is None or _readable(self.http.sock):  # closed while it was idle
                self.http.close()
                self.http.connect()
                self.http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock = self.http.sock
            sock.settimeout(self.timeout)
            self.http.request("POST", self.path + FORMS[form], data, self.headers)
            got = self.http.getresponse()
            text = _body(got, sock, until).decode("utf-8", "surrogateescape")
            wait = retry_after(got.headers) if got.status != 200 else None
            return Reply(got.status, text, wait)
        except TimeoutError:
            self.http.close()
            return Reply(0, f"no answer within {self.timeout:g} s")
        except (OSError, http.client.HTTPException) as error:
            self.http.close()
            return Reply(0, f"{type(error).__name__}: {error}".rstrip(": "))


def _body(got: http.client.HTTPResponse, sock: socket.socket, until: float) -> bytes:
    """An answer's body, whole by `until`: one that comes in drops would pass a read's timeout."""
    parts = []
    with got:
        while part := got.read1(1 << 20):
            parts.append(part)
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            sock.settimeout(left)
        if got.length:
            raise http.client.IncompleteRead(b"", got.length)
    return b"".join(parts)


def _readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def serve(
    server: Server,
    headers: dict[str, str],
    connections: int,
    read: Callable[[], tuple | None],
    write: Callable[[tuple], None],
) -> None:
    """Make the calls that `read` gives, (number, form, body), and `write` what came of each.

    `read` gives None at the end; then the process ends, whatever is still under way.
    """
    calls: queue.SimpleQueue = queue.SimpleQueue()
    lock = threading.Lock()

    def work() -> None:
        connection = Connection(server, headers)
        while True:
            number, form, data = calls.get()
            try:
                reply = connection.post(form, data)
            except Exception as error:  # whoever asked is to be told, not left waiting
                connection = Connection(server, headers)
                reply = Reply(0, f"{type(error).__name__}: {error}")
            text = reply.text.encode("utf-8", "surrogatepass")
            with lock:
                write((number, reply.status, text, reply.retry_after))

    for _ in range(connections):
        threading.Thread(target=work, daemon=True).start()
    while (call := read()) is not None:
        calls.put(call)
    os._exit(0)
