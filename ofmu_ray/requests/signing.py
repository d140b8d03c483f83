"""Ed25519 keys that sign certificates: a folder of key pairs, rotated without losing old signatures.

A key's id is the start of the SHA-256 of its public key. `<folder>/<id>.pub` (PEM) stays for ever; `<id>.key` (PEM,
PKCS 8, mode 0600) is deleted when the key is retired. `current` names the key that signs.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ofmu_ray.errors import UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

CURRENT = "current"
PUBLIC, PRIVATE = ".pub", ".key"
CREATED = "created "
_NAME = re.compile(r"[0-9a-f]{16}")  # others' keys may be in this folder, too
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True)
class KeyInfo:
    """A key pair of the folder."""

    key_id: str
    created: str
    """UTC, ISO 8601."""
    current: bool
    """Whether it signs."""
    path: Path
    """The public key, to hand to whoever verifies."""


@dataclass(frozen=True)
class Signer:
    """The key that signs."""

    key_id: str
    private: Ed25519PrivateKey

    def sign(self, content: bytes) -> str:
        """The signature as 128 hex digits."""
        return self.private.sign(content).hex()


class Keys:
    """The key folder of a storage."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def create(self) -> KeyInfo:
        """The first key pair.

        Raises:
            UserError: there is one already; `rotate` replaces it.
        """
        with self._locked():
            if self._current() is not None:
                raise UserError(f"{self.folder} has a key; `ofmu requests keys rotate` replaces it by a new one")
            return self._new()

    def rotate(self) -> KeyInfo:
        """A new key pair signs from now on. The old private key is deleted, its public key stays and still verifies.

        Raises:
            UserError: there is no key to replace.
        """
        with self._locked():
            if self._current() is None:
                raise UserError(f"{self.folder} has no key to replace: `ofmu requests keys create` makes the first")
            new = self._new()
            for path in self.folder.glob(f"*{PRIVATE}"):  # also of a rotation that was killed
                if _NAME.fullmatch(path.stem) and path.stem != new.key_id:
                    path.unlink(missing_ok=True)
            return new

    def all(self) -> list[KeyInfo]:
        """All keys, oldest first; retired ones have only their public half."""
        found = [self._info(path.stem) for path in self.folder.glob(f"*{PUBLIC}")]
        return sorted(found, key=lambda key: (key.created, key.current, key.key_id))

    def signer(self) -> Signer:
        """The key that signs.

        Raises:
            UserError: there is none, it cannot be read, or others may read it.
        """
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        current = self._current()
        if current is None:
            raise UserError(f"{self.folder} has no key to sign with: `ofmu requests keys create` makes one")
        path = self.folder / f"{current}{PRIVATE}"
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: the signing key cannot be read ({error.strerror})") from None
        if mode & 0o077:
            raise UserError(f"{path}: others may read the signing key (mode {mode:o}): chmod 600 it, then rotate")
        try:
            private = load_pem_private_key(content, password=None)
        except (ValueError, TypeError):
            private = None
        if not isinstance(private, Ed25519PrivateKey) or key_id(private.public_key()) != current:
            raise UserError(f"{path}: not the Ed25519 key of this name; restore it, or rotate")
        return Signer(current, private)

    def _current(self) -> str | None:
        try:
            return (self.folder / CURRENT).read_text().strip() or None
        except FileNotFoundError:
            return None

    def _info(self, name: str) -> KeyInfo:
        path = self.folder / f"{name}{PUBLIC}"
        created = path.read_text().partition("\n")[0].partition(CREATED)[2]
        return KeyInfo(name, created, name == self._current(), path)

    def _new(self) -> KeyInfo:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

        from ofmu_ray.storage import atomic_write

        private = Ed25519PrivateKey.generate()
        name = key_id(private.public_key())
        content = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        handle = os.open(self.folder / f"{name}{PRIVATE}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        atomic_write(self.folder / f"{name}{PUBLIC}", f"{name} {CREATED}{created}\n{public}")  # PEM allows text before
        atomic_write(self.folder / CURRENT, name + "\n")
        return self._info(name)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock

        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: keys cannot be kept here ({error.strerror})") from None
        with FileLock(self.folder / ".lock"):
            yield


def key_id(public: Ed25519PublicKey) -> str:
    """The first 16 hex digits of the SHA-256 of the raw public key (32 bytes)."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]


def read_public_keys(path: str | Path) -> dict[str, Ed25519PublicKey]:
    """Public keys by id: of a PEM file with one or several, or of a folder's `*.pub`.

    Raises:
        UserError: there is no such file, or no Ed25519 key in it.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    place = Path(path)
    files = sorted(place.glob(f"*{PUBLIC}")) if place.is_dir() else [place]
    keys: dict[str, Ed25519PublicKey] = {}
    for file in files:
        try:
            blocks = _PEM.findall(file.read_bytes())
        except OSError as error:
            raise UserError(f"--public-key {path}: cannot be read ({error.strerror})") from None
        for block in blocks:
            try:
                key = load_pem_public_key(block)
            except ValueError:
                continue
            if isinstance(key, Ed25519PublicKey):
                keys[key_id(key)] = key
    if not keys:
        raise UserError(f"--public-key {path}: no Ed25519 public key in it; give a .pub file of `ofmu requests keys`")
    return keys


def is_signed_by(public: Ed25519PublicKey, signature: bytes, content: bytes) -> bool:
    """Whether this key made the signature."""
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, content)
    except InvalidSignature:
        return False
    return True
