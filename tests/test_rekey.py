"""Another master key: the old one opens nothing afterwards, and a change that was cut off is finished."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ledger_machine import row

from ofmu_ray.config.requests import RequestOptions, RequestsConfig
from ofmu_ray.errors import UserError
from ofmu_ray.requests import rekey as module
from ofmu_ray.requests.intake import NEXT_KEY, open_ledger
from ofmu_ray.requests.lease import LeaseHeld
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.rekey import rekey
from ofmu_ray.requests.vault import Vault, WrongKey, master_key, write_master_key

MONTH = timedelta(days=30)


@pytest.fixture
def config(tmp_path: Path) -> RequestsConfig:
    """A ledger with three requests, one of them withdrawn."""
    config = RequestsConfig(storage=str(tmp_path))
    assert config.key_file is not None
    write_master_key(config.key_file)
    with open_ledger(config) as ledger:
        names = [ledger.add(key, {"key": key}, [row(n)], deadline=MONTH).id for n, key in enumerate("abc")]
        ledger.move(names[2], "rejected")
    return config


def readable(config: RequestsConfig) -> list[Any]:
    """The rows of all requests that have any, and the hash of one."""
    with open_ledger(config) as ledger:
        assert ledger.audit() == []
        return [ledger.rows(one.id) for one in ledger.all(("accepted",))] + [ledger.hashes.row("q", "a")]


def wrapped(config: RequestsConfig) -> list[bytes]:
    """All wrapped keys."""
    database = sqlite3.connect(f"{config.requests_folder}/ledger.db")
    query = (
        "SELECT wrapped FROM ofmu_secrets UNION ALL SELECT wrapped_key FROM ofmu_payloads WHERE wrapped_key NOT NULL"
    )
    return [key for (key,) in database.execute(query)]


def test_the_old_key_opens_nothing_and_nothing_else_changes(config: RequestsConfig) -> None:
    assert config.key_file is not None
    old, before, keys = master_key(config.key_file, None), readable(config), wrapped(config)
    done = rekey(config, "ops")
    assert (done.keys, done.place, done.configured) == (3, config.key_file, True)
    assert master_key(config.key_file, None) != old
    assert readable(config) == before
    with pytest.raises(WrongKey):
        Ledger(config.ledger_uri, Vault(old))
    left = b"".join(path.read_bytes() for path in Path(config.requests_folder).iterdir())
    assert not any(key in left for key in keys), "SQLite still has keys under the old master key"
    assert base64.b64encode(old) not in left
    assert not Path(config.key_file + NEXT_KEY).exists()
    assert Path(config.key_file).stat().st_mode & 0o777 == 0o600
    with open_ledger(config) as ledger:
        assert (ledger.events()[-1].event, ledger.events()[-1].detail) == ("master_key_replaced", {"keys": 3})
        ledger.add("d", {}, [row(4)], deadline=MONTH)


def broken(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


POINTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the new key written": lambda patch: patch.setattr(module, "wrapped_again", broken),
    "one key wrapped": lambda patch: patch.setattr(module, "update", broken),
    "before the commit": lambda patch: patch.setattr(module, "append", broken),
    "after the commit": lambda patch: patch.setattr(module, "forget_pages", broken),
    "before the new file takes the old one's place": lambda patch: patch.setattr(os, "replace", broken),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_change_that_was_cut_off_is_finished(config: RequestsConfig, point: str) -> None:
    assert config.key_file is not None
    old, before = master_key(config.key_file, None), readable(config)
    with pytest.MonkeyPatch.context() as patch:
        POINTS[point](patch)
        with pytest.raises(KeyboardInterrupt):
            rekey(config, "ops")
    new = master_key(config.key_file + NEXT_KEY, None)
    committed = point in list(POINTS)[3:]
    if committed:
        with pytest.raises(WrongKey, match="ofmu requests rekey"):
            open_ledger(config)
    else:
        assert readable(config) == before
    assert rekey(config, "ops").keys == (0 if committed else 3)
    assert master_key(config.key_file, None) == new != old
    assert readable(config) == before
    with open_ledger(config) as ledger:
        assert [event.event for event in ledger.events()].count("master_key_replaced") == 1


def test_a_key_from_a_secret_store(config: RequestsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = readable(config)
    new = base64.b64encode(os.urandom(32)).decode()
    monkeypatch.setenv("NEW_KEY", new)
    done = rekey(config, "ops", to_env="NEW_KEY")
    assert (done.keys, done.configured) == (3, False)
    assert rekey(config, "ops", to_env="NEW_KEY").keys == 0
    stored = RequestsConfig(storage=config.storage, requests=RequestOptions(key_env="NEW_KEY"))
    assert readable(stored) == before
    with pytest.raises(UserError, match="--new-key-env"):
        rekey(stored, "ops")
    with pytest.raises(UserError, match="the one in use"):
        rekey(stored, "ops", to_env="NEW_KEY")
    other = tmp_path / "other"
    write_master_key(str(other))
    monkeypatch.setenv("WRONG", base64.b64encode(os.urandom(32)).decode())
    wrong = RequestsConfig(storage=config.storage, requests=RequestOptions(key_env="WRONG"))
    with pytest.raises(WrongKey):
        rekey(wrong, "ops", to_file=str(other))
    assert readable(stored) == before


def test_who_has_the_old_key_in_memory_adds_nothing(config: RequestsConfig) -> None:
    with open_ledger(config) as service:
        known = service.add("a", {"key": "a"}, [row(0)], deadline=MONTH)
        rekey(config, "ops")
        assert service.add("a", {"key": "a"}, [row(0)], deadline=MONTH) == known
        with pytest.raises(WrongKey, match="start this process again"):
            service.add("d", {}, [row(4)], deadline=MONTH)
    assert len(json.dumps(readable(config))) > 0


def test_it_waits_for_a_processor(config: RequestsConfig) -> None:
    with open_ledger(config) as ledger:
        ledger.hold("elsewhere/1/2/3", 60)
        with pytest.raises(LeaseHeld, match="elsewhere/1/2/3 is processing"):
            rekey(config, "ops")
        assert readable(config)
