"""The ledger on a real PostgreSQL: the same model, and writers that get in each other's way."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from ledger_machine import MASTER, START, Clock, agrees_with_a_model, emptied, row
from postgres_server import postgres

from ofmu_ray.requests.lease import LeaseHeld
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.records import UnknownRequest
from ofmu_ray.requests.vault import Vault

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    with postgres() as found:
        yield found


def test_writers_at_once_leave_one_chain_and_one_batch(uri: str) -> None:
    """Six of them open the new database at once, add the same keys, and want to process."""

    def write(number: int) -> list[str]:
        with Ledger(uri, Vault(MASTER), Clock()) as ledger:
            for key in range(8):
                ledger.add(f"key-{key}", {"n": key}, [row(key)], deadline=timedelta(days=30))
            try:
                return [one.id for one in ledger.take(f"writer-{number}", 60)]
            except LeaseHeld:
                return []

    with ThreadPoolExecutor(6) as pool:
        batches = [batch for batch in pool.map(write, range(6)) if batch]
    with Ledger(uri, Vault(MASTER), Clock()) as ledger:
        requests = ledger.all()
        assert len(requests) == 8
        assert len(batches) == 1  # a lease at START does not expire
        assert ledger.holder() is not None
        assert sum(one.state == "scheduled" for one in requests) == len(batches[0])
        assert ledger.audit() == []
        assert ledger.events()[0].at.startswith(f"{START:%Y-%m-%d}")
        emptied(ledger)


def test_an_id_that_postgresql_cannot_hold_is_unknown(uri: str) -> None:
    with Ledger(uri, Vault(MASTER)) as ledger:
        for call in (ledger.get, ledger.certificate, ledger.rows):
            with pytest.raises(UnknownRequest):
                call("req-\x00")


@pytest.mark.slow
def test_the_ledger_agrees_with_a_model(uri: str) -> None:
    agrees_with_a_model(uri, examples=4, steps=20)


@pytest.mark.full
def test_the_ledger_agrees_with_a_model_in_many_histories(uri: str) -> None:
    agrees_with_a_model(uri, examples=100, steps=40)
