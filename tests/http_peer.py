"""A server that sends exactly the bytes a test wants, for clients that must stand any answer."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

RESET = -1.0


@dataclass(frozen=True)
class Request:
    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Peer:
    """Answers each connection, in a thread of its own, with what `respond` yields, then closes it.

    Floats are pauses in seconds; RESET breaks the connection off.
    """

    def __init__(self, respond: Callable[[Request], Iterable[bytes | float]]) -> None:
        self._respond = respond
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stopped = threading.Event()
        self.requests: list[Request] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):  # the client may be gone
            self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as file:
            line = file.readline().decode("latin-1").strip()
            headers: dict[str, str] = {}
            while header := file.readline().decode("latin-1").strip():
                name, _, value = header.partition(": ")
                headers[name.lower()] = value
            request = Request(line, headers, file.read(int(headers.get("content-length", 0))))
        self.requests.append(request)
        for part in self._respond(request):
            if part == RESET:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            if isinstance(part, bytes):
                connection.sendall(part)
            elif self._stopped.wait(part):
                return


def http(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """An answer with the right length and content type, unless `headers` say otherwise (an empty one leaves it out)."""
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def drip(data: bytes, *, seconds: float) -> Iterator[bytes | float]:
    """One byte at a time, over `seconds` in all."""
    for position in range(len(data)):
        yield data[position : position + 1]
        yield seconds / len(data)
