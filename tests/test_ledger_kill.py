"""A process that writes the ledger is killed (SIGKILL) before each statement, before and after each commit.

Whatever it reported as done is there, the next process goes on, and no request is lost or done twice.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from ledger_machine import LEASE_SECONDS, MASTER, START, Clock, emptied, row
from postgres_server import postgres
from sqlalchemy import event

from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.states import State
from ofmu_ray.requests.vault import Vault

pytestmark = pytest.mark.system
STEPS: dict[str, State] = {"scheduled": "running", "running": "verifying", "verifying": "promoted"}
ONCE = {"received": 3, "accepted": 3, "scheduled": 2, "running": 2, "verifying": 2, "promoted": 2, "rejected": 1}
"""Events of each kind, whatever happened in between."""


def work(ledger: Ledger, owner: str, done: Callable[[str], None]) -> None:
    """Three requests, one of them withdrawn, two promoted and their texts destroyed; goes on where another stopped."""
    for number, key in enumerate("abc"):
        request = ledger.add(key, {"n": number}, [row(number)], deadline=timedelta(days=30))
        done(f"add {key}")
        if key == "c" and request.state == "accepted":
            ledger.move(request.id, "rejected")
            done("withdraw")
    batch = ledger.take(owner, LEASE_SECONDS)
    while batch:
        done("take")
        while (state := batch[0].state) in STEPS:
            certificate = '{"signed": true}' if state == "verifying" else None
            batch = ledger.move([one.id for one in batch], STEPS[state], owner=owner, certificate=certificate)
            done(batch[0].state)
        batch = ledger.take(owner, LEASE_SECONDS)
    ledger.destroy_expired(timedelta(0))
    done("destroy")


def until_killed(uri: str, at: int, said: Connection) -> None:
    """The process that is killed at its point number `at`; says what it has done, and with -1 how many points."""
    with Ledger(uri, Vault(MASTER), Clock()) as ledger:
        points = 0

        def point(*_: object) -> None:
            nonlocal points
            points += 1
            if points == at:
                os.kill(os.getpid(), signal.SIGKILL)

        for name in ("before_cursor_execute", "commit", "checkin"):
            event.listen(ledger.engine, name, point)
        work(ledger, "first", said.send)
        if at < 0:
            said.send(str(points))


def doomed(uri: str, at: int) -> list[str]:
    """What a process that is killed at its point number `at` reported as done; -1: the number of points, too."""
    # not a fork of this process: beside threads of Ray and torch, it can wait for their locks forever
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    reading, writing = context.Pipe(duplex=False)
    child = context.Process(target=until_killed, args=(uri, at, writing))
    child.start()
    writing.close()
    lines = []
    with suppress(EOFError):
        while True:
            lines.append(reading.recv())
    child.join()
    assert child.exitcode == (0 if at < 0 else -signal.SIGKILL), f"point {at}: {child.exitcode}"
    return lines


def check(uri: str, at: int) -> str:
    """Kill at a point, go on, look; returns what was being done."""
    done = doomed(uri, at)
    clock = Clock()
    with Ledger(uri, Vault(MASTER), clock) as ledger:
        assert ledger.audit() == [], at
        kinds = Counter(one.event for one in ledger.events())
        promised = Counter(done)
        assert kinds["received"] >= sum(promised[f"add {key}"] for key in "abc"), at
        for what, kind in (("take", "scheduled"), ("withdraw", "rejected"), *((s, s) for s in STEPS.values())):
            assert kinds[kind] >= promised[what], (at, what)
        clock.now = START + timedelta(seconds=LEASE_SECONDS + 1)
        work(ledger, "second", lambda _: None)
        assert ledger.audit() == [], at
        kinds = Counter(one.event for one in ledger.events())
        assert {kind: kinds[kind] for kind in ONCE} == ONCE, at
        assert kinds["key_destroyed"] == 3
        states = {one.key: one.state for one in ledger.all()}
        assert states == {"a": "promoted", "b": "promoted", "c": "rejected"}, at
        for one in ledger.all():
            assert (ledger.certificate(one.id) is not None) == (one.state == "promoted")
    return f"after {done[-1]}" if done else "first add"


def check_points(fresh: Callable[[], str], step: int) -> None:
    count = int(doomed(fresh(), -1)[-1])
    killed = Counter(check(fresh(), at) for at in range(1, count + 1, step))
    print(f"{killed.total()} of {count} points: {dict(killed)}")  # with -s: the figures of docs/reliability.md
    assert killed.total() >= 10


def sqlite(folder: Path) -> Callable[[], str]:
    Ledger(f"sqlite:///{folder}/empty.db", Vault(MASTER)).close()

    def fresh() -> str:
        for path in folder.glob("ledger.db*"):
            path.unlink()
        shutil.copy(folder / "empty.db", folder / "ledger.db")
        return f"sqlite:///{folder}/ledger.db"

    return fresh


@pytest.mark.slow
def test_killed_at_some_points(tmp_path: Path) -> None:
    check_points(sqlite(tmp_path), step=9)


@pytest.mark.full
def test_killed_at_every_point(tmp_path: Path) -> None:
    check_points(sqlite(tmp_path), step=1)


@pytest.mark.full
def test_killed_at_every_point_of_postgresql() -> None:
    with postgres() as uri:

        def fresh() -> str:
            with Ledger(uri, Vault(MASTER)) as ledger:
                emptied(ledger)
            return uri

        check_points(fresh, step=1)
