"""A real HTTP server on loopback that misbehaves as told: it drops, stalls, truncates, answers 500, ignores ranges, goes away."""

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

PIECE = 1 << 14


class FaultyServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes:
        address: where it answers, without a slash at the end.
        asked: how often each path was asked for from its beginning.
        again: how often each path was gone on with.
        faults: faults of the next answers, one taken by each: "500", "404", "403", "drop", "stall", "short", "garbage".
        ranges: whether it can begin in the middle.
        pace: seconds before each piece of PIECE bytes.
        query: what has to follow the path, a signature for instance.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder, self.asked, self.again = folder, Counter[str](), Counter[str]()
        self.faults: list[str] = []
        self.ranges, self.pace, self.stall, self.query = True, 0.0, 30.0, ""
        self.lock = threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that left is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            fault = server.faults.pop(0) if server.faults else ""
        path, _, query = self.path.lstrip("/").partition("?")
        file = server.folder / unquote(path)
        if query != server.query:
            fault = "403"
        if fault.isdecimal() or not file.is_file():
            self.send_error(int(fault or 404))
            return
        content, begin = file.read_bytes(), 0
        if server.ranges and (asked := self.headers.get("Range")):
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
        with server.lock:
            (server.again if begin else server.asked)[path] += 1
        if begin >= len(content) and begin:
            self.send_error(416)
            return
        if fault == "garbage":
            content = bytes(byte ^ 0xFF for byte in content)
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        half = begin + (len(content) - begin) // 2
        for place in range(begin, len(content), PIECE):
            if fault in ("drop", "stall", "short") and place + PIECE > half:
                self._break(fault, content[place:half])
                return
            time.sleep(server.pace)
            self.wfile.write(content[place : place + PIECE])

    def _break(self, fault: str, rest: bytes) -> None:
        self.wfile.write(rest)
        self.wfile.flush()
        if fault == "stall":
            time.sleep(self.server.stall)
        if fault == "drop":  # a reset, where "short" is an orderly end
            self.connection.setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[FaultyServer]:
    """A server of a folder, until the `with` ends."""
    server = FaultyServer(folder, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def start_elsewhere(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A server in a process of its own, whose socket goes when it is killed, whatever has been forked here meanwhile."""
    return subprocess.Popen([sys.executable, __file__, str(folder), str(port)])


if __name__ == "__main__":
    server = FaultyServer(Path(sys.argv[1]), int(sys.argv[2]))
    server.pace = 0.01
    server.serve_forever()
