"""Errors of disks and object stores, in one sentence with the place and the remedy."""

from __future__ import annotations

import errno
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from ofmu_ray.errors import StorageError, UserError, causes
from ofmu_ray.storage.local import node_folder
from ofmu_ray.storage.names import PathLike, is_uri, without_credentials

_NUMBERS = {
    "room": {errno.ENOSPC, errno.EDQUOT, errno.EFBIG},
    "rights": {errno.EACCES, errno.EPERM, errno.EROFS},
}
# pyarrow reports codes of AWS and Google as text only, and safetensors the system's messages
_WORDS = {
    "room": re.compile(r"No space left on device|Disk quota exceeded|File too large|database or disk is full"),
    "credentials": re.compile(
        r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|EXPIRED_TOKEN"
        r"|INVALID_TOKEN|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|\S+ \(HTTP status 40[13]\))"
        r"|google::cloud::Status\((PERMISSION_DENIED|UNAUTHENTICATED)"
    ),
    "bucket": re.compile(r"AWS Error NO_SUCH_BUCKET"),
    "silence": re.compile(
        r"AWS Error (NETWORK_CONNECTION|SERVICE_UNAVAILABLE|SLOW_DOWN|INTERNAL_FAILURE|THROTTLING|REQUEST_TIMEOUT"
        r"|\S+ \(HTTP status 5\d\d\))|google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED)"
    ),
}
_SENTENCES = {
    "room": "no space left: free some space, or choose another location",
    "rights": "no permission: give the user read and write access, or choose another location",
    "credentials": "access denied: check the credentials (environment, profile or role, on every node) and their "
    "permission to list, read, write and delete",
    "bucket": "no such bucket: create it, or correct the name",
    "silence": "the store does not respond: check the address and the network",
}
_LONGEST_DETAIL = 300


@contextmanager
def explained(place: PathLike, option: str = "storage") -> Iterator[None]:
    """Turn storage errors in this block into a StorageError that names `option` and `place`.

    An error with a file name reports that file; other errors pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for cause in causes(error):
            reason = refusal(cause)
            if reason is not None:
                where = getattr(cause, "filename", None) or f"{_where(place, cause)} ({option})"
                raise StorageError(f"{where}: {reason}; then the same command resumes from here") from error
        raise


def _where(place: PathLike, error: BaseException) -> PathLike:
    """Stores do not run out of space: the full disk is the one with this machine's copies."""
    return node_folder() if is_uri(place) and _kind(error) == "room" else without_credentials(place)


def refusal(error: BaseException) -> str | None:
    """The storage problem that an error reports, and its remedy; None: another error."""
    kind = _kind(error)
    return None if kind is None else f"{_SENTENCES[kind]} ({' '.join(str(error).split())[:_LONGEST_DETAIL]})"


def may_pass(error: BaseException) -> bool:
    """Whether a storage error is transient and worth a retry."""
    return not isinstance(error, (FileNotFoundError, UserError)) and _kind(error) in (None, "silence")


def _kind(error: BaseException) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    for kind, numbers in _NUMBERS.items():
        if number in numbers:
            return kind
    known = isinstance(error, (OSError, RuntimeError, sqlite3.Error)) or _is_safetensors(error)
    text = str(error) if known else ""
    return next((kind for kind, words in _WORDS.items() if words.search(text)), None)


def _is_safetensors(error: BaseException) -> bool:
    return type(error).__name__ == "SafetensorError"
