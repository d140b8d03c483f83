"""The certificate of a promotion: what was requested, done and measured, signed; verified offline.

The file is the canonical JSON (sorted keys, no spaces, UTF-8, one line) of `{"certificate", "key_id", "algorithm",
"signature"}`; the signature covers the same text without `signature`. `verify` reads a file only if it is exactly this
text, so no byte of it can change.

Nothing here imports Ray, torch or the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ofmu_ray.errors import UserError
from ofmu_ray.requests.signing import Signer, is_signed_by, read_public_keys

FORMAT = "ofmu-ray certificate 1"
ALGORITHM = "Ed25519"
NOT_PROVED = (
    "That no copy of the data is left elsewhere: in other models, checkpoints, logs or backups.",
    "That the weights equal those of a model trained without the rows. The gates compare what the models do.",
    "That no attack finds a trace of the rows. Only the attacks among the gates were run, with their settings.",
    "Anything about other wordings of the same facts, or about rows that were not requested.",
    "That whoever holds the signing key told the truth about data and measurements: a signature says who vouches.",
)


class CertificateError(UserError):
    """The certificate is not what was signed, or does not fit."""

    status = 1


@dataclass(frozen=True)
class VerifiedCertificate:
    """A certificate with a valid signature."""

    content: Mapping[str, Any]
    key_id: str
    model: bool
    """Whether the model was compared, too."""


def canonical(content: Any) -> bytes:
    """The JSON text that is signed. Raises ValueError for NaN and infinity."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def signed(content: Mapping[str, Any], signer: Signer) -> bytes:
    """The certificate's file."""
    envelope = {"certificate": content, "key_id": signer.key_id, "algorithm": ALGORITHM}
    return canonical({**envelope, "signature": signer.sign(canonical(envelope))}) + b"\n"


def verify(path: str | Path, public_key: str | Path, model: str | Path | None = None) -> VerifiedCertificate:
    """Check a certificate's file with public keys, and that a model folder has the result's weights.

    Args:
        public_key: a PEM file with one or several keys, or a folder of `*.pub`; the certificate's must be among them.
        model: folder of the model in question; None: not compared.

    Raises:
        CertificateError: changed, signed by another key, a gate that did not pass, or another model's weights.
        UserError: a file that cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    keys = read_public_keys(public_key)
    try:
        envelope = json.loads(data)
        signature = bytes.fromhex(envelope["signature"])
        content, key, algorithm = envelope["certificate"], envelope["key_id"], envelope["algorithm"]
        unchanged = canonical({**envelope, "signature": signature.hex()}) + b"\n" == data
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CertificateError(f"{path}: not a certificate, or damaged") from None
    if not unchanged or algorithm != ALGORITHM or not isinstance(content, dict) or not isinstance(key, str):
        raise CertificateError(f"{path}: not as it was written: changed, or saved again by another program")
    public = keys.get(key)
    if public is None:
        raise CertificateError(f"{path}: signed by the key {key}, but --public-key has {', '.join(keys)}")
    if not is_signed_by(public, signature, canonical({"certificate": content, "key_id": key, "algorithm": algorithm})):
        raise CertificateError(f"{path}: the signature does not fit: the content was changed, or another key signed it")
    if content.get("format") != FORMAT:
        raise CertificateError(
            f"{path}: written in another format ({content.get('format')!r}); verify it with that version"
        )
    _check_gates(path, content["gates"])
    if model is not None:
        _check_model(path, content, model)
    return VerifiedCertificate(content, key, model is not None)


def _check_gates(path: str | Path, gates: Iterable[Mapping[str, Any]]) -> None:
    open_gates = [str(gate["name"]) for gate in gates if gate["result"] != "skipped" and not _keeps(gate)]
    if open_gates:
        raise CertificateError(f"{path}: gates that did not pass: {', '.join(open_gates)}")


def _keeps(gate: Mapping[str, Any]) -> bool:
    """Whether a gate passed, and its interval says so."""
    below = gate.get("at_most") is None or (gate["high"] is not None and gate["high"] <= gate["at_most"])
    above = gate.get("at_least") is None or (gate["low"] is not None and gate["low"] >= gate["at_least"])
    return bool(gate["result"] == "passed" and below and above)


def _check_model(path: str | Path, content: Mapping[str, Any], model: str | Path) -> None:
    from ofmu_ray.models.source import model_fingerprint

    folder = Path(model)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"--model {model}: not a folder with weights (*.safetensors)")
    found = model_fingerprint(folder, reread=True)
    if found != content["result"]["weights"]:
        raise CertificateError(f"{path}: --model {model} has the weights {found[:12]}…, "
                          f"the certificate's {content['result']['weights'][:12]}…")  # fmt: skip
