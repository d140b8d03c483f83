"""A server for Google's storage protocol on loopback with one bucket, and the credentials of a fake account."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class Server(NamedTuple):
    """The server's objects, and how to reach it."""

    storage: Storage
    environment: dict[str, str]
    """Variables that Google's client reads."""
    bucket: str = f"gs://{BUCKET}"

    def keys(self, prefix: str = "") -> list[str]:
        """Names of all objects, without folder markers."""
        objects, _ = self.storage.get_file_list(BUCKET, prefix)
        return [item["name"] for item in objects if not item["name"].endswith("/")]

    def read(self, key: str) -> bytes:
        """An object's content."""
        content: bytes = self.storage.get_file(BUCKET, key)
        return content


@contextmanager
def gcs_server(folder: Path) -> Iterator[Server]:
    """A running server, stopped at the end of the block; the account's key is in `folder`."""
    storage = _Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    listener = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, storage))
    Thread(target=listener.serve_forever, daemon=True).start()
    account = folder / "account.json"
    account.touch(mode=0o600)
    account.write_text(json.dumps(_account()))
    environment = {
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://127.0.0.1:{listener.server_port}",
        "GOOGLE_APPLICATION_CREDENTIALS": str(account),
    }
    try:
        yield Server(storage, environment)
    finally:
        listener.shutdown()
        listener.server_close()


class _Storage(Storage):  # type: ignore[misc]
    """Adds what Google's server lists with `includeTrailingDelimiter`, which pyarrow sets and the emulator ignores."""

    def get_file_list(
        self, bucket: str, prefix: str | None = None, delimiter: str | None = None, *more: Any, **options: Any
    ) -> tuple[list[dict[str, Any]], list[str]]:
        files, prefixes = super().get_file_list(bucket, prefix, delimiter, *more, **options)
        if delimiter:
            inside, _ = super().get_file_list(bucket, prefix)
            files += [item for item in inside if item["name"] in prefixes]  # folders with an object of their own
        return files, prefixes


class _Quiet(RequestHandler):  # type: ignore[misc]
    """One request at a time: the emulator's storage supports no more."""

    turn = Lock()
    lost = 0
    """Number of coming deletions whose response is lost."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        with self.turn:
            super().do_GET()

    def do_POST(self) -> None:
        with self.turn:
            super().do_POST()

    def do_PUT(self) -> None:
        with self.turn:
            super().do_PUT()

    def do_DELETE(self) -> None:
        with self.turn:
            lose = _Quiet.lost > 0
            if lose:
                _Quiet.lost -= 1
                self.wfile = BytesIO()
            super().do_DELETE()
        if lose:
            self.close_connection = True


def lose_answers(deletions: int) -> None:
    """Make the store delete without its response arriving."""
    _Quiet.lost = deletions


def _account() -> dict[str, str]:
    """A service account, which signs its requests itself and requests no token."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    return {
        "type": "service_account",
        "project_id": "invented",
        "private_key_id": "1",
        "private_key": pem,
        "client_email": "nobody@invented.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "http://127.0.0.1:1/token",
    }
