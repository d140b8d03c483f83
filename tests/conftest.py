"""Fixtures for all tests: the path of shared reference data, and quiet, single-threaded workers."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")  # per-process memory use is not of interest

import pytest
from hub_server import TOKEN, Hub, hub_server
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
# workers that Ray starts import what tests define, such as digits_task.py
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
LONGEST = ("test_submit", "test_recovery", "test_sweep", "test_unlearn", "test_benchmark_pipeline", "test_evaluate")
"""Files that take two minutes or more."""
PROCESSES = ("subprocess.Popen", "os.fork", "os.posix_spawn")
"""Audit events of a new process."""

# no time limit of an example (200 ms by default): on a busy machine any test would exceed it
settings.register_profile("ofmu", deadline=None)
settings.load_profile("ofmu")

_unit: list[str] = []
"""The running unit test."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, those without processes last, so that two pytest workers finish at the same time."""
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.system)
    started = {item.path for item in items if not is_unit(item)}

    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST) + (item.path not in started)

    items.sort(key=place)
    sys.addaudithook(refuse_processes)


def is_unit(item: pytest.Item) -> bool:
    return not any(item.get_closest_marker(name) for name in ("system", "full"))


def refuse_processes(event: str, arguments: tuple[object, ...]) -> None:
    if event in PROCESSES and _unit and arguments[0] not in ("git", "uname"):  # milliseconds
        raise AssertionError(f"{_unit[-1]} starts a process ({event} {arguments[:1]}): mark it `system`")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if is_unit(item):
        _unit.append(item.nodeid)
    try:
        return (yield)
    finally:
        _unit.clear()


@pytest.fixture(scope="module")
def local_ray() -> None:
    """Ray on this machine with two CPUs, as a pipeline starts it; pipelines find it running.

    It stays up for the next file, because a start costs about ten CPU seconds. A file that needs another Ray stops it.
    """
    from ofmu_ray.cluster.connect import connect

    connect(2)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The reference data next to the checkout (TOFU, golden evaluation logs); it is never committed."""
    path = ROOT.parent / "shared"
    if not (path / "golden").is_dir():
        pytest.skip("no ../shared beside the checkout: TOFU and the golden logs are not part of the repository")
    return path


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database of MLflow for a file's runs, as making its tables takes longer than a tiny run."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}"


IMAGE_METHODS = ("boundary_shrink", "random_labels", "salun")
"""Methods that ask for classes; language models have none (tests/test_images.py checks the list)."""


def _text_methods() -> list[str]:
    from ofmu_ray.config import METHODS

    return [name for name in METHODS if name not in IMAGE_METHODS]


TEXT_METHODS = _text_methods()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hugging Face hub on loopback, which this process asks with a token, and caches of its own."""
    import datasets
    from huggingface_hub import constants

    with hub_server() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage servers are not the hub's API
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
