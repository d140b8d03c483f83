"""Another master key: every data key is wrapped again, and the old master key opens nothing any more.

The new key is stored first, then one transaction wraps all keys, then the new file takes the old one's place. Killed
anywhere in between, the same call finishes it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select, update

from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.errors import UserError
from ofmu_ray.requests.chain import append
from ofmu_ray.requests.database import forget_pages, writing
from ofmu_ray.requests.intake import NEXT_KEY, open_ledger
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.renewal import leased
from ofmu_ray.requests.schema import PayloadRecord, SecretRecord
from ofmu_ray.requests.vault import Vault, master_key, write_master_key


@dataclass(frozen=True)
class KeyChange:
    """A change of the master key."""

    keys: int
    """Data keys that were wrapped again; 0: the ledger was under the new key already."""
    place: str
    """File or environment variable of the key that the ledger is under now."""
    configured: bool
    """Whether the configuration names this place."""


def rekey(config: RequestsConfig, by: str, *, to_file: str | None = None, to_env: str | None = None) -> KeyChange:
    """Wrap all keys by another master key: one that is given, or a new one that replaces `requests.key_file`.

    Raises:
        LeaseHeld: a processor or a rollback is at work.
        UserError: no new key for one from an environment variable, the same key, or neither key opens the ledger.
    """
    options, given = config.requests, to_file is not None or to_env is not None
    file = config.key_file if options.key_env is None else None
    if not given and file is None:
        raise UserError(
            f"requests.key_env = {options.key_env}: the new key cannot be written there; store it elsewhere and name "
            "it: --new-key-env or --new-key-file"
        )
    if not given:
        assert file is not None
        to_file = file + NEXT_KEY
        if not Path(to_file).exists():
            master_key(file, None)  # refuse before a file is written
            write_master_key(to_file)
    new, old = master_key(to_file, to_env), master_key(config.key_file, options.key_env)
    if new == old:
        raise UserError("the new master key is the one in use: name another one")
    with open_ledger(config, keyed=False) as ledger, leased(ledger, options.lease_seconds):
        keys = wrapped_again(ledger, Vault(old), new, by)
    if not given:
        assert file is not None
        assert to_file is not None
        _replace(to_file, file)
    return KeyChange(keys, str(to_env or (file if not given else to_file)), not given)


def wrapped_again(ledger: Ledger, old: Vault, master: bytes, by: str) -> int:
    """Wrap all keys of a ledger by another master key, in one transaction; how many. 0: they are already.

    Raises:
        WrongKey: the keys are under neither.
    """
    with writing(ledger.engine) as session:
        secrets = list(session.scalars(select(SecretRecord)))
        if secrets and all(map(Vault(master).opens, (one.name for one in secrets), (one.wrapped for one in secrets))):
            return 0
        for secret in secrets:
            secret.wrapped = old.rewrapped(secret.name, secret.wrapped, master)
        query = select(PayloadRecord.request_id, PayloadRecord.wrapped_key).where(
            PayloadRecord.wrapped_key.is_not(None)
        )
        payloads = [
            {"request_id": name, "wrapped_key": old.rewrapped(name, wrapped, master)}
            for name, wrapped in session.execute(query)
            if wrapped is not None
        ]
        if payloads:
            session.execute(update(PayloadRecord), payloads)
        count = len(secrets) + len(payloads)
        append(session, ledger.clock(), None, "master_key_replaced", by=by, detail={"keys": count})
    forget_pages(ledger.engine)
    return count


def _replace(new: str, old: str) -> None:
    """Give a file the place of another; durable."""
    os.replace(new, old)
    folder = os.open(Path(old).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
