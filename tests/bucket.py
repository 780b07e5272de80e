"""A bucket on loopback that can be made to fail: gcp-storage-emulator's handlers behind a server of
our own, which answers several requests at once, holds to `ifGenerationMatch` and tells generations
with what it sends (the emulator does neither), and has faults to order.
"""

import contextlib
import http.server
import logging
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

NAME = "test-bucket"


class Bucket:
    """A bucket that a context serves.

    Attributes:
        fault: called with each request's method and path: None to answer it, a number to answer
            with that code, "cut" to close the connection, or how many seconds to be silent for.
        requests: the methods and paths of all that came.
        environment: what makes a process find it.
    """

    def __init__(self, port: int) -> None:
        self.fault: Callable[[str, str], int | float | str | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self.environment = {
            "STORAGE_EMULATOR_HOST": f"http://localhost:{port}",
            "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{port}",
            "NO_GCE_CHECK": "true",
        }
        self.storage = Storage(use_memory_fs=True)
        self.lock = threading.RLock()
        buckets.create_bucket(NAME, self.storage)

    def names(self, prefix: str = "") -> list[str]:
        """The objects there, by name."""
        with self.lock:
            found = self.storage.objects.get(NAME, {})
            return sorted(name for name in found if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        with self.lock:
            return self.storage.get_file(NAME, name)

    def generation(self, name: str) -> int:
        with self.lock:
            found = self.storage.objects.get(NAME, {}).get(name)
            return int(found["generation"]) if found else 0

    def down_for(self, seconds: float) -> None:
        """Answers 503 from now on for so long."""
        until = time.monotonic() + seconds
        self.fault = lambda method, path: 503 if time.monotonic() < until else None


@contextlib.contextmanager
def served() -> Iterator[Bucket]:
    """A new, empty bucket."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)

    class Handler(RequestHandler):
        def __init__(self, *args) -> None:
            super().__init__(bucket.storage, *args)

        def answer(self, method: str) -> None:
            bucket.requests.append((method, self.path))
            fault = bucket.fault(method, urllib.parse.unquote(self.path))
            if isinstance(fault, float):
                time.sleep(fault)
                fault = "cut"
            if fault == "cut":
                self.close_connection = True
                return
            if fault is not None:
                self.refuse(fault)
                return
            with bucket.lock:
                if (wanted := self.wanted_generation()) is None or wanted[1] == bucket.generation(
                    wanted[0]
                ):
                    getattr(super(), f"do_{method}")()
                    return
            self.refuse(412)

        def end_headers(self) -> None:
            generation = bucket.generation(self.path_name())
            if self.command == "GET" and generation:
                self.send_header("x-goog-generation", str(generation))
            super().end_headers()

        def wanted_generation(self) -> tuple[str, int] | None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            if "ifGenerationMatch" not in query:
                return None
            name = query["name"][0] if "name" in query else self.path_name()
            return name, int(query["ifGenerationMatch"][0])

        def path_name(self) -> str:
            found = re.search(r"/o/([^?]+)", self.path)
            return urllib.parse.unquote(found[1]) if found else ""

        def refuse(self, code: int) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = b'{"error": {"code": %d, "message": "as ordered"}}' % code
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:  # noqa: N802
            self.answer("GET")

        def do_POST(self) -> None:  # noqa: N802
            self.answer("POST")

        def do_PUT(self) -> None:  # noqa: N802
            self.answer("PUT")

        def do_DELETE(self) -> None:  # noqa: N802
            self.answer("DELETE")

        def do_PATCH(self) -> None:  # noqa: N802
            self.answer("PATCH")

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request, client_address) -> None:
            """A client that was killed is no news."""

    with Server(("localhost", 0), Handler) as server:
        bucket = Bucket(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield bucket
        finally:
            server.shutdown()
