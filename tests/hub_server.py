"""The part of the Hugging Face hub's HTTP API that a push, and a public data set, use; on loopback, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_test"
OWNER = "someone"
COMMIT = "a" * 40


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class Hub:
    """The server's content, and how to reach it."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256, as uploaded."""
    data_sets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files of public data sets by name."""
    broken: bool = False
    """Whether commits fail."""


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A running hub, stopped at the end of the block."""
    hub = Hub()
    listener = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{listener.server_port}"
    Thread(target=listener.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        listener.shutdown()
        listener.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refused(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self._answer({"error": "Invalid user token."}, 401)
        return True

    def _data_set(self, path: str) -> None:
        """/api/datasets/OWNER/NAME/..., or /datasets/OWNER/NAME/resolve/COMMIT/FILE."""
        _, _, rest = path.rpartition("datasets/")
        name = "/".join(rest.split("/")[:2])
        what, _, after = rest.removeprefix(name).strip("/").partition("/")
        inside, files = after.partition("/")[2], self.hub.data_sets.get(name)
        if files is None:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif what == "resolve" and inside in files:
            self._answer(files[inside], X_Repo_Commit=COMMIT, ETag=f'"{_digest(files[inside])}"')
        elif what == "resolve":
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        elif what == "tree":
            under = [file for file in files if file.startswith(f"{inside}/")]
            entries = [{"type": "file", "path": f, "size": len(files[f]), "oid": _digest(files[f])} for f in under]
            self._answer(entries)
        else:
            siblings = [{"rfilename": file} for file in files]
            self._answer(
                {"id": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "siblings": siblings}
            )

    def do_HEAD(self) -> None:
        self._data_set(self.path.partition("?")[0])

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "datasets/" in path:
            self._data_set(path)
            return
        if self._refused():
            return
        if path == "/api/whoami-v2":
            self._answer({"name": OWNER, "type": "user", "orgs": []})
        elif (repository := self.hub.repositories.get(path.removeprefix("/api/models/"))) is not None:
            name = path.removeprefix("/api/models/")
            self._answer({"id": name, "modelId": name, "private": repository.private, "sha": "0" * 40, "siblings": []})
        else:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_PUT(self) -> None:
        self.hub.large[self.path.removeprefix("/lfs/")] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self._refused():
            return
        hub, path = self.hub, self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or OWNER}/{asked['name']}"
            hub.repositories.setdefault(name, Repository(asked.get("visibility") == "private"))
            self._answer({"url": f"{hub.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":  # the model card's front matter
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main") and not hub.broken:
            self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        else:
            self._answer({"error": "no"}, 400)

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.large[value["oid"]]
        repository.commits += 1
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})
