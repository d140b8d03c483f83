"""Fixtures for every test: where shared reference data lies, and quiet, single-threaded workers."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The reference data beside the checkout (TOFU, golden evaluation logs); it is never committed."""
    path = ROOT.parent / "shared"
    if not (path / "golden").is_dir():
        pytest.skip("no ../shared beside the checkout: TOFU and the golden logs are not part of the repository")
    return path
