"""A small Hugging Face hub on loopback, for the real client: files, and faults to order."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `files`, which lie in a folder of a data set repository. `faults[path]` is what happens to the next
    requests of a path: a status (500, …), ("drop", n): the connection ends after n bytes, or ("wait", event).
    ("HEAD", fault) happens to a HEAD request, others to a GET.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo = "someone/some-data"
        self.folder = "datasets"
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.status = 200  # of everything
        self.error_code = ""  # as the hub tells why
        self.delay = 0.0  # seconds that each GET takes
        self.requests: list[tuple[str, str]] = []  # method, path
        self.under_way = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        """The files that were asked for by GET so far."""
        return {path for method, path in self.requests if method == "GET" and not path.startswith("/")}

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no error of the hub's."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def next_fault(self, path: str):
        with self.server.lock:
            faults = self.server.faults.get(path, [])
            for_head = bool(faults) and isinstance(faults[0], tuple) and faults[0][0] == "HEAD"
            if not faults or for_head != (self.command == "HEAD"):
                return None
            return faults.pop(0)[1] if for_head else faults.pop(0)

    def respond(self) -> None:
        hub = self.server
        prefix = f"/datasets/{hub.repo}/resolve/main/{hub.folder}/".replace("//", "/")
        path = self.path.removeprefix(prefix)
        with hub.lock:
            hub.requests.append((self.command, path))  # what is not in the folder begins with a slash
        fault = self.next_fault(path)
        if not self.path.startswith(prefix):
            return self.refuse(404, "RepoNotFound")
        if hub.status != 200:
            return self.refuse(hub.status, hub.error_code)
        if path not in hub.files:
            return self.refuse(404, "EntryNotFound")
        if isinstance(fault, int):
            return self.refuse(fault, "")
        data = hub.files[path]
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        body = data[start:]
        kind, amount = fault or ("", 0)
        if kind == "wait":
            amount.wait(30)
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            with hub.lock:
                hub.under_way += 1
                hub.most_at_once = max(hub.most_at_once, hub.under_way)
            time.sleep(hub.delay)
            self.wfile.write(body[:amount] if kind == "drop" else body)
            with hub.lock:
                hub.under_way -= 1
            if kind == "drop":
                self.wfile.flush()
                self.close_connection = True

    do_GET = do_HEAD = respond


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that serves until the end of the block."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield hub
        hub.shutdown()
