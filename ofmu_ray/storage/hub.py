"""Whether the Hugging Face hub can be asked: its clients retry for a long time and report a failure in many ways."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

SECONDS = 1.5
"""To look its name up and to connect, so that a mistake is told within three."""


def unreachable(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Why the hub cannot be asked for what is not in its cache here; None: it is there, or the hub answers."""
    from huggingface_hub import constants

    if _is_cached(name, kind):
        return None
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, and it is not in the cache"
    reason = no_connection()
    return reason and f"the hub is not reachable ({reason}), and it is not in the cache"


def no_connection() -> str | None:
    """Why the hub does not answer; None: it does, or only a proxy could tell."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    if parts.scheme in urllib.request.getproxies():
        return None
    port = parts.port or (80 if parts.scheme == "http" else 443)
    found: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((parts.hostname or "", port), timeout=SECONDS).close()
        except OSError as error:
            found.append(str(error))
        else:
            found.append(None)

    # the look-up of a name knows no limit of time, and each address of a host has its own
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return found[0] if found else f"no answer within {SECONDS:g} seconds"


def _is_cached(name: str, kind: str) -> bool:
    from huggingface_hub import constants, try_to_load_from_cache

    if kind == "model":
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    folders = (
        prepared / name.replace("/", "___"),
        Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}",
    )
    return any(folder.is_dir() for folder in folders)
