"""Several nodes: real raylets on one machine, killed, without shared files, or cut off while a run uses them."""

from __future__ import annotations

import hashlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fault_table
import psutil
import pytest
import ray
from fault_job import make_job
from namespaces import SUBNETS, Machine, network, unshare, why_not
from node_run import EVERY
from ray.cluster_utils import Cluster
from s3_server import Server, s3_server

from ofmu_ray.cluster.connect import connect
from ofmu_ray.cluster.join import join_cluster
from ofmu_ray.cluster.nodes import alive
from ofmu_ray.cluster.rendezvous import choose
from ofmu_ray.config import ModelConfig, TrainingConfig
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.actors import holders
from ofmu_ray.training.launch import fit

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 300
WORKER = "RayTrainWorker"
NO_NAMESPACES = why_not()

INTERFACES = {"lo": ["127.0.0.1"], "eth0": ["10.1.0.5", "fd00::5"], "ib0": ["192.168.7.5"]}


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (None, ("eth0", "10.1.0.5")),
        ("ib0", ("ib0", "192.168.7.5")),
        ("192.168.0.0/16", ("ib0", "192.168.7.5")),
        ("fd00::/8", ("eth0", "fd00::5")),
    ],
)
def test_an_interface_is_chosen_by_address_name_or_subnet(wanted, chosen):
    assert choose(wanted, "10.1.0.5", INTERFACES) == chosen


@pytest.mark.parametrize(("wanted", "node"), [("eth1", "10.1.0.5"), ("10.9.0.0/16", "10.1.0.5"), (None, "10.9.9.9")])
def test_an_interface_that_is_not_there_is_named_with_those_that_are(wanted, node):
    with pytest.raises(UserError, match=rf"network_interface = .* node {node}.*ib0 \(192.168.7.5\)"):
        choose(wanted, node, INTERFACES)


# ------------------------------------------------------------------------------------------- raylets of one machine


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def store() -> Iterator[Server]:
    """An S3 server, with credentials that it checks while it is `refusing`."""
    with s3_server() as server:
        yield server.user()


@pytest.fixture(scope="module")
def cluster(store, runs) -> Iterator[Cluster]:
    """A head that runs no tasks, and two nodes with room for two workers each; all can use the store."""
    with temporary() as folder, pytest.MonkeyPatch.context() as patch:
        environment = {"RAY_TMPDIR": str(folder)} | store.environment | fault_table.watched(runs)
        for name, value in environment.items():
            patch.setenv(name, value)
        ray.shutdown()  # the shared Ray, which is no cluster
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=2)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@contextmanager
def temporary() -> Iterator[Path]:
    """Where Ray keeps its sockets and logs; the path of a socket must be short."""
    with tempfile.TemporaryDirectory(prefix="ofmu", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def start(
    folder: Path, name: str, placement: str, *before: str, interface: str = "", **environment: str
) -> subprocess.Popen[bytes]:
    """The driver of a run; `before` is put before its command."""
    words = [*before, sys.executable, str(ROOT / "tests/node_run.py"), str(folder), name, placement, interface]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=os.environ | environment)


def wait(driver: subprocess.Popen[bytes], folder: Path, name: str) -> str:
    """Digest of the weights at the end of a run."""
    assert driver.wait(timeout=PATIENCE_SECONDS) == 0, (folder / f"{name}.log").read_text()[-3000:]
    return hashlib.sha256((folder / name / "model/model.safetensors").read_bytes()).hexdigest()


def wait_for_checkpoint(driver: subprocess.Popen[bytes], folder: Path, name: str) -> None:
    mark = folder / name / f"train/round_{EVERY:06d}/manifest.json"
    end = time.monotonic() + PATIENCE_SECONDS
    while not mark.exists():
        assert time.monotonic() < end
        assert driver.poll() is None, (folder / f"{name}.log").read_text()[-3000:]
        time.sleep(0.02)


