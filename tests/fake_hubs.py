"""Hugging Face's and ModelScope's file APIs on localhost, over a folder; they can cut a file short or spoil it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL_ID = "tuoling/tiny"


class FakeHub:
    """What the handler serves and what it saw.

    lfs: names whose checksum is a SHA-256 (large files); the others have git's SHA-1. cut: name → bytes sent before
    the connection breaks, once. stall: name → bytes sent before the server waits for `release`, once.
    spoil: names that are sent with their last byte changed. redirect: name → another hub that has the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lfs = {"model.safetensors", "pytorch_model.bin"}
        self.cut: dict[str, int] = {}
        self.spoil: set[str] = set()
        self.stall: dict[str, int] = {}
        self.release = threading.Event()
        self.redirect: dict[str, str] = {}
        self.tokens: list[str | None] = []
        self.fetched: list[tuple[str, str | None]] = []
        self.requests: list[str] = []
        self.url = ""

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def etag(self, name: str) -> str:
        data = (self.folder / name).read_bytes()
        if name in self.lfs:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

    def tree(self) -> list[dict[str, object]]:
        entries: list[dict[str, object]] = []
        for name in self.files():
            size = (self.folder / name).stat().st_size
            entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": self.etag(name)}
            if name in self.lfs:
                entry["lfs"] = {"oid": self.etag(name), "size": size, "pointerSize": 130}
            entries.append(entry)
        return entries


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, *, body: bool) -> None:
        url = urlparse(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.hub.tokens.append(self.headers.get("Authorization"))
        self.hub.requests.append(f"{self.command} {path}")
        ours = re.escape(MODEL_ID)
        if re.fullmatch(rf"/api/models/{ours}/tree/[^/]+", path):
            self._json(self.hub.tree())
        elif re.fullmatch(rf"/api/models/{ours}(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in self.hub.files()]
            self._json({"id": MODEL_ID, "modelId": MODEL_ID, "sha": COMMIT, "siblings": siblings})
        elif match := re.fullmatch(rf"/{ours}/resolve/[^/]+/(.+)", path):
            self._file(match[1], body=body)
        elif path == f"/api/v1/models/{MODEL_ID}/repo/files":
            self._json({"Code": 200, "Success": True, "Data": {"Files": self._modelscope_files()}})
        elif path == f"/api/v1/models/{MODEL_ID}/repo":
            self._file(query["FilePath"][0], body=body)
        else:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _modelscope_files(self) -> list[dict[str, object]]:
        files: list[dict[str, object]] = [{"Path": "sub", "Type": "tree", "Size": 0}]
        for name in self.hub.files():
            data = (self.hub.folder / name).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            files.append({"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": digest})
        return files

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _file(self, name: str, *, body: bool) -> None:
        hub = self.hub
        if not (hub.folder / name).is_file():
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        if body and name in hub.redirect:
            self._json({}, 302, {"Location": hub.redirect[name] + self.path})
            return
        data = (hub.folder / name).read_bytes()
        if name in hub.spoil:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        asked = self.headers.get("Range")
        if body:
            hub.fetched.append((name, asked))
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hub.etag(name)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not body:
            return
        if name in hub.cut:
            self.wfile.write(data[start : hub.cut.pop(name)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        if name in hub.stall:
            self.wfile.write(data[start : hub.stall.pop(name)])
            self.wfile.flush()
            hub.release.wait(60)
            self.close_connection = True
            return
        self.wfile.write(data[start:])


@contextmanager
def serve(folder: Path) -> Iterator[FakeHub]:
    """A hub that holds MODEL_ID with the files of `folder`."""
    hub = FakeHub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
