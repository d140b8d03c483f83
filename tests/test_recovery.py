"""Killed workers and a killed driver: the run goes on and ends with the weights of an undisturbed one, to the bit."""

import contextlib
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 400
OPTIONS = [
    *("--training.rounds", "24", "--training.checkpoint_every", "8", "--training.batch_size", "4"),
    *("--ofmu.preset", "full", "--ofmu.inner_steps", "2"),
    *("--evaluation.enabled", "false", "--tracking.system_metrics", "false"),
]
TWO_WORKERS = ["--training.workers", "2", "--training.zero_stage", "2"]


def start(storage: Path, name: str) -> subprocess.Popen[str]:
    """The driver as a user starts it, in a process group of its own."""
    command = [sys.executable, "-m", "pipelines.unlearn", "--storage", str(storage), "--name", name]
    log = (storage / f"{name}.log").open("a")
    return subprocess.Popen(
        [*command, *OPTIONS, *TWO_WORKERS], cwd=ROOT, stdout=log, stderr=log, text=True, start_new_session=True
    )


def wait(driver: subprocess.Popen[str], storage: Path, name: str) -> None:
    status = driver.wait(timeout=PATIENCE_SECONDS)
    assert status == 0, (storage / f"{name}.log").read_text()[-3000:]


def weights(storage: Path, name: str) -> str:
    return hashlib.sha256((storage / name / "model/model.safetensors").read_bytes()).hexdigest()


def workers(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training workers of this driver's own Ray, by age."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if any("RayTrainWorker" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:  # it ended while we looked
            continue
    return sorted(found, key=lambda process: process.create_time())


def wait_for(condition, driver: subprocess.Popen[str]):
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end and driver.poll() is None:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"it did not come about; the driver's status is {driver.poll()}")


def checkpoint(storage: Path, name: str, round: int) -> Path:
    return storage / name / "train" / f"round_{round:06d}"


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(storage):
    wait(start(storage, "undisturbed"), storage, "undisturbed")
    return weights(storage, "undisturbed")


def kill_with_family(driver: subprocess.Popen[str]) -> None:
    """SIGKILL of the driver; a machine that goes away takes Ray's processes along at once."""
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_three_kills_of_a_worker(storage, undisturbed):
    """SIGKILL of a worker while it starts, after the first checkpoint and after the second, in one run."""
    driver = start(storage, "workers")
    killed = []

    def kill(which: int) -> None:
        victim = wait_for(lambda: [w for w in workers(driver) if w.pid not in killed] or None, driver)[which]
        killed.append(victim.pid)
        victim.kill()

    kill(0)  # before the first checkpoint
    for round, which in ((8, -1), (16, 0)):
        wait_for(checkpoint(storage, "workers", round).joinpath("state.json").exists, driver)
        kill(which)
    wait(driver, storage, "workers")
    assert weights(storage, "workers") == undisturbed
    training = json.loads((storage / "workers/training.json").read_text())
    assert [row["round"] for row in training["series"]] == list(range(1, 25))
    assert training["account"]["updates"] == 24 * 3


def test_a_killed_driver_is_resumed_by_its_name(storage, undisturbed):
    driver = start(storage, "driver")
    wait_for(checkpoint(storage, "driver", 8).joinpath("state.json").exists, driver)
    kill_with_family(driver)
    assert not (storage / "driver/metrics.json").exists()
    wait(start(storage, "driver"), storage, "driver")
    assert weights(storage, "driver") == undisturbed
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{storage}/mlflow.db")
    runs = mlflow.search_runs(experiment_names=["ofmu"], filter_string="attributes.run_name = 'driver'")
    assert list(runs["status"]) == ["FINISHED"]  # taken up, not begun again
    steps = [m.step for m in mlflow.MlflowClient().get_metric_history(runs["run_id"][0], "forget_loss")]
    assert steps == list(range(1, 25))


def test_another_configuration_does_not_take_up_a_checkpoint(storage, undisturbed):
    """Same name, other options, unfinished: refused, nothing is overwritten."""
    driver = start(storage, "changed")
    wait_for(checkpoint(storage, "changed", 8).joinpath("state.json").exists, driver)
    kill_with_family(driver)
    command = [sys.executable, "-m", "pipelines.unlearn", "--storage", str(storage), "--name", "changed", *OPTIONS]
    again = subprocess.run([*command, *TWO_WORKERS, "--seed", "5"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2, again.stderr[-2000:]
    assert "another configuration" in again.stderr
    assert checkpoint(storage, "changed", 8).joinpath("state.json").exists()
