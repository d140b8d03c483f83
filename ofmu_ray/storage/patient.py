"""S3 with retries for about a minute; pyarrow's default gives up after three attempts within seconds.

The AWS SDK decides what to retry (broken connections, 5xx, throttling; not refused credentials) and waits longer each
time. Google's client, for gs://, retries for 15 minutes by default.
"""

from __future__ import annotations

from typing import Any

from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, S3FileSystem

ATTEMPTS = 8


class PatientS3(S3FileSystem):  # type: ignore[misc]  # pyarrow has no type stubs
    """pyarrow's S3 with `ATTEMPTS` that survive pickling, unlike those of pyarrow's class."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS))

    def __reduce__(self) -> Any:
        return _from_options, super().__reduce__()[1]


def patient(filesystem: FileSystem) -> FileSystem:
    """The same file system, with more retries if it is S3. (Its options can only be read from its pickle.)"""
    return _from_options(*filesystem.__reduce__()[1]) if type(filesystem) is S3FileSystem else filesystem


def _from_options(options: dict[str, Any]) -> PatientS3:
    return PatientS3(**options)
