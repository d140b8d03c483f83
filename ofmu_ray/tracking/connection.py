"""Reach a tracking server or database within seconds, or name the option to change.

MLflow retries an unreachable server for minutes and an unusable database for two. Everything here uses
`MlflowClient`: the fluent API (`mlflow.set_experiment`) exports MLFLOW_EXPERIMENT_ID to the environment, which Ray
workers inherit and which overrides every later experiment name.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ofmu_ray.errors import UserError
from ofmu_ray.storage import is_uri, local_path

CONNECT_SECONDS = 5
ANSWER_SECONDS = 30
"""For a reachable server; on a busy machine, a fresh one took more than five for its first response."""
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_SQLITE_MAGIC = b"SQLite format 3\0"


def resolve_uri(uri: str | None, storage: str) -> str:
    """The tracking URI with an absolute SQLite path, as workers have another working directory.

    Raises:
        UserError: MLflow no longer supports the URI, or the default does not work with this storage.
    """
    if uri is None:
        if is_uri(storage):
            raise UserError(
                f"tracking.uri = null keeps MLflow's database under storage = {storage!r}, but SQLite needs a local "
                "disk: set a tracking server with --tracking.uri http://HOST:PORT (or, on one machine, sqlite:///FILE)"
            )
        return f"sqlite:///{local_path(storage) / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    scheme = _scheme(uri)
    if scheme in _PORTS or scheme == "databricks":
        return uri
    raise UserError(
        f"tracking.uri = {without_password(uri)!r}: use null, sqlite:///FILE, http(s)://HOST:PORT or a database such "
        "as postgresql://HOST/NAME (MLflow no longer supports folders of files)"
    )


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite tracking URI."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """The URI in a form safe to show."""
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))


def check_reachable(uri: str) -> None:
    """Open the database file or connect to the server's port, before MLflow would retry for minutes.

    Raises:
        UserError: names tracking.uri and the problem.
    """
    file = sqlite_file(uri)
    if file is not None:
        _check_sqlite(file)
        return
    parts = urlsplit(uri)
    if parts.hostname is None:  # databricks: the SDK finds the host in its own configuration
        return
    try:
        port = parts.port or _PORTS[_scheme(uri)]
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise unreachable(uri, error) from None


def check_server(uri: str | None) -> None:
    """Connect to a server, if `tracking.uri` names one; its database is not opened. Raises UserError."""
    if uri is None:
        return
    resolved = resolve_uri(uri, "")
    if sqlite_file(resolved) is None:
        check_reachable(resolved)


def unreachable(uri: str, error: object) -> UserError:
    """The error for an unreachable tracking server."""
    return UserError(
        f"tracking.uri = {without_password(uri)!r}: MLflow is not reachable ({error}): start it, correct the address, "
        "or set tracking.uri to null for a local database"
    )


def client(uri: str) -> Any:
    """An `MlflowClient` for this URI; silences log lines of MLflow and its migrations below warnings."""
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store", "mlflow.system_metrics", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def impatient(retries: int = 0, timeout_seconds: int = ANSWER_SECONDS) -> Iterator[None]:
    """Few retries and a short timeout for MLflow's HTTP calls in this block.

    MLflow has these settings as environment variables only and reads them at every request; they are restored here.
    """
    settings = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_seconds),
        "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def creation_lock(uri: str) -> Iterator[None]:
    """Lets one driver at a time create the tables of a SQLite database."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    from filelock import FileLock

    with FileLock(f"{file}.lock"):
        yield


def _scheme(uri: str) -> str:
    """postgresql+psycopg2://... -> postgresql; a word without a scheme (databricks) -> itself."""
    return uri.partition(":")[0].partition("+")[0].lower()


def _check_sqlite(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as stream:  # creates the file: fails here if not writable
            stream.seek(0)
            head = stream.read(len(_SQLITE_MAGIC))
    except OSError as error:
        raise UserError(
            f"tracking.uri = 'sqlite:///{file}': cannot be written ({error.strerror}): "
            "choose another file with --tracking.uri or another --storage"
        ) from None
    if head not in (b"", _SQLITE_MAGIC):
        raise UserError(f"tracking.uri = 'sqlite:///{file}': not a SQLite database: choose another file")
