"""Forget text in everything that a service, PostgreSQL, a processor on Ray and MLflow leave behind: nowhere."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from leak_scan import leaks
from postgres_server import binaries, postgres
from requests_world import CRIPPLED, STRONG, World, pairs, people

from ofmu_ray.requests.database import writing
from ofmu_ray.requests.schema import PayloadRecord

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.system, pytest.mark.full]
SPILLING = {
    "RAY_object_spilling_threshold": "0", "RAY_min_spilling_size": "0", "RAY_max_direct_call_object_size": "0",
}  # fmt: skip
"""Ray's settings with which every object goes to the object store, and from there to the disk at once."""


def dumped(uri: str, path: Path) -> None:
    """pg_dump of a database: text as it is, bytes in hex."""
    folder = binaries()
    assert folder is not None
    command = [folder / "pg_dump", "--inserts", "--dbname", uri.replace("+psycopg", "")]
    path.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)


def for_review(world: World, person: int) -> None:
    """A request that no recipe satisfies."""
    path = world.folder / "requests.yaml"
    before = path.read_text()
    config = yaml.safe_load(before)
    config["requests"]["promotion"]["recipes"] = [CRIPPLED]
    config["training"] |= {"engine": "torch", "workers": 1}
    path.write_text(yaml.safe_dump(config))
    request = world.add(person)
    assert world.call("process") == 1
    assert world.state(request) == "needs_review"
    path.write_text(before)


def test_no_text_in_dumps_logs_mlflow_and_rays_session(tmp_path: Path) -> None:
    """Two workers on Ray, a ledger in PostgreSQL, the service and the processor in processes of their own.

    Person 0 is promoted, 1 is cancelled, 2 needs a review.
    """
    with postgres() as uri, tempfile.TemporaryDirectory(prefix="ofmu", dir="/tmp", ignore_cleanup_errors=True) as ray:
        world = World.made(
            tmp_path, [STRONG], {"engine": "deepspeed", "workers": 2, "cpus_per_worker": 0.5}, ledger=uri
        )
        rows = pairs(people("forget"), 0)
        needles = [text for person in range(3) for row in pairs(people("forget"), person) for text in row.values()]
        for_review(world, 2)
        assert world.call("cancel", world.add(1)) == 0
        logs = tmp_path / "logs"
        logs.mkdir()
        words = [sys.executable, "-m", "pipelines.cli", "requests"]
        environment = {**os.environ, **SPILLING, "RAY_TMPDIR": ray}
        with (logs / "server.log").open("wb") as log:
            options = ["--config", str(tmp_path / "requests.yaml"), "--requests.service.port", "0"]
            server = subprocess.Popen([*words, "serve", *options], stdout=log, stderr=log, cwd=ROOT, env=environment)
        try:
            request = _submitted(world, logs / "server.log", server, rows)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
        with (logs / "processor.log").open("wb") as log:
            options = ["--config", str(tmp_path / "requests.yaml")]
            subprocess.run([*words, "process", *options], stdout=log, stderr=log, cwd=ROOT, env=environment, check=True)
        assert world.state(request) == "promoted"
        session = next(Path(ray).glob("ray/session_*/logs"))
        assert any(b"Spilled" in path.read_bytes() for path in session.glob("raylet*")), "the run was to spill objects"
        (logs / "commands.log").write_text("\n".join(world.said))
        places = [world.storage, logs, Path(ray)]
        dumped(uri, logs / "ledger.sql")
        assert b"INSERT INTO public.ofmu_payloads" in (logs / "ledger.sql").read_bytes()
        assert leaks(places, needles) == []
        _leaks_on_purpose(world, uri, request, places, needles)


def _leaks_on_purpose(world: World, uri: str, request: str, places: list[Path], needles: list[str]) -> None:
    """One in each of the places is found."""
    rows, (_, logs, ray) = pairs(people("forget"), 0), places
    with world.ledger() as ledger:
        with writing(ledger.engine) as session:
            payload = session.get(PayloadRecord, request)
            assert payload is not None
            sealed, payload.ciphertext = payload.ciphertext, rows[4]["question"].encode()
        dumped(uri, logs / "bytes.sql")
        with writing(ledger.engine) as session:
            session.merge(PayloadRecord(request_id=request, ciphertext=sealed))
        ledger.move(request, "accepted", {"note": rows[0]["answer"]})
    dumped(uri, logs / "ledger.sql")
    with sqlite3.connect(world.storage / "mlflow.db") as database:
        database.execute("UPDATE tags SET value = ?", ("x" * 9000 + rows[1]["question"],))
    for name in ("server.log", "processor.log"):
        with (logs / name).open("a") as file:
            file.write(rows[2]["answer"].casefold())
    (next(ray.glob("ray/session_*/logs")) / "worker.out").write_text(f"GET /{rows[3]['question']}")
    found = {Path(one).name for one in leaks(places, needles)}
    assert {"bytes.sql", "ledger.sql", "mlflow.db", "server.log", "processor.log", "worker.out"} <= found


def _submitted(world: World, log: Path, server: subprocess.Popen[bytes], rows: list[dict[str, str]]) -> str:
    """Submit rows to the service that writes this log; the request's id."""
    import re
    from datetime import timedelta

    from requests_server import Service

    from ofmu_ray.requests import tokens

    end = time.monotonic() + 300
    while not (found := re.search(r"http://([\d.]+):(\d+)", log.read_text())):
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < end, "the service did not start"
        time.sleep(0.5)
    with world.ledger() as ledger:
        secret = tokens.create(ledger, "test", ["submit"], timedelta(days=1))[1]
        service = Service(found[1], int(found[2]), ledger, world.config, secret)
        assert (
            service.call("POST", "/v1/requests", {"key": "k", "rows": rows[:1], "extra": rows[1]["answer"]})[0] == 422
        )
        status, _, _ = service.call("POST", "/v1/requests", {"key": "person-0", "rows": rows})
        assert status == 201
        (request,) = ledger.all(("accepted",))
        return request.id
