"""The ledger of requests: agrees with a model, notices tampering, gives one processor the work, destroys keys."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from ledger_machine import MASTER, START, Clock, agrees_with_a_model, row
from sqlalchemy import create_engine, text

from ofmu_ray.errors import StorageError, UserError
from ofmu_ray.requests import database, renewal
from ofmu_ray.requests.lease import LeaseHeld
from ofmu_ray.requests.ledger import KeyTaken, Ledger
from ofmu_ray.requests.records import UnknownRequest
from ofmu_ray.requests.schema import REVISION, Base
from ofmu_ray.requests.states import NEXT, STATES
from ofmu_ray.requests.vault import Vault, WrongKey, master_key, write_master_key

MONTH = timedelta(days=30)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    with Ledger(f"sqlite:///{tmp_path}/ledger.db", Vault(MASTER), clock) as opened:
        yield opened


def added(ledger: Ledger, key: str = "k", *numbers: int) -> str:
    return ledger.add(key, {"key": key}, [row(n) for n in numbers or (1, 2)], deadline=MONTH, by="test").id


def promoted(ledger: Ledger, owner: str = "ann") -> list[str]:
    names = [one.id for one in ledger.take(owner, 60)]
    for state in ("running", "verifying", "promoted"):
        ledger.move(names, state, owner=owner)
    ledger.release(owner)
    return names


@pytest.mark.slow
def test_the_ledger_agrees_with_a_model(tmp_path: Path) -> None:
    agrees_with_a_model(f"sqlite:///{tmp_path}/ledger.db", examples=12, steps=20)


@pytest.mark.full
def test_the_ledger_agrees_with_a_model_in_many_histories(tmp_path: Path) -> None:
    agrees_with_a_model(f"sqlite:///{tmp_path}/ledger.db", examples=150, steps=40)


def test_every_state_can_be_reached_and_left_unless_final() -> None:
    reached = {state for following in NEXT.values() for state in following}
    assert reached == set(STATES) - {"received"}
    assert {state for state in STATES if not NEXT[state]} == {"rejected", "superseded"}


TAMPERING = {
    "UPDATE ofmu_events SET body = replace(body, 'ops', 'eve') WHERE seq = 1": "content was changed",
    "UPDATE ofmu_events SET body = '[]' WHERE seq = 2": "content was changed",
    'UPDATE ofmu_events SET body = \'{"request": [1], "event": "accepted"}\' WHERE seq = 2': "content was changed",
    "DELETE FROM ofmu_events WHERE seq = 2": "missing or in another order",
    "DELETE FROM ofmu_events WHERE seq = (SELECT max(seq) FROM ofmu_events)": "its last entry says verifying",
    "UPDATE ofmu_requests SET state = 'rejected'": "its last entry says promoted",
    "UPDATE ofmu_requests SET deadline = '2030-01-01 00:00:00'": "its deadline was changed",
    "UPDATE ofmu_requests SET accepted = NULL": "the time in accepted is not that of its entry",
    "UPDATE ofmu_requests SET ended = '2031-01-01 00:00:00'": "the time in ended is not that of its entry",
    "UPDATE ofmu_requests SET row_count = 1": "its row_count was changed",
    "UPDATE ofmu_rows SET hash = 'x' WHERE number = 0": "hashes of its rows were changed",
    "DELETE FROM ofmu_rows WHERE number = 1": "hashes of its rows were changed",
    "UPDATE ofmu_payloads SET wrapped_key = NULL": "is gone, but no entry says why",
    "DELETE FROM ofmu_payloads": "is gone, but no entry says why",
    "DELETE FROM ofmu_requests": "was received, and is gone",
}


@pytest.mark.parametrize("statement", TAMPERING, ids=range(len(TAMPERING)))
def test_audit_notices_tampering(ledger: Ledger, tmp_path: Path, statement: str) -> None:
    ledger.add("k", {}, [row(1), row(2)], deadline=MONTH, by="ops")
    promoted(ledger)
    assert ledger.audit() == []
    raw = sqlite3.connect(tmp_path / "ledger.db")
    raw.execute(statement)
    raw.commit()
    assert any(TAMPERING[statement] in problem for problem in ledger.audit()), ledger.audit()


def test_a_rewritten_chain_is_noticed_by_a_hash_noted_elsewhere(ledger: Ledger, tmp_path: Path) -> None:
    added(ledger)
    noted = ledger.head()[1]
    assert ledger.audit([noted]) == []
    raw = sqlite3.connect(tmp_path / "ledger.db")
    for table in ("events", "rows", "payloads", "requests"):
        raw.execute(f"DELETE FROM ofmu_{table}")
    raw.commit()
    assert ledger.audit() == []
    assert ledger.audit([noted]) == [f"the entry with hash {noted} is gone"]


def test_a_key_belongs_to_one_content(ledger: Ledger) -> None:
    first = ledger.add("k", {"a": 1, "b": 2}, [row(1)], deadline=MONTH)
    assert ledger.add("k", {"b": 2, "a": 1}, [row(1)], deadline=MONTH) == first
    assert ledger.find("k", {"a": 1, "b": 2}) == first
    assert ledger.find("other", {}) is None
    for call in (ledger.find, lambda k, c: ledger.add(k, c, [row(1)], deadline=MONTH)):
        with pytest.raises(KeyTaken, match=first.id):
            call("k", {"a": 1})
    assert ledger.head()[0] == 2


def test_a_second_processor_is_told_who_works_and_until_when(ledger: Ledger, clock: Clock) -> None:
    name = added(ledger)
    (request,) = ledger.take("ann@one", 60)
    assert (request.id, request.state) == (name, "scheduled")
    with pytest.raises(LeaseHeld, match=r"ann@one .* 2026-01-01 00:01:00 UTC"):
        ledger.take("bob@two", 60)
    clock.now = START + timedelta(seconds=50)
    ledger.renew("ann@one", 60)
    clock.now = START + timedelta(seconds=100)
    with pytest.raises(LeaseHeld):
        ledger.take("bob@two", 60)
    clock.now = START + timedelta(seconds=111)
    assert [one.batch for one in ledger.take("bob@two", 60)] == [request.batch]
    with pytest.raises(LeaseHeld, match="bob@two"):  # ann was asleep, wakes up and wants to go on
        ledger.move(name, "running", owner="ann@one")
    with pytest.raises(LeaseHeld, match="bob@two"):
        ledger.renew("ann@one", 60)
    with pytest.raises(LeaseHeld, match="bob@two"):  # an operator does not take work away either
        ledger.move(name, "rejected")
    ledger.move(name, "running", owner="bob@two")


def test_a_lease_is_renewed_after_the_database_was_silent(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed, answers = threading.Event(), [False, True]

    def renew(*_: object) -> None:
        if not answers.pop(0):
            raise StorageError("requests.ledger: the database does not answer")
        answers.append(True)
        renewed.set()

    monkeypatch.setattr(ledger, "renew", renew)
    with renewal.renewed(ledger, "ann", 0.03):
        assert renewed.wait(timeout=60)


def test_a_clock_that_is_set_takes_no_lease_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(f"sqlite:///{tmp_path}/ledger.db", Vault(MASTER)) as ledger:
        owner, started = renewal.owner_name(), psutil.boot_time()
        ledger.hold(owner, 600)
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: started + 2)
        assert renewal.drop_dead(ledger) is None
        ledger.release(owner)
        ledger.hold(owner.replace(f"/{os.getpid()}/", f"/{2**22 + 1}/"), 600)
        assert renewal.drop_dead(ledger) is not None


def test_a_batch_that_was_cut_off_is_finished_before_newer_requests(ledger: Ledger, clock: Clock) -> None:
    first = added(ledger, "first")
    ledger.take("ann", 60)
    second = added(ledger, "second")
    clock.now += timedelta(seconds=61)
    assert [one.id for one in ledger.take("bob", 60)] == [first]
    ledger.move(first, "running", owner="bob")
    ledger.move(first, "failed", owner="bob")
    assert [one.id for one in ledger.take("bob", 60)] == [second]


def test_several_requests_move_together_or_not_at_all(ledger: Ledger) -> None:
    names = [added(ledger, key) for key in "ab"]
    with pytest.raises(UnknownRequest):
        ledger.move([*names, "req-none"], "rejected")
    assert {one.state for one in ledger.all()} == {"accepted"}
    assert ledger.audit() == []


def test_rollback_reopens_with_the_old_deadline(ledger: Ledger, clock: Clock) -> None:
    name = added(ledger)
    deadline = ledger.get(name).deadline
    clock.now += timedelta(days=1)
    promoted(ledger)
    (request,) = ledger.move(name, "accepted", {"rollback": "version 3"})
    assert (request.deadline, request.ended, request.batch) == (deadline, None, None)
    assert [one.id for one in ledger.take("ann", 60)] == [name]


def test_a_request_whose_key_is_destroyed_is_not_retried(ledger: Ledger, clock: Clock) -> None:
    """It would stop every batch that it is in."""
    name, other = added(ledger), added(ledger, "other", 3)
    promoted(ledger)
    clock.now += MONTH
    assert set(ledger.destroy_expired(MONTH)) == {name, other}
    ledger.move(name, "needs_review")  # as a rollback does
    before = ledger.head()
    with pytest.raises(UserError, match=f"request {name}: the key of its rows is destroyed.*cancel it"):
        ledger.retry([name], by="ops")
    assert ledger.head() == before


def test_certificates_come_with_the_promotion(ledger: Ledger) -> None:
    name = added(ledger)
    ledger.take("ann", 60)
    ledger.move(name, "running", owner="ann")
    ledger.move(name, "verifying", owner="ann")
    assert ledger.certificate(name) is None
    ledger.move(name, "promoted", owner="ann", certificate='{"signed": 1}')
    assert ledger.certificate(name) == '{"signed": 1}'


def test_rows_stay_requested_for_ever(ledger: Ledger, clock: Clock) -> None:
    added(ledger, "a", 1)
    clock.now += timedelta(days=1)
    name = added(ledger, "b", 2)
    ledger.move(name, "rejected")
    assert len(ledger.rows_requested()) == 2
    assert ledger.rows_requested(before=clock.now) == {ledger.hashes.row("question  1?", "ANSWER 1.")}


# ------------------------------------------------------------------------------------------------------------- keys


def test_texts_are_destroyed_and_the_request_remains(ledger: Ledger, clock: Clock, tmp_path: Path) -> None:
    withdrawn, kept = added(ledger, "a", 1), added(ledger, "b", 2)
    ledger.move(withdrawn, "superseded")
    with pytest.raises(UserError, match="destroyed on 2026-01-01"):
        ledger.rows(withdrawn)
    promoted(ledger)
    assert ledger.destroy_expired(MONTH) == []
    assert ledger.rows(kept) == [row(2)]
    sealed = sqlite3.connect(tmp_path / "ledger.db").execute("SELECT wrapped_key, ciphertext FROM ofmu_payloads")
    remains = [part for line in sealed for part in line if part]
    clock.now += MONTH
    assert ledger.destroy_expired(MONTH) == [kept]
    with pytest.raises(UserError, match="hashes are left"):
        ledger.rows(kept)
    assert ledger.get(kept).state == "promoted"
    assert ledger.audit() == []
    left = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert len(remains) == 2
    assert not any(part in left for part in remains), "SQLite still has what was deleted"


def test_another_master_key_opens_nothing(ledger: Ledger, tmp_path: Path) -> None:
    added(ledger)
    with pytest.raises(WrongKey, match=r"requests\.key_file"):
        Ledger(f"sqlite:///{tmp_path}/ledger.db", Vault(os.urandom(32)))
    with Ledger(f"sqlite:///{tmp_path}/ledger.db") as reader:
        assert len(reader.all()) == 1
        assert reader.audit() == []


def test_ciphertext_belongs_to_its_request(ledger: Ledger, tmp_path: Path) -> None:
    first, second = added(ledger, "a", 1), added(ledger, "b", 2)
    raw = sqlite3.connect(tmp_path / "ledger.db")
    for column in ("wrapped_key", "ciphertext"):
        raw.execute(
            f"UPDATE ofmu_payloads SET {column} = (SELECT {column} FROM ofmu_payloads WHERE request_id = ?) "
            "WHERE request_id = ?",
            (first, second),
        )
    raw.commit()
    with pytest.raises(WrongKey, match=second):
        ledger.rows(second)


def test_master_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "key"
    assert write_master_key(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    key = master_key(str(path), None)
    assert not write_master_key(str(path))
    assert master_key(str(path), None) == key
    monkeypatch.setenv("KEY", base64.urlsafe_b64encode(key).decode())
    assert master_key(None, "KEY") == key
    path.write_text("short")
    with pytest.raises(UserError, match="32 random bytes"):
        master_key(str(path), None)
    for file, variable, reason in (
        (None, None, "not set"),
        (str(tmp_path / "no"), None, "no such file"),
        (None, "NO_KEY", "not set"),
    ):
        with pytest.raises(UserError, match=reason):
            master_key(file, variable)
    vault = Vault(key)
    new = os.urandom(32)
    wrapped, ciphertext = vault.sealed("req", {"rows": [1]})
    moved = vault.rewrapped("req", wrapped, new)
    assert Vault(new).opened("req", moved, ciphertext) == {"rows": [1]}
    assert b"rows" not in ciphertext
    assert str(key) not in repr(vault)


# --------------------------------------------------------------------------------------------------------- database


def test_migrations_make_the_tables_of_the_code(tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    engine = database.opened(f"sqlite:///{tmp_path}/new/ledger.db")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": "ofmu_ledger_version"})
        assert compare_metadata(context, Base.metadata) == []
    assert ScriptDirectory(str(Path(database.__file__).parent / "migrations")).get_heads() == [REVISION]
    assert (tmp_path / "new/ledger.db").stat().st_mode & 0o777 == 0o600


def test_a_ledger_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/ledger.db"
    Ledger(uri).close()
    engine = create_engine(uri)
    with engine.begin() as connection:
        connection.execute(text("UPDATE ofmu_ledger_version SET version_num = '9999'"))
    with pytest.raises(UserError, match="9999"):
        Ledger(uri)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("ledger.db", "must be sqlite"),
        ("mysql://u:secret@h/d", "must be sqlite"),
        ("sqlite:////proc/none/ledger.db", "cannot be written"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/d", "cannot be opened"),
    ],
)
def test_a_ledger_that_cannot_be_opened(uri: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"requests\.ledger.*{reason}") as refused:
        Ledger(uri)
    assert "secret" not in str(refused.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text(json.dumps({"not": "a database"}) * 100)
    with pytest.raises(UserError, match="not a database"):
        Ledger(f"sqlite:///{tmp_path}/ledger.db")
