"""A web server of a folder, with ranges, that cuts off answers where a test wants it."""

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Files(http.server.SimpleHTTPRequestHandler):
    """A web server with ranges. `server.faults`: requests that are cut off in the middle, and `server.asked` what was asked."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.asked.append(
            (self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        whole, asked = len(content), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked:
            first, last = int(asked[1]), min(int(asked[2]), whole - 1)
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body and self.server.faults and len(content) > 100:
            self.server.faults -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[tuple[http.server.ThreadingHTTPServer, str]]:
    """The server, and its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        server.folder, server.faults, server.asked = folder, 0, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
