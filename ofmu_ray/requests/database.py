"""The ledger's database: SQLite or PostgreSQL, its migrations, and transactions that write one after the other."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from ofmu_ray.errors import StorageError, UserError
from ofmu_ray.requests.schema import REVISION

LOCK = 0x6F666D75
"""PostgreSQL's advisory lock of whoever writes to the ledger ('ofmu')."""
BUSY_SECONDS = 60
"""How long a writer waits for another on SQLite."""


def opened(uri: str) -> Engine:
    """The engine of a ledger, created or migrated if need be.

    Raises:
        UserError: not a database URI, no driver, no connection, a schema that is newer than this program.
    """
    try:
        url = make_url(uri)
        backend = url.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise ArgumentError(backend)
        if backend == "sqlite":
            _private_folder(url.database)
        waits: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}} if backend == "sqlite" else {}
        # a connection for each of the service's forty threads; statements in errors come without their values
        engine = create_engine(url, hide_parameters=True, max_overflow=40, pool_timeout=BUSY_SECONDS, **waits)
    except (ArgumentError, NoSuchModuleError):
        shown = uri if "@" not in uri else uri.partition("://")[0] + "://..."
        raise UserError(
            f"requests.ledger = {shown}: must be sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"
        ) from None
    except ModuleNotFoundError as error:
        raise UserError(f"requests.ledger: {error.name} is not installed: pip install 'ofmu-ray[postgres]'") from None
    if backend == "sqlite":
        _one_writer(engine)
    try:
        upgrade(engine)
    except (OperationalError, DatabaseError) as error:
        shown = url.render_as_string(hide_password=True)
        raise UserError(f"requests.ledger = {shown}: cannot be opened ({_first_line(error)})") from None
    return engine


def _first_line(error: DatabaseError) -> str:
    return str(error.orig).strip().partition("\n")[0]


def _private_folder(database: str | None) -> None:
    if database and database != ":memory:":
        folder = Path(database).parent
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(database, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise UserError(f"requests.ledger: {database} cannot be written ({error.strerror})") from None


def _one_writer(engine: Engine) -> None:
    """SQLite's own transactions (the driver begins them late), durable, and no remains of what is deleted."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("write") else "BEGIN")


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """A transaction that no other writer of the ledger overlaps, on any machine."""
    with _answering(), engine.connect().execution_options(write=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        with Session(connection, expire_on_commit=False) as session:
            yield session
            session.flush()


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """A transaction that sees one state of the ledger."""
    options = {} if engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
    with _answering(), engine.connect().execution_options(**options) as connection, Session(connection) as session:
        yield session


@contextmanager
def _answering() -> Iterator[None]:
    """A database that is gone, full or locked for too long is a StorageError."""
    try:
        yield
    except (OperationalError, PoolTimeout) as error:
        reason = _first_line(error) if isinstance(error, OperationalError) else "too many calls at once"
        raise StorageError(f"requests.ledger: the database does not answer ({reason}); try again") from None


def upgrade(engine: Engine) -> None:
    """Bring the schema to the newest revision. Two processes that open a new ledger at once do it once."""
    with engine.connect() as connection:
        if _revision(connection) == REVISION:
            return
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", "ofmu_ray.requests:migrations")
    with writing(engine) as session:
        config.attributes["connection"] = session.connection()
        try:
            command.upgrade(config, "head")
        except CommandError:
            found = _revision(session.connection())
            raise UserError(
                f"requests.ledger: its schema is {found}, which this version does not know (newest: {REVISION}); "
                "use the version of OFMU-Ray that migrated it, or a newer one"
            ) from None


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("ofmu_ledger_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM ofmu_ledger_version")).scalar()
    return found


def forget_pages(engine: Engine) -> None:
    """Remove what was overwritten: SQLite's log still holds such pages, PostgreSQL's tables dead rows."""
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ofmu_payloads, ofmu_secrets"))
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.rollback()
            raw = connection.connection.dbapi_connection
            assert raw is not None
            raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