def busy(cluster: Cluster) -> list[Any]:
    """The nodes on which training workers run."""
    raylets = {node: node.all_processes["raylet"][0].process.pid for node in cluster.worker_nodes}
    families = {node: psutil.Process(pid).children(recursive=True) for node, pid in raylets.items()}
    return [node for node, family in families.items() if any(WORKER in " ".join(p.cmdline()) for p in family)]


def record(fault: str, runs: Path, name: str, at: float) -> None:
    models = runs / name / "model", runs / "packed/model"
    fault_table.record(fault, phase="any round", at=at, rounds=[runs / f"{name}.rounds"], models=models)


@pytest.mark.full
def test_workers_that_fit_on_no_node(cluster, runs):
    """At the start they are refused; if there is no room later, the run ends in time and reports it."""
    training = TrainingConfig(cpus_per_worker=3, node_timeout=2, checkpoint_every=1)
    with pytest.raises(UserError, match=r"training.workers = 1, each with 3 CPU on one node.*room for 0"):
        join_cluster(training, runs, {})
    with pytest.raises(UserError, match=r"room for 0 in training.node_timeout = 2 s; the same command resumes"):
        fit(make_job(runs, training=training, name="homeless"), "homeless")


@pytest.fixture(scope="module")
def undisturbed(cluster, runs) -> str:
    """Weights of an undisturbed run, with its workers packed on one node."""
    driver = start(runs, "packed", "pack")
    wait_for_checkpoint(driver, runs, "packed")
    assert len(busy(cluster)) == 1
    return wait(driver, runs, "packed")


@pytest.mark.full
def test_a_raylet_is_killed_in_training(cluster, runs, undisturbed):
    """SIGKILL of one of the two nodes with a worker: the other one takes both."""
    driver = start(runs, "spread", "spread")
    wait_for_checkpoint(driver, runs, "spread")
    _, victim = busy(cluster)
    at = time.time()
    cluster.remove_node(victim, allow_graceful=False)
    assert wait(driver, runs, "spread") == undisturbed
    record("raylet of a worker's node killed", runs, "spread", at)


@pytest.mark.full
@pytest.mark.skipif(NO_NAMESPACES is not None, reason=str(NO_NAMESPACES))
def test_a_node_that_sees_other_files_is_named(cluster, runs, store):
    """One node has an empty file system where the others have the storage, and other credentials; later it is gone, and
    the others are fine. A run that was waiting for room before the node joined starts its worker there."""
    model = runs / "model"
    model.mkdir()
    paths = {"model.path": [str(model), None, "some/hub-name", "s3://bucket/model"]}
    connect(1)
    seeing = [node for node in alive() if node.resources.get("CPU")]
    late = replace(
        make_job(runs, training=TrainingConfig(cpus_per_worker=3, node_timeout=PATIENCE_SECONDS), name="late"),
        model=ModelConfig(path=str(model)),
    )
    with ThreadPoolExecutor(1) as threads, blind_node(cluster.address, runs, threads.submit(fit, late, "late")) as run:
        with pytest.raises(UserError) as refusal:
            join_cluster(TrainingConfig(), runs, paths)
        assert holders(str(model), "CPU") == seeing  # where actors load the model
        with store.refusing(), pytest.raises(UserError) as refused:
            join_cluster(TrainingConfig(), f"{store.bucket}/runs", {})
        with pytest.raises(UserError) as joined:
            run.result(timeout=PATIENCE_SECONDS)
    message = str(refusal.value)
    assert f"storage = {runs}, models and data must be the same on all nodes" in message
    assert message.count("cannot read or write the storage") == message.count(f"has no {model} (model.path)") == 1
    message = str(refused.value)
    assert "storage = s3://bucket/runs, models and data must be the same on all nodes" in message
    assert (
        message.count("\n  node ") == message.count("access denied: check the credentials (environment, profile") == 1
    )
    assert "give Ray on all nodes the same credentials" in message
    assert not store.keys()
    node, message = seeing[0].address, str(joined.value)
    assert f"storage = {late.run_dir}, models and data must be the same on all nodes" in message
    assert message.count("\n  node ") == 2
    assert f"node {node} has no {model} (model.path)" in message
    assert f"node {node} cannot read or write the storage of the driver's node (.driver is not there)" in message
    assert "--storage" in message
    with pytest.raises(UserError, match="network_interface = nothing0") as refusal:
        join_cluster(TrainingConfig(network_interface="nothing0"), runs, paths)
    assert "cannot read" not in str(refusal.value)
    assert "has no" not in str(refusal.value)
    assert not list(runs.glob(".nodes-*"))


