"""Names of processes that hold something, also as seen from other machines."""

from __future__ import annotations

import os
import socket
import uuid

import psutil

PARTS = 4
"""Of an owner's name: host, process, start of the process, random."""


def owner_name() -> str:
    """A name of this process that no other one has: host/process/start/random."""
    return f"{socket.gethostname()}/{os.getpid()}/{_started(os.getpid())}/{uuid.uuid4().hex[:8]}"


def lives(owner: str) -> bool | None:
    """Whether a process of this machine is there; None: of another machine, or no name of a process."""
    parts = owner.split("/")
    if len(parts) != PARTS or parts[0] != socket.gethostname() or not parts[1].isdigit():
        return None
    return _started(int(parts[1])) == parts[2]


def _started(process: int) -> str:
    """When a process started, in seconds since this machine did; empty if there is none of this number.

    Not the time of day: that changes when the clock is set, and a living process would look like another one.
    """
    try:
        found = psutil.Process(process)
        return "" if found.status() == psutil.STATUS_ZOMBIE else f"{found.create_time() - psutil.boot_time():.2f}"
    except psutil.Error:
        return ""
