"""The ledger against a model of a few dicts, as a stateful hypothesis test; and what its tests share."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ofmu_ray.errors import UserError
from ofmu_ray.requests.database import writing
from ofmu_ray.requests.lease import LeaseHeld
from ofmu_ray.requests.ledger import KeyTaken, Ledger
from ofmu_ray.requests.schema import Base
from ofmu_ray.requests.states import IN_WORK, NEXT, STATES, WITHDRAWN
from ofmu_ray.requests.vault import Vault

MASTER = bytes(range(32))
START = datetime(2026, 1, 1, tzinfo=UTC)
LEASE_SECONDS = 100
KEEP = timedelta(seconds=150)
OWNERS = st.sampled_from(["ann", "bob"])


def row(number: int) -> dict[str, str]:
    return {"id": f"train-{number}", "question": f"Question {number}?", "answer": f"Answer {number}."}


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


def emptied(ledger: Ledger) -> None:
    """Delete everything in a ledger but its key."""
    with writing(ledger.engine) as session:
        for table in reversed(Base.metadata.sorted_tables):
            if table.name != "ofmu_secrets":
                session.execute(table.delete())


class LedgerMachine(RuleBasedStateMachine):
    """Every call gives what the model says, refusals too, and leaves a log without problems."""

    ledger: Ledger
    clock: Clock

    @initialize()
    def start(self) -> None:
        emptied(self.ledger)
        self.clock.now = START
        self.requests: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, tuple[int, str]] = {}
        self.lease: tuple[str, datetime] | None = None
        self.batches = 0

    # --------------------------------------------------------------------------------------------------- the model

    def held_by_other(self, owner: str | None) -> bool:
        return self.lease is not None and self.lease[0] != owner and self.lease[1] > self.clock.now

    def moved(self, one: dict[str, Any], state: str) -> None:
        one["state"] = state
        one["accepted"] = one["accepted"] or state == "accepted"
        one["ended"] = self.clock.now if state in ("promoted", *WITHDRAWN) else None
        one["batch"] = one["batch"] if state in (*IN_WORK, "promoted") else None
        one["readable"] = one["readable"] and state not in WITHDRAWN

    # --------------------------------------------------------------------------------------------------- the calls

    @rule(key=st.sampled_from("abcd"), content=st.integers(0, 2), repeat=st.booleans())
    def add(self, key: str, content: int, repeat: bool) -> None:
        rows = [row(content), row(content + 1), *([row(content)] if repeat else [])]
        call = {"deadline": timedelta(days=30), "data": "d", "by": "t"}
        if key in self.keys and self.keys[key][0] != content:
            with pytest.raises(KeyTaken):
                self.ledger.add(key, {"n": content}, rows, **call)
            return
        request = self.ledger.add(key, {"n": content}, rows, **call)
        if key in self.keys:
            assert request.id == self.keys[key][1]
            return
        assert request.id not in self.requests
        assert (request.state, request.row_count) == ("accepted", 2)
        self.keys[key] = (content, request.id)
        self.requests[request.id] = {
            "state": "accepted", "accepted": True, "ended": None, "batch": None, "readable": True, "rows": rows,
        }  # fmt: skip

    @rule(owner=OWNERS)
    def take(self, owner: str) -> None:
        if self.held_by_other(owner):
            assert self.lease is not None
            with pytest.raises(LeaseHeld, match=self.lease[0]):
                self.ledger.take(owner, LEASE_SECONDS)
            return
        batch = self.ledger.take(owner, LEASE_SECONDS)
        left = [name for name, one in self.requests.items() if one["state"] in IN_WORK]
        if left:
            expected = {name for name in left if self.requests[name]["batch"] == self.requests[batch[0].id]["batch"]}
        else:
            expected = {name for name, one in self.requests.items() if one["state"] == "accepted"}
            self.batches += 1
            for name in expected:
                self.requests[name]["batch"] = self.batches
                self.moved(self.requests[name], "scheduled")
        assert {one.id for one in batch} == expected
        assert len({one.batch for one in batch}) == bool(batch)
        self.lease = (owner, self.clock.now + timedelta(seconds=LEASE_SECONDS)) if batch else None

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), owner=st.one_of(st.none(), OWNERS))
    def move(self, data: st.DataObject, owner: str | None) -> None:
        _, name = self.keys[data.draw(st.sampled_from(sorted(self.keys)))]  # ids differ between replays
        one = self.requests[name]
        likely = NEXT[one["state"]] or STATES
        state = data.draw(st.one_of(st.sampled_from(likely), st.sampled_from(STATES)))
        mine = owner is not None and self.lease is not None and self.lease[0] == owner
        refused = not mine if owner is not None else one["state"] in IN_WORK and self.held_by_other(None)
        if refused or state not in NEXT[one["state"]]:
            with pytest.raises(LeaseHeld if refused else UserError):
                self.ledger.move(name, state, {"why": "test"}, owner=owner)
            return
        self.ledger.move(name, state, {"why": "test"}, owner=owner)
        self.moved(one, state)

    @rule(owner=OWNERS)
    def renew(self, owner: str) -> None:
        if self.lease is None or self.lease[0] != owner:
            with pytest.raises(LeaseHeld):
                self.ledger.renew(owner, LEASE_SECONDS)
            return
        self.lease = (owner, self.clock.now + timedelta(seconds=LEASE_SECONDS))
        assert self.ledger.renew(owner, LEASE_SECONDS) == self.lease[1]

    @rule(owner=OWNERS)
    def hold(self, owner: str) -> None:
        if self.held_by_other(owner):
            with pytest.raises(LeaseHeld):
                self.ledger.hold(owner, LEASE_SECONDS)
            return
        self.ledger.hold(owner, LEASE_SECONDS)
        self.lease = (owner, self.clock.now + timedelta(seconds=LEASE_SECONDS))
        self.ledger.check_lease(owner)

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        self.ledger.release(owner)
        if self.lease is not None and self.lease[0] == owner:
            self.lease = None

    @rule(seconds=st.sampled_from([1, 60, 101]))
    def wait(self, seconds: int) -> None:
        self.clock.now += timedelta(seconds=seconds)

    @rule()
    def expire(self) -> None:
        expected = {
            name
            for name, one in self.requests.items()
            if one["state"] == "promoted" and one["readable"] and one["ended"] <= self.clock.now - KEEP
        }
        assert set(self.ledger.destroy_expired(KEEP)) == expected
        for name in expected:
            self.requests[name]["readable"] = False

    # ------------------------------------------------------------------------------------------------- what holds

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "requests"):
            return
        found = {one.id: one for one in self.ledger.all()}
        assert {name: one.state for name, one in found.items()} == {n: one["state"] for n, one in self.requests.items()}
        for name, one in self.requests.items():
            assert (found[name].ended, found[name].batch is None) == (one["ended"], one["batch"] is None)
        holder = self.ledger.holder()
        assert holder == (self.lease if self.lease is not None and self.lease[1] > self.clock.now else None)
        assert self.ledger.audit() == []

    def teardown(self) -> None:
        hashes = {self.ledger.hashes.row(r["question"], r["answer"]) for o in self.requests.values() for r in o["rows"]}
        assert self.ledger.rows_requested() == hashes
        for name, one in self.requests.items():
            assert self.ledger.readable(name) == one["readable"]
            if one["readable"]:
                assert self.ledger.rows(name) == one["rows"]
            history = [event.event for event in self.ledger.events(name)]
            assert history[:2] == ["received", "accepted"]
            states = [event for event in history if event in STATES]
            assert states[-1] == one["state"]
            assert all(new in NEXT[old] for old, new in pairwise(states))
        chain = self.ledger.events()
        assert [event.seq for event in chain] == list(range(1, len(chain) + 1))
        for before, after in pairwise(chain):
            assert after.prev == before.hash
        assert all(len(event.hash) == hashlib.sha256().digest_size * 2 for event in chain)


def agrees_with_a_model(uri: str, examples: int, steps: int) -> None:
    """Run the machine over one database."""
    clock = Clock()
    with Ledger(uri, Vault(MASTER), clock) as ledger:
        machine = type("Machine", (LedgerMachine,), {"ledger": ledger, "clock": clock})
        chosen = settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        run_state_machine_as_test(machine, settings=chosen)
