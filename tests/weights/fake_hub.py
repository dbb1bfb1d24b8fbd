"""A hub on this machine, in the shapes of Hugging Face's and of ModelScope's HTTP API."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"


class FakeHub:
    """One model, `owner/model`. `break_at` cuts the first answer that holds that file after so many bytes."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.break_at: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []
        """File and range of each download."""
        self.url = ""

    def describe(self, path: str, query: dict[str, list[str]]) -> Any:
        if path in ("/api/models/owner/model", "/api/models/owner/model/revision/v1"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            return {"id": "owner/model", "modelId": "owner/model", "sha": COMMIT, "siblings": siblings, "tags": []}
        if path == "/api/v1/models/owner/model/repo/files" and query["Revision"] == ["master"]:
            files = [
                {"Path": name, "Size": len(content), "Type": "blob", "Sha256": hashlib.sha256(content).hexdigest()}
                for name, content in self.files.items()
            ]
            return {"Data": {"Files": files}}
        return None

    def file_of(self, path: str, query: dict[str, list[str]]) -> str | None:
        if path.startswith("/owner/model/resolve/"):
            return path.split("/", 5)[5]
        return query["FilePath"][0] if path == "/api/v1/models/owner/model/repo" else None


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        described = self.hub.describe(url.path, query)
        name = self.hub.file_of(url.path, query)
        if described is not None:
            self._send(200, json.dumps(described).encode(), {})
        elif name is not None and name in self.hub.files:
            self._send_file(name)
        else:
            is_known = url.path.startswith("/api/models/owner/model/revision/")
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound" if is_known else "RepoNotFound"})

    do_HEAD = do_GET

    def _send_file(self, name: str) -> None:
        content = self.hub.files[name]
        asked = self.headers.get("range")
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        status, part = 200, content
        if asked:
            begin = int(asked.removeprefix("bytes=").split("-")[0])
            status, part = 206, content[begin:]
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        if self.command == "GET":
            self.hub.asked.append((name, asked))
        self._send(status, part, headers, self.hub.break_at.pop(name, None) if self.command == "GET" else None)

    def _send(self, status: int, content: bytes, headers: dict[str, str], break_at: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:break_at])
        if break_at is not None:
            self.close_connection = True


@contextlib.contextmanager
def served_hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    hub = FakeHub(files)
    handler = type("_HubHandler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
