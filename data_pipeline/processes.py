"""Processes that make the calls, when one core is too slow for the wanted rate.

A call costs half a millisecond of a core in the HTTP client. A helper process gets (number, form,
body) and gives (number, status, text, retry_after) back, over a socket pair; limits, retries, the
journal and the stages stay in the one process. A helper ends when its end of the socket closes,
so none outlives a killed run; signals from the terminal are the parent's to handle.
"""

from __future__ import annotations

import asyncio
import dataclasses
import marshal
import os
import signal
import socket
import struct
import subprocess
import sys
from typing import Any

from data_pipeline.client import Client, Reply, Server
from data_pipeline.errors import UserError

_LENGTH = struct.Struct("<I")


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
    """`count` processes that make calls to `server`. `async with Helpers(...) as helpers:`"""

    def __init__(self, server: Server, connections: int, count: int):
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
            link.send((dataclasses.astuple(self.server), self.connections))
            self._links.append(link)
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


async def _help(connection: socket.socket) -> None:
    """The life of a helper: make the calls it is sent, until the other end is gone."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    client: Client | None = None
    running: set[asyncio.Task] = set()

    async def call(number: int, form: str, data: bytes) -> None:
        reply = await client.post(form, data)
        text = reply.text.encode("utf-8", "surrogatepass")
        messages.send((number, reply.status, text, reply.retry_after))

    def got(message: tuple) -> None:
        nonlocal client
        if client is None:
            values, connections = message
            client = Client(Server(*values), connections)
            return
        task = loop.create_task(call(*message))
        running.add(task)
        task.add_done_callback(running.discard)

    _, messages = await loop.create_connection(
        lambda: Messages(got, lambda: over.done() or over.set_result(None)), sock=connection
    )
    await over


def main() -> None:
    """A helper process; its argument is the number of its socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.setblocking(False)
    asyncio.run(_help(connection))


if __name__ == "__main__":
    main()
