"""A PostgreSQL cluster in a temporary folder, on a Unix socket only."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiers import missing

BINARIES = [Path(f"/usr/lib/postgresql/{version}/bin") for version in range(18, 12, -1)]


def binaries() -> Path | None:
    """The folder with initdb and postgres, if PostgreSQL is installed."""
    on_path = shutil.which("initdb")
    found = [folder for folder in BINARIES if (folder / "initdb").exists()]
    return Path(on_path).resolve().parent if on_path else found[0] if found else None


def _as_postgres() -> dict[str, int]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": account.pw_uid, "group": account.pw_gid}
    return missing("postgres", "root, and there is no account postgres or nobody to run PostgreSQL as")


@contextmanager
def postgres() -> Iterator[str]:
    """The URI of a fresh database; the server ends with the block. Skips where PostgreSQL is not installed."""
    folder = binaries()
    if folder is None:
        missing("postgres", "no PostgreSQL (initdb) on this machine: apt-get install postgresql")
    account = _as_postgres()
    home = Path(tempfile.mkdtemp(prefix="ofmu-pg-", dir="/tmp"))  # a socket's path has 107 characters at most
    try:
        if account:
            os.chown(home, account["user"], account["group"])
        environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(home), "LC_ALL": "C.UTF-8"}
        shared: dict = {**account, "env": environment, "cwd": home, "stdin": subprocess.DEVNULL}
        data = home / "data"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        initdb = [folder / "initdb", "-D", data, "-U", "ofmu", "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(initdb, check=True, **quiet, **shared)
        options = f"-k {home} -c listen_addresses='' -c max_connections=40"
        start = [folder / "pg_ctl", "-D", data, "-w", "-t", "60", "-l", home / "log", "-o", options]
        subprocess.run([*start, "start"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **shared)
        try:
            yield f"postgresql+psycopg://ofmu@/postgres?host={home}"
        finally:
            subprocess.run([folder / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **quiet, **shared)
    finally:
        shutil.rmtree(home, ignore_errors=True)
