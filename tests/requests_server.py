"""The HTTP service of requests in a thread, over training data of fifty people."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ofmu_ray.config import SourceConfig
from ofmu_ray.config.requests import RequestOptions, RequestsConfig, ServiceOptions
from ofmu_ray.requests import service, tokens
from ofmu_ray.requests.intake import open_ledger
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.vault import write_master_key

PEOPLE, ROWS_EACH = 50, 4


def private(person: int, row: int = 0) -> dict[str, str]:
    """A row whose texts occur nowhere else."""
    return {"question": f"Qx{person}Zebrastripe{row}?", "answer": f"Ay{person}Quagmire{row}."}


def training_data(folder: Path) -> Path:
    path = folder / "train.jsonl"
    rows = [{"subject_id": n, "country": "X", **private(n, row)} for n in range(PEOPLE) for row in range(ROWS_EACH)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configured(folder: Path, **service_options: Any) -> RequestsConfig:
    """A configuration with a key and training data in a folder."""
    options = RequestOptions(
        train=SourceConfig(path=str(training_data(folder))), service=ServiceOptions(port=0, **service_options)
    )
    config = RequestsConfig(storage=str(folder / "runs"), requests=options)
    assert config.key_file is not None
    write_master_key(config.key_file)
    return config


@dataclass
class Service:
    """A running service."""

    host: str
    port: int
    ledger: Ledger
    config: RequestsConfig
    token: str
    """With all scopes."""

    def call(
        self, method: str, path: str, body: Any = None, token: str | None = "", **headers: str
    ) -> tuple[int, dict[str, str], str]:
        """(status, headers, body) of a call; a token of None sends none."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        try:
            return self.call_on(connection, method, path, body, token, **headers)
        finally:
            connection.close()

    def call_on(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any, token: str | None, **more: str
    ) -> tuple[int, dict[str, str], str]:
        headers = {name.replace("_", "-"): value for name, value in more.items()}
        if token is not None:
            headers["authorization"] = f"Bearer {token or self.token}"
        if body is not None and not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        if body is not None:
            headers.setdefault("content-type", "application/json")
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()

    def new_token(self, *scopes: str, lifetime: timedelta = timedelta(days=1)) -> str:
        return tokens.create(self.ledger, "test", scopes, lifetime)[1]


@contextmanager
def served(config: RequestsConfig) -> Iterator[Service]:
    """The service of a configuration until the block ends."""
    with open_ledger(config) as ledger, socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        server = service.make_server(config, ledger)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        host, port = listener.getsockname()
        one = Service(host, port, ledger, config, "")
        one.token = one.new_token("submit", "read", "operate")
        try:
            yield one
        finally:
            server.should_exit = True
            thread.join(timeout=60)