@contextmanager
def blind_node(address: str, folder: Path, run: Future[Any]) -> Iterator[Future[Any]]:
    """A node with its own mount namespace, in which `folder` is empty, with room for the worker of `run` and a secret
    that the store refuses. It joins once the run has started to look for room."""
    ray_command = Path(sys.executable).with_name("ray")
    script = f"mount -t tmpfs none {folder} && exec {ray_command} start --address {address} --num-cpus 3 --block"
    before, environment = len(alive()), os.environ | {"AWS_SECRET_ACCESS_KEY": "another"}
    wait_until(lambda: (folder / "late/train/.driver").exists())
    node = subprocess.Popen(
        unshare("mount", script), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: node.poll() is not None or len(alive()) > before)
        assert node.poll() is None
        yield run
    finally:
        for process in psutil.Process(node.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "ray::" in " ".join(process.cmdline()):  # the raylet would wait half a minute for its workers
                    process.kill()
        node.terminate()
        node.wait(timeout=60)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------- machines of namespaces


@pytest.mark.full
@pytest.mark.skipif(NO_NAMESPACES is not None, reason=str(NO_NAMESPACES))
def test_a_node_is_cut_off_in_training(runs, undisturbed):
    """Three machines, Ray on one network and the workers on another, chosen by its subnet; the cables of a machine with
    a worker are pulled without notice."""
    with temporary() as folder, network(3, folder) as net:
        head, *others = net.machines
        address, token = f"{head.address}:6379", runs / "token"
        token.write_text(secrets.token_hex(32))
        environment = {"RAY_TMPDIR": str(folder), "RAY_ADDRESS": address} | IMPATIENT
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} | fault_table.watched(runs)
        start_ray(head, environment, "--head", "--port", "6379", "--num-cpus", "0", "--include-dashboard", "false")
        for machine in others:
            start_ray(machine, environment, "--address", address, "--num-cpus", "2")
        driver = start(runs, "cut", "spread", *head.command(), interface=SUBNETS[1], **environment)
        wait_for_checkpoint(driver, runs, "cut")
        one, other = others
        assert one.processes(WORKER)
        assert other.processes(WORKER)
        assert (one.second, other.second) in connections(one.processes(WORKER)[0])
        at = time.time()
        net.cut_off(other)
        assert wait(driver, runs, "cut") == undisturbed
        record("network of a worker's node cut, counted as lost after 4 s", runs, "cut", at)


IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""The head considers a node lost after about four seconds without an answer; by default after half a minute."""


def start_ray(machine: Machine, environment: dict[str, str], *words: str) -> None:
    """Ray on a machine; it ends with the machine."""
    options = ["--node-ip-address", machine.address, "--object-store-memory", str(100 << 20), "--disable-usage-stats"]
    command = [str(Path(sys.executable).with_name("ray")), "start", *words, *options, "--block"]
    process = subprocess.Popen(machine.command(*command), env=os.environ | environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if b"--block" in line:
            return
    raise AssertionError(f"ray start on {machine.address} ended with {process.wait()}")


def connections(process: psutil.Process) -> set[tuple[str, str]]:
    """(own address, other address) of IPv4 connections in a process's network namespace."""
    lines = Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]
    pairs = [line.split()[1:3] for line in lines if line.split()[3] == "01"]
    return {(dotted(own), dotted(other)) for own, other in pairs}


def dotted(place: str) -> str:
    """0201010A:1F90 -> 10.1.1.2."""
    return ".".join(str(byte) for byte in reversed(bytes.fromhex(place[:8])))
