"""A network that fails on demand: between clients and a server, connections can be cut."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Mode = Literal["passing", "away", "answering 500", "hanging"]
_ANSWER_500 = (
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)
_CHUNK_BYTES = 65536
_LOOK_SECONDS = 0.1


class Line:
    """A line to a server on this machine that passes, is dead, answers with errors, or never.

    Attributes:
        address: Where clients find the server.
        num_refused: How many connections found the line dead, got an error or no answer.
    """

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._mode: Mode = "passing"
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_refused = 0
        threading.Thread(target=self._accept, name="line", daemon=True).start()

    def turn(self, mode: Mode) -> None:
        """Change what becomes of connections; those that are open are cut."""
        self._mode = mode
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def turn_for(self, mode: Mode, seconds: float) -> None:
        """As `turn`, and back to passing after so long."""
        self.turn(mode)
        threading.Timer(seconds, self.turn, ("passing",)).start()

    def close(self) -> None:
        """Cut everything and accept no more."""
        self._listener.close()
        self.turn("away")

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if self._mode == "passing":
                self._join(client)
                return
            self.num_refused += 1
            if self._mode == "answering 500":
                client.recv(_CHUNK_BYTES)
                client.sendall(_ANSWER_500)
            while self._mode == "hanging":
                time.sleep(_LOOK_SECONDS)

    def _join(self, client: socket.socket) -> None:
        with socket.create_connection(self._target) as server:
            self._open |= {client, server}
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join()
            self._open -= {client, server}


@contextmanager
def line_to(port: int) -> Iterator[Line]:
    """A `Line` to a port of this machine while the block runs."""
    line = Line(port)
    try:
        yield line
    finally:
        line.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(_CHUNK_BYTES):
            target.sendall(chunk)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
