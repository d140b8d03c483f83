"""Encryption of what a request says: AES-256-GCM, one data key per request, wrapped by the master key.

The master key is 32 random bytes, base64, in a file or an environment variable. Destroying a request's data key makes
its texts unreadable and leaves the request (NIST SP 800-88, cryptographic erase). A copy of the ledger from before
still holds the wrapped key: replace the master key too (`rekey`) where such copies are kept.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ofmu_ray.data.row_checks import digests
from ofmu_ray.errors import UserError

NONCE_BYTES = 12
KEY_BYTES = 32
ROW_KEY = "rows"
"""Name of the key of row hashes in the ledger."""


class WrongKey(UserError):
    """The master key is not the one that something was encrypted with."""


def canonical(content: Any) -> str:
    """JSON that is the same for the same content."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def master_key(key_file: str | None, key_env: str | None) -> bytes:
    """The master key from a file or, if `key_env` is given, an environment variable.

    Raises:
        UserError: neither is given, nothing there, not 32 bytes in base64.
    """
    if key_env is not None:
        option, text = f"requests.key_env = {key_env}", os.environ.get(key_env)
        missing = "this environment variable is not set"
    elif key_file is not None:
        option, missing = f"requests.key_file = {key_file}", "no such file; `ofmu requests init` writes one"
        try:
            text = Path(key_file).read_text()
        except FileNotFoundError:
            text = None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{option}: cannot be read ({type(error).__name__})") from None
    else:
        raise UserError("requests.key_file: not set; the rows of requests are only kept encrypted")
    if not text:
        raise UserError(f"{option}: {missing}")
    try:
        key = base64.b64decode(text.strip(), altchars=b"-_" if set(text) & set("-_") else None, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError(f"{option}: must hold {KEY_BYTES} random bytes in base64 (openssl rand -base64 {KEY_BYTES})")
    return key


def write_master_key(path: str) -> bool:
    """Write a new master key that only its owner can read; False if the file exists already."""
    Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file:
        file.write(base64.b64encode(os.urandom(KEY_BYTES)) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return True


def _sealed(key: bytes, content: bytes, context: str) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, context.encode())


def _opened(key: bytes, sealed: bytes, context: str) -> bytes:
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context.encode())
    except InvalidTag:
        raise WrongKey(
            f"{context} cannot be decrypted: requests.key_file or key_env holds another key than the one it was "
            "encrypted with, or the ledger was changed"
        ) from None


class Vault:
    """Encrypts and decrypts under one master key."""

    def __init__(self, master: bytes) -> None:
        self._master = master

    def __repr__(self) -> str:
        return "Vault()"

    def new_key(self, name: str) -> bytes:
        """A new random key, wrapped for `name`."""
        return _sealed(self._master, os.urandom(KEY_BYTES), f"key {name}")

    def unwrapped(self, name: str, wrapped: bytes) -> bytes:
        return _opened(self._master, wrapped, f"key {name}")

    def opens(self, name: str, wrapped: bytes) -> bool:
        """Whether a key was wrapped by this master key."""
        try:
            self.unwrapped(name, wrapped)
        except WrongKey:
            return False
        return True

    def rewrapped(self, name: str, wrapped: bytes, master: bytes) -> bytes:
        """The same key, wrapped by another master key."""
        return _sealed(master, self.unwrapped(name, wrapped), f"key {name}")

    def sealed(self, request_id: str, content: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """(wrapped data key, ciphertext) of a request's content, both bound to its id."""
        wrapped = self.new_key(request_id)
        text = canonical(content).encode()
        return wrapped, _sealed(self.unwrapped(request_id, wrapped), text, f"request {request_id}")

    def opened(self, request_id: str, wrapped: bytes, ciphertext: bytes) -> dict[str, Any]:
        """What `sealed` encrypted."""
        key = self.unwrapped(request_id, wrapped)
        content: dict[str, Any] = json.loads(_opened(key, ciphertext, f"request {request_id}"))
        return content


class RowHashes:
    """Keyed hashes of rows and of contents: equal for equal rows of one ledger, and of no use without its key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def row(self, question: str, answer: str) -> str:
        """Hex HMAC-SHA256 of a row's normalised digest, so of the same row in other case or white space too."""
        return self._hex(b"row\x00" + digests(question, answer)[1])

    def content(self, content: Mapping[str, Any]) -> str:
        """Hex HMAC-SHA256 of what was asked."""
        return self._hex(b"content\x00" + canonical(content).encode())

    def salt(self, batch: str) -> str:
        """A secret of a batch, the same each time: with it in a file of rows, digests of the file cannot be guessed."""
        return self._hex(b"salt\x00" + batch.encode())

    def _hex(self, message: bytes) -> str:
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()
