"""What a certificate and a report say, and their files in <storage>/requests/certificates and reports."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.reporting.certificate_page import certificate_page
from ofmu_ray.reporting.manifest import PACKAGES, code_version, package_versions
from ofmu_ray.requests.certificate import FORMAT, NOT_PROVED, signed
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.records import Request
from ofmu_ray.requests.registry import Version
from ofmu_ray.requests.signing import Keys
from ofmu_ray.storage import atomic_write, join, read_text

if TYPE_CHECKING:
    from ofmu_ray.requests.ladder import Attempt


def keys_of(config: RequestsConfig) -> Keys:
    """The signing keys."""
    return Keys(config.signing_keys)


def certify(
    config: RequestsConfig,
    ledger: Ledger,
    requests: Sequence[Request],
    base: Version,
    result: Version,
    passed: Attempt,
    attempts: Sequence[Attempt],
    storage: str,
) -> tuple[str, str]:
    """(key id, signed document) of a promotion."""
    signer = keys_of(config).signer()
    content = _content(requests, base, passed, attempts, storage)
    entries, head = ledger.head()
    content |= {
        "format": FORMAT,
        "requests": [one | {"rows": ledger.row_hashes(one["id"])} for one in content["requests"]],
        "result": {"version": result.number, "weights": passed.weights},
        "ledger": {"entries": entries, "head": head},
        "not_proved": list(NOT_PROVED),
    }
    return signer.key_id, signed(content, signer).decode()


def certificate_path(storage: str, batch: str) -> str:
    """Where the certificate of a batch is."""
    return join(storage, "requests", "certificates", f"{batch}.json")


def publish(storage: str, batch: str, document: str) -> str:
    """Write certificate and page; the path of the certificate."""
    envelope, path = json.loads(document), certificate_path(storage, batch)
    page = certificate_page(envelope["certificate"], envelope["key_id"], f"{batch}.json")
    atomic_write(join(storage, "requests", "certificates", f"{batch}.html"), page)
    atomic_write(path, document)
    return path


def report(
    storage: str,
    batch: str,
    requests: Sequence[Request],
    base: Version,
    attempts: Sequence[Attempt],
) -> str:
    """Write the report of a batch that was not promoted; the path of its page."""
    last = attempts[-1] if attempts else None
    content = _content(requests, base, last, attempts, storage) if last else {"attempts": []}
    atomic_write(join(storage, "requests", "reports", f"{batch}.json"), json.dumps(content, indent=1) + "\n")
    path = join(storage, "requests", "reports", f"{batch}.html")
    atomic_write(path, certificate_page(content, None, f"{batch}.json"))
    return path


def _content(
    requests: Sequence[Request], base: Version, attempt: Attempt, attempts: Sequence[Attempt], storage: str
) -> dict[str, Any]:
    """What certificate and report have in common: plain values without text of rows."""
    manifest = json.loads(read_text(join(storage, attempt.run, "manifest.json")))
    config = manifest["config"]
    streams: Mapping[str, Any] = manifest["data"]["streams"]
    return {
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "requests": [
            {
                "id": one.id,
                "received": one.created.isoformat(timespec="seconds"),
                "deadline": one.deadline.isoformat(timespec="seconds"),
                "training_data": one.data,
            }
            for one in requests
        ],
        "base": {"version": base.number, "weights": base.weights},
        "data": {
            # no digest of what was forgotten: a keyed hash of each row stands in its place
            name: {"rows": stream["used_rows"]} | ({} if name == "forget" else {"sha256": stream["sha256"]})
            for name, stream in sorted(streams.items())
        },
        "method": {
            "name": config["method"],
            "recipe": attempt.recipe,
            "seed": config["seed"],
            "config_hash": manifest["config_hash"],
            "options": {config["method"]: config[config["method"]], "training": config["training"]},
        },
        "run": attempt.run,
        "attempts": [
            {"recipe": one.recipe, "run": one.run, "verdict": one.verdict, "open": one.open_gates, "cost": one.cost}
            for one in attempts
        ],
        "gates": attempt.gates,
        "cost": attempt.cost,
        "code": manifest["code"],
        "verified_with": code_version(),
        "python": platform.python_version(),
        "packages": package_versions((*PACKAGES, "cryptography")),
    }
