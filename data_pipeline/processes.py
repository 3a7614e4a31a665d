"""Processes that make the calls, when one core is too slow for the wanted rate.

A call costs half a millisecond of a core in the HTTP client (an eighth in `plain`). A helper
process gets (number, form, body) and gives (number, status, text, retry_after) back, over a socket
pair; limits, retries, the journal and the stages stay in the one process. The first message each
way: the headers of every call (they hold the key, so they are no argument), and that it is ready.
A helper ends when its end of the socket closes, so none outlives a killed run; signals from the
terminal are the parent's to handle.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import marshal
import os
import signal
import socket
import struct
import subprocess
import sys
from typing import Any

from data_pipeline import plain
from data_pipeline.client import Client, Reply, Server
from data_pipeline.errors import UserError

_LENGTH = struct.Struct("<I")
_READY = (0, 0, b"", None)


class Messages(asyncio.Protocol):
    """Tuples of plain values over a stream socket: `got(message)` for each, then `ended()`."""

    def __init__(self, got: Any, ended: Any):
        self.got, self.ended = got, ended
        self.buffer = bytearray()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        place = 0
        while len(self.buffer) - place >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self.buffer, place)
            end = place + _LENGTH.size + length
            if len(self.buffer) < end:
                break
            self.got(marshal.loads(self.buffer[place + _LENGTH.size : end]))
            place = end
        del self.buffer[:place]

    def connection_lost(self, error: Exception | None) -> None:
        self.ended()

    def send(self, message: tuple) -> None:
        data = marshal.dumps(message)
        self.transport.write(_LENGTH.pack(len(data)) + data)


class Helpers:
    """`count` processes that make calls like `client`. `async with Helpers(...) as helpers:`"""

    def __init__(self, client: Client, server: Server, connections: int, count: int):
        self.headers = client.headers
        self.server, self.connections, self.count = server, -(-connections // count), count
        self._waiting: list[dict[int, asyncio.Future]] = [{} for _ in range(count)]
        self._number = 0
        self._leaving = False

    async def __aenter__(self) -> Helpers:
        self._processes, self._links = [], []
        loop = asyncio.get_running_loop()
        for index in range(self.count):
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-m", "data_pipeline.processes", str(theirs.fileno())]
                command += [json.dumps(dataclasses.asdict(self.server)), str(self.connections)]
                process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd=_root()
                )
            self._processes.append(process)
            ours.setblocking(False)
            _, link = await loop.create_connection(
                lambda index=index: Messages(
                    lambda message: self._got(index, message), lambda: self._ended(index)
                ),
                sock=ours,
            )
            link.send((self.headers,))
            self._links.append(link)
            self._waiting[index][0] = loop.create_future()
        await asyncio.gather(*(waiting[0] for waiting in self._waiting))
        for waiting in self._waiting:
            waiting.clear()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._leaving = True
        for link in self._links:
            link.transport.close()
        for process in self._processes:
            try:
                await asyncio.to_thread(process.wait, 10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    async def post(self, form: str, data: bytes) -> Reply:
        """One call, by the helper with the fewest."""
        index = min(range(self.count), key=lambda i: len(self._waiting[i]))
        if self._links[index].transport.is_closing():
            raise UserError("a helper process has ended; give the same command again")
        self._number += 1
        future = asyncio.get_running_loop().create_future()
        self._waiting[index][self._number] = future
        number = self._number
        try:
            self._links[index].send((number, form, data))
            return await future
        finally:
            self._waiting[index].pop(number, None)

    def _got(self, index: int, message: tuple) -> None:
        number, status, text, wait = message
        future = self._waiting[index].get(number)
        if future is not None and not future.done():
            future.set_result(Reply(status, text.decode("utf-8", "surrogatepass"), wait))

    def _ended(self, index: int) -> None:
        if self._leaving:
            return
        code = self._processes[index].poll()
        error = UserError(f"a helper process has ended (exit code {code}); give the command again")
        for future in self._waiting[index].values():
            if not future.done():
                future.set_exception(error)


def _root() -> str:
    """The folder from which `python -m data_pipeline` works."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _plain(server: Server, connections: int, connection: socket.socket) -> None:
    """The life of a helper that makes plain calls in threads."""
    stream = connection.makefile("rb", buffering=1 << 16)

    def read() -> tuple | None:
        header = stream.read(_LENGTH.size)
        if len(header) < _LENGTH.size:
            return None
        data = stream.read(_LENGTH.unpack(header)[0])
        return marshal.loads(data)

    def write(message: tuple) -> None:
        data = marshal.dumps(message)
        connection.sendall(_LENGTH.pack(len(data)) + data)

    (headers,) = read()
    write(_READY)
    plain.serve(server, headers, connections, read, write)


async def _help(server: Server, connections: int, connection: socket.socket) -> None:
    """The life of a helper: make the calls it is sent, until the other end is gone."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    running: set[asyncio.Task] = set()

    async def call(number: int, form: str, data: bytes) -> None:
        try:
            reply = await client.post(form, data)
        except Exception as error:  # whoever asked is to be told, not left waiting
            reply = Reply(0, f"{type(error).__name__}: {error}")
        text = reply.text.encode("utf-8", "surrogatepass")
        messages.send((number, reply.status, text, reply.retry_after))

    def got(message: tuple) -> None:
        if len(message) == 1:  # the headers, which this client has
            messages.send(_READY)
            return
        task = loop.create_task(call(*message))
        running.add(task)
        task.add_done_callback(running.discard)

    async with Client(server, connections) as client:
        connection.setblocking(False)
        _, messages = await loop.create_connection(
            lambda: Messages(got, lambda: over.done() or over.set_result(None)), sock=connection
        )
        await over


def main() -> None:
    """A helper process. Its arguments: its socket, the server's settings, its connections."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    number, settings, connections = sys.argv[1:]
    connection = socket.socket(fileno=int(number))
    server = Server(**json.loads(settings))
    if plain.serves(server):
        _plain(server, int(connections), connection)
    else:
        asyncio.run(_help(server, int(connections), connection))


if __name__ == "__main__":
    main()
