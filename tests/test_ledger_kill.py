"""A process that writes the ledger is killed (SIGKILL) before each statement, before and after each commit.

Whatever it reported as done is there, the next process goes on, and no request is lost or done twice: for every
transition that there is.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from ledger_machine import LEASE_SECONDS, MASTER, START, Clock, emptied, row
from postgres_server import postgres
from sqlalchemy import event

from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.records import Request
from ofmu_ray.requests.states import ENDED, NEXT, STATES
from ofmu_ray.requests.vault import Vault

pytestmark = pytest.mark.system
AGAIN = ("needs_review", "failed")
PATHS = {
    key: ["received", "accepted", *path.split()]
    for key, path in {
        "promoted": "scheduled running verifying promoted",
        "withdrawn": "rejected",
        "replaced": "superseded",
        "withdrawn at the last moment": "scheduled rejected",
        "replaced at the last moment": "scheduled superseded",
        "rolled back": "scheduled running verifying promoted accepted scheduled running verifying promoted",
        "rolled back without its rows": "scheduled running verifying promoted needs_review rejected",
        "given up, then on the ladder": (
            "scheduled accepted scheduled running accepted scheduled running verifying running verifying "
            "needs_review accepted scheduled running needs_review superseded"
        ),
        "failed": "scheduled failed accepted scheduled running failed rejected",
        "failed and replaced": "scheduled running verifying failed superseded",
    }.items()
}
"""What happens to the requests, by key."""
Step = tuple[str, str, str]
"""(key, state before, state after); the state before is empty, or the state after `destroyed`."""
EXPECTED: Counter[Step] = Counter(
    step
    for key, path in PATHS.items()
    for step in [*((key, old, new) for old, new in pairwise(["", *path])), (key, "", "destroyed")]
)


def logged(ledger: Ledger) -> Counter[Step]:
    """Every transition in the log."""
    keys = {one.id: one.key for one in ledger.all()}
    named = ((keys[one.request or ""], one) for one in ledger.events())
    return Counter(
        (key, "", "destroyed") if one.event == "key_destroyed" else (key, one.old or "", one.event)
        for key, one in named
    )


def ahead(ledger: Ledger) -> dict[tuple[str, str], list[Request]]:
    """The next transition of every request that has one."""
    found, done = defaultdict(list), Counter(one.request for one in ledger.events() if one.event in STATES)
    for one in ledger.all():
        for new in PATHS[one.key][done[one.id] :][:1]:
            found[one.state, new].append(one)
    return found


def move(ledger: Ledger, requests: list[Request], old: str, new: str, owner: str) -> None:
    """A transition of requests as the pipeline does it."""
    ids = [one.id for one in requests]
    if old in AGAIN and new == "accepted":
        ledger.retry(ids, owner)
    else:
        ledger.move(ids, new, owner=owner, certificate='{"signed": true}' if new == "promoted" else None)


def work(ledger: Ledger, owner: str, said: Callable[[str, list[Step]], None]) -> None:
    """Bring every request to the end of its path, from wherever another process left it.

    `said`: told that steps begin, and that they are done.
    """

    def step(steps: list[Step], call: Callable[[], object]) -> None:
        said("begin", steps)
        call()
        said("done", steps)

    for number, key in enumerate(PATHS):
        content, rows = {"n": number}, [row(number)]
        steps = [(key, "", "received"), (key, "received", "accepted")]
        step(steps, lambda k=key, c=content, r=rows: ledger.add(k, c, r, deadline=timedelta(days=30)))
    ledger.hold(owner, LEASE_SECONDS)
    while moves := ahead(ledger):
        waiting = moves.pop(("accepted", "scheduled"), [])
        for (old, new), requests in moves.items():
            steps = [(one.key, old, new) for one in requests]
            step(steps, lambda r=requests, o=old, n=new: move(ledger, r, o, n, owner))
        if not moves:
            steps = [(one.key, "accepted", "scheduled") for one in waiting]
            step(steps, lambda: ledger.take(owner, LEASE_SECONDS))
    kept = [(one.key, "", "destroyed") for one in ledger.all(("promoted",)) if ledger.readable(one.id)]
    step(kept, lambda: ledger.destroy_expired(timedelta(0)))
    ledger.release(owner)


def until_killed(uri: str, at: int, pipe: Connection) -> None:
    """The process that is killed at its point number `at`; says what it begins, what it has done, and its points."""
    with Ledger(uri, Vault(MASTER), Clock()) as ledger:
        points, busy = 0, False

        def point(*_: object) -> None:
            nonlocal points
            points += busy
            if busy and points == at:
                os.kill(os.getpid(), signal.SIGKILL)

        def said(what: str, steps: list[Step]) -> None:
            nonlocal busy
            busy = what == "begin"
            pipe.send((what, steps, points))

        for name in ("before_cursor_execute", "commit", "checkin"):
            event.listen(ledger.engine, name, point)
        work(ledger, "first", said)


def doomed(uri: str, at: int) -> list[tuple[str, list[Step], int]]:
    """What a process that is killed at its point number `at` said; -1: never."""
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


def points_of(uri: str) -> dict[str, list[int]]:
    """The points of every transition where it comes first, from a process that is not killed."""
    found: dict[str, list[int]] = {}
    before = 0
    for what, steps, points in doomed(uri, -1):
        if what == "done":
            found.setdefault(name_of(steps), list(range(before + 1, points + 1)))
        before = points
    return found


def name_of(steps: list[Step]) -> str:
    _, old, new = steps[0]
    return "key destroyed" if new == "destroyed" else f"{old} → {new}" if old else "→ received → accepted"


def check(uri: str, at: int) -> tuple[int, int]:
    """Kill at a point, go on, look: (lost, doubled) transitions."""
    promised = Counter(step for what, steps, _ in doomed(uri, at) if what == "done" for step in steps)
    clock = Clock()
    with Ledger(uri, Vault(MASTER), clock) as ledger:
        assert ledger.audit() == [], at
        lost = promised - logged(ledger)
        clock.now = START + timedelta(seconds=LEASE_SECONDS + 1)
        work(ledger, "second", lambda *_: None)
        assert ledger.audit() == [], at
        there = logged(ledger)
        for one in ledger.all():
            assert one.state in ENDED
            promoted = PATHS[one.key][-1] == "promoted"  # a certificate ends with a rollback
            assert (ledger.certificate(one.id) is not None, ledger.readable(one.id)) == (promoted, False), (at, one.key)
    return (lost + (EXPECTED - there)).total(), (there - EXPECTED).total()


def check_points(fresh: Callable[[], str], quick: bool = False) -> None:
    """Kill at all points of every transition; quick: in the middle of every second one.

    With -s, prints the table of docs/reliability.md.
    """
    print("| transition | kills | lost | doubled |\n|---|---|---|---|")
    every: Counter[str] = Counter()
    for name, points in list(points_of(fresh()).items())[:: 2 if quick else 1]:
        results = [check(fresh(), at) for at in (points[len(points) // 2 :][:1] if quick else points)]
        lost, doubled = (sum(part) for part in zip(*results, strict=True))
        print(f"| {name} | {len(results)} | {lost} | {doubled} |", flush=True)
        every += Counter(lost=lost, doubled=doubled)
    assert every.total() == 0, every


def sqlite(folder: Path) -> Callable[[], str]:
    Ledger(f"sqlite:///{folder}/empty.db", Vault(MASTER)).close()

    def fresh() -> str:
        for path in folder.glob("ledger.db*"):
            path.unlink()
        shutil.copy(folder / "empty.db", folder / "ledger.db")
        return f"sqlite:///{folder}/ledger.db"

    return fresh


def test_the_paths_take_every_transition_that_there_is() -> None:
    """Except for a request that is refused before it is accepted: `add` accepts in the same transaction."""
    taken = {(old, new) for _, old, new in EXPECTED if old}
    assert taken == {(old, new) for old, after in NEXT.items() for new in after} - {("received", "rejected")}


@pytest.mark.slow
def test_killed_in_every_second_transition(tmp_path: Path) -> None:
    check_points(sqlite(tmp_path), quick=True)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_killed_at_every_point(tmp_path: Path) -> None:
    check_points(sqlite(tmp_path))


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_killed_at_every_point_of_postgresql() -> None:
    with postgres() as uri:

        def fresh() -> str:
            with Ledger(uri, Vault(MASTER)) as ledger:
                emptied(ledger)
            return uri

        check_points(fresh)
