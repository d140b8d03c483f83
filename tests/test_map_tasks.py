"""One function over many items in warm processes: the cost of losing a process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from interrupts import heed_ctrl_c

from ofmu_ray.cluster import map_tasks as module
from ofmu_ray.cluster.map_tasks import ProcessDied, ProcessPool, map_tasks
from ofmu_ray.cluster.nodes import Node
from ofmu_ray.errors import UserError
from ofmu_ray.internals import ray_private

Answer = tuple[str, int, str]
"""Item, its number within the process, threads."""


def make(folder: Path) -> Callable[[str], Answer]:
    """A function that ends its process in the way its item says."""
    done = 0

    def function(item: str) -> Answer:
        nonlocal done
        done += 1
        first = not (folder / item).exists()
        (folder / item).touch()
        if item == "exits" or (item == "exits once" and first):
            os._exit(1)
        if item == "memory":
            raise ray.exceptions.OutOfMemoryError("the node ran low on memory")
        if item == "mistake":
            raise UserError("an option is wrong")
        if item == "bug":
            raise KeyError("x")
        if item == "sleeps":
            time.sleep(600)
        return item, done, os.environ["OMP_NUM_THREADS"]

    return function


@pytest.fixture(autouse=True)
def by_value() -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


def processes() -> list[psutil.Process]:
    alive = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    return [process for process in alive if "WarmProcess" in " ".join(process.cmdline())]


def gone() -> bool:
    """Whether the processes have ended; Ray's kills take a moment."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(psutil.NoSuchProcess):
            if not processes():
                return True
        time.sleep(0.1)
    return False


def test_an_item_whose_process_ends_is_handed_back(local_ray: None, tmp_path: Path) -> None:
    items = ["a", "memory", "exits", "b", "c"]
    with ProcessPool(partial(make, tmp_path), 1) as pool:
        results: dict[int, Any] = dict(pool.map(items))
        again = dict(pool.map(["d"]))
    assert [results[number] for number in (0, 3, 4)] == [("a", 1, "1"), ("b", 1, "1"), ("c", 2, "1")]
    assert again == {0: ("d", 3, "1")}  # the process was still warm
    for number, error in ((1, "OutOfMemoryError"), (2, "ActorDiedError")):
        assert isinstance(results[number], ProcessDied)
        assert error in str(results[number])
    assert gone()


def test_retries_are_the_callers_choice(local_ray: None, tmp_path: Path) -> None:
    with ProcessPool(partial(make, tmp_path), 1, cpus=2, retries=1) as pool:
        results: dict[int, Any] = dict(pool.map(["exits once", "a", "exits"]))
    assert results[0] == ("exits once", 1, "2")  # a thread per CPU
    assert results[1] == ("a", 2, "2")
    assert isinstance(results[2], ProcessDied)


def test_work_that_needs_every_item(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = ["a", "exits once", "b"]
    assert {number: value[0] for number, value in map_tasks(partial(make, tmp_path), items)} == dict(enumerate(items))
    monkeypatch.setattr(module, "RETRIES", 0)
    with pytest.raises(ProcessDied, match=r"its process died: .*OutOfMemoryError"):
        list(map_tasks(partial(make, tmp_path), ["memory"], most=1))
    with pytest.raises(UserError, match="an option is wrong"):
        list(map_tasks(partial(make, tmp_path), ["mistake", "a"]))
    with pytest.raises(KeyError):
        list(map_tasks(partial(make, tmp_path), ["bug"]))
    assert gone()


def test_work_continues_when_nothing_is_free(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another pool occupies both CPUs: one process shares one of them."""
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)
    with ProcessPool(partial(make, tmp_path), 2) as pool:
        list(pool.map(["a", "b"]))
        assert [value[0] for _, value in map_tasks(partial(make, tmp_path), ["c", "d"])] == ["c", "d"]


INTERRUPTED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import ray
import test_map_tasks as here
from ofmu_ray.cluster.connect import connect

connect(2)
ray.cloudpickle.register_pickle_by_value(here)
try:
    with here.ProcessPool(here.partial(here.make, Path(sys.argv[2])), 2) as pool:
        list(pool.map(["a", "sleeps"]))
except KeyboardInterrupt:
    print("gone" if here.gone() else "still there")
"""


@pytest.mark.full  # a separate Ray: inside a pytest worker, Ray does not reliably see an interrupt
def test_an_interrupt_ends_the_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)
    while not (tmp_path / "sleeps").exists() and done.poll() is None:
        time.sleep(0.1)
    done.send_signal(signal.SIGINT)
    assert "gone" in done.communicate(timeout=300)[0]


NODES = [
    Node("a", "", {"CPU": 4.0, "GPU": 8.0, "memory": 100.0}),
    Node("b", "", {"CPU": 4.0, "GPU": 4.0, "memory": 40.0}),
]


@pytest.mark.parametrize(
    ("resource", "memory", "whole_nodes", "share", "places"),
    [
        ("CPU", 0, False, {"CPU": 1}, ["a", "b", "a", "b", "a", "b", "a", "b"]),
        ("CPU", 30, False, {"CPU": 1, "memory": 30}, ["a", "b", "a", "a"]),
        ("CPU", 500, False, {"CPU": 1, "memory": 100}, ["a"]),  # more than Ray counts: no process would ever start
        ("GPU", 0, False, {"GPU": 1}, ["a", "b"] * 4),
        ("GPU", 0, True, {"GPU": 8}, ["a"]),
    ],
)
def test_a_process_asks_for_its_memory_and_gpus(
    resource: str,
    memory: int,
    whole_nodes: bool,
    share: dict[str, float],
    places: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_private, "free_resources", lambda: {node.id: node.resources for node in NODES})
    assert module._share(NODES, resource, memory, whole_nodes) == share
    assert module._free_places(NODES, share, 8) == (True, places)


def test_a_process_waits_for_a_node_that_could_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_private, "free_resources", lambda: {"b": {"GPU": 4.0}})
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)
    assert module._free_places(NODES[::-1], {"GPU": 8}, 3) == (False, ["a"])


OWN = """
import ray
from ofmu_ray.cluster import map_tasks

def make():
    return lambda _: (map_tasks.has_own_gpu(), map_tasks.device_kind(), map_tasks.runs_here(1e30))

ray.init(num_cpus=2, num_gpus=1)
found = [(map_tasks.has_own_gpu(), map_tasks.runs_here(1e30))]
for gpus in (1.0, 0.5, 0.0):
    with map_tasks.ProcessPool(make, 1, gpus=gpus) as pool:
        found += [value for _, value in pool.map([0])]
print(found)
"""


@pytest.mark.full  # a Ray of its own, which counts a GPU
def test_a_process_with_a_gpu_works_on_it_and_waits_for_no_other() -> None:
    done = subprocess.run([sys.executable, "-c", OWN], stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    own, without = (True, "cuda", True), (False, "cuda", False)  # without: the cluster's GPU does the work
    assert done.stdout.splitlines()[-1] == str([(False, False), own, own, without])


def test_small_work_stays_here(local_ray: None) -> None:
    assert module.runs_here(module.SMALL_FLOPS / 2)
    assert not module.runs_here(2 * module.SMALL_FLOPS)
