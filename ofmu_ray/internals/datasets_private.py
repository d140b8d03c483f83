"""A private attribute of `datasets`: what identifies the content of a data set."""

from __future__ import annotations

from typing import Any

from ofmu_ray.internals.contract import check_attributes

FINGERPRINT = "_fingerprint"


def fingerprint(data: Any) -> str:
    """Hash of a `datasets.Dataset`'s files and of all that was done to it."""
    check_attributes("datasets", data, [FINGERPRINT])
    return str(getattr(data, FINGERPRINT))
