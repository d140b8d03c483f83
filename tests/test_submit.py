"""Submitting jobs: refusals before the upload, the upload, and a job that is stopped, killed and resumed."""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import fault_table
import psutil
import pytest
import ray
import yaml
from aiohttp import web
from interrupts import heed_ctrl_c

from ofmu_ray.cluster.job_server import Jobs
from ofmu_ray.cluster.upload import load_environment, packed
from ofmu_ray.config.submit import SubmitConfig
from ofmu_ray.errors import UserError
from ofmu_ray.runs.preflight import JOB_VARIABLE, UPLOADS, prepare_storage
from pipelines.submit import JOBS, OWN, check, split

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 600

# --------------------------------------------------------------------------------------------------- without a cluster


@pytest.mark.parametrize(
    ("line", "own", "command", "rest"),
    [
        ("unlearn --seed 3", [], "unlearn", ["--seed", "3"]),
        ("--address http://a:1 unlearn --seed 3", ["--address", "http://a:1"], "unlearn", ["--seed", "3"]),
        ("unlearn --seed 3 --address=http://a:1", ["--address", "http://a:1"], "unlearn", ["--seed", "3"]),
        ("evaluate --no-follow --working-dir=x", ["--follow", "false", "--working_dir", "x"], "evaluate", []),
        ("unlearn --stop.max_passes 9 --follow", ["--follow", "true"], "unlearn", ["--stop.max_passes", "9"]),
        ("train -- --status x", [], "train", ["--status", "x"]),
        ("--stop job-1", ["--stop", "job-1"], None, []),
    ],
)
def test_options_go_where_they_belong(line, own, command, rest):
    assert split(line.split()) == (own, command, rest)


def test_no_option_of_a_command_is_hidden_by_one_of_submit():
    for command, config in JOBS.items():
        values = {
            field.name for field in dataclasses.fields(config) if not dataclasses.is_dataclass(field.default_factory)
        }
        assert not OWN & values, command


def test_the_upload_holds_what_a_run_needs_and_little_else(tmp_path):
    config = SubmitConfig(working_dir=str(ROOT))
    with packed(config, load_environment(config), ["pipelines/configs/quickstart.yaml"]) as package:
        shutil.unpack_archive(package.path, tmp_path)
        assert package.megabytes < 8
    assert {"pyproject.toml", "constraints.txt", "ofmu_ray", "pipelines", "tune_spaces"} <= set(os.listdir(tmp_path))
    assert not {"tests", "docs", "runs", ".git", ".venv"} & set(os.listdir(tmp_path))
    for name in ("target", "retrained"):
        kept = (tmp_path / "ofmu_ray/assets/people" / name / "model.safetensors").read_bytes()
        assert kept == (ROOT / "ofmu_ray/assets/people" / name / "model.safetensors").read_bytes()


def test_a_configuration_that_the_upload_leaves_out_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    (tmp_path / ".gitignore").write_text("mine.yaml\n")
    (tmp_path / "runtime_env.yaml").write_text("env_vars: {}\n")
    config = SubmitConfig(working_dir=str(tmp_path))
    with (
        pytest.raises(UserError, match="excluded from the upload"),
        packed(config, load_environment(config), ["mine.yaml"]),
    ):
        pass


def test_a_job_does_not_write_into_its_own_folder(tmp_path, monkeypatch):
    upload = tmp_path / UPLOADS / "_ray_pkg_1"
    upload.mkdir(parents=True)
    monkeypatch.chdir(upload)
    assert prepare_storage("runs") == str(upload / "runs")
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    for storage in ("runs", "../../runs", str(upload / "runs"), f"file://{upload}/runs"):
        with pytest.raises(UserError, match="absolute path"):
            prepare_storage(storage)
    assert prepare_storage(str(tmp_path / "shared")) == str(tmp_path / "shared")
    monkeypatch.chdir("/")  # an image's code, without an upload
    assert prepare_storage(str(tmp_path / "shared")) == str(tmp_path / "shared")


@pytest.mark.slow
def test_equal_configurations_are_equal_jobs(tmp_path):
    """However they are written; name and storage count because they decide where the run resumes."""
    (tmp_path / "c.yaml").write_text("seed: 3\nstorage: /s\n")
    base = check("unlearn", ["--storage", "/s", "--seed", "3"])
    assert check("unlearn", ["--config", str(tmp_path / "c.yaml")]) == base
    assert check("unlearn", ["--seed", "3", "--storage", "/s", "--name", "other"]) != base
    assert check("train", ["--seed", "3", "--storage", "/s"]) != base


@pytest.mark.slow
def test_output_resumes_where_the_connection_broke(capsys):
    """A server whose first connection breaks in the middle of the output, as if a forwarded port were lost."""
    pieces = ["round 1\n", "round 2\n", "round 3\n"]
    connections: list[web.WebSocketResponse] = []
    shown: list[str] = []
    lines: list[str] = []

    async def version(_):
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": ""})

    async def info(_):
        return web.json_response(
            {"type": "SUBMISSION", "submission_id": "j", "status": "FAILED", "driver_exit_code": 2, "entrypoint": ""}
        )

    async def tail(request):
        stream = web.WebSocketResponse()
        await stream.prepare(request)
        connections.append(stream)
        for piece in pieces if len(connections) > 1 else pieces[:2]:
            await stream.send_str(piece)
        if len(connections) == 1:
            request.transport.abort()
        return stream

    app = web.Application()
    app.add_routes(
        [web.get("/api/version", version), web.get("/api/jobs/j", info), web.get("/api/jobs/j/logs/tail", tail)]
    )
    loop, port = asyncio.new_event_loop(), free_port()
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", port).start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        assert (
            Jobs(f"http://127.0.0.1:{port}", tell=lines.append, show=shown.append).follow("j") == 2
        )  # a user's mistake, found on the cluster
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(runner.cleanup())
        loop.close()
    assert len(connections) == 2
    assert "".join(shown) == "".join(pieces)
    assert lines == ["j FAILED"]
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------ with a cluster


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclasses.dataclass
class Head:
    """This test's Ray head on loopback, which requires a token."""

    folder: Path
    port: int
    environment: dict[str, str]
    ray: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def processes(self) -> list[psutil.Process]:
        """All processes started with this head's token, including jobs."""
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RAY_AUTH_TOKEN_PATH") == self.environment["RAY_AUTH_TOKEN_PATH"]:
                    processes.append(process)
        return processes

    def start(self, log: str, *words: str, cwd: Path = ROOT) -> subprocess.Popen[bytes]:
        """Start a command on the user's side; its output goes to a file."""
        with self.folder.joinpath(log).open("wb") as file:
            return subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, cwd=cwd, env=self.environment, preexec_fn=heed_ctrl_c
            )

    def submit(self, log: str, *words: str, cwd: Path = ROOT) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pipelines.submit", *words, "--address", self.address]
        return self.start(log, *command, cwd=cwd)

    def output(self, log: str) -> str:
        return self.folder.joinpath(log).read_text()

    def launch(self) -> None:
        """Start Ray, and wait until it is up."""
        words = ["ray", "start", "--head", "--port", str(free_port()), "--dashboard-host", "127.0.0.1"]
        words += ["--dashboard-port", str(self.port), "--dashboard-agent-listen-port", "0", "--disable-usage-stats"]
        words += ["--ray-client-server-port", str(free_port()), "--temp-dir", str(self.folder / "ray")]
        self.ray = self.start("head.log", *words, "--num-cpus", "4", "--block", cwd=self.folder)
        wait_for(lambda: "--block" in self.output("head.log"), self.ray)

    def kill(self) -> None:
        """SIGKILL of everything: Ray, the jobs' drivers and workers, and the clients."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes)

    def stop(self) -> list[psutil.Process]:
        """SIGTERM, like Ctrl-C for a head in a terminal; returns what is left after a while."""
        self.ray.terminate()
        self.ray.wait(timeout=60)
        return psutil.wait_procs(self.processes(), timeout=20)[1]


@pytest.fixture(scope="module")
def head():
    ray.shutdown()  # the shared Ray: calls to it hung after this head had run next to it
    folder = Path(tempfile.mkdtemp(prefix="ofmu", dir="/tmp"))  # a socket's path must be short
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = (
        inherited
        | fault_table.watched(folder)
        | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the node's address is 127.0.0.1
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
    )
    head = Head(folder, free_port(), environment)
    try:
        head.launch()
        yield head
        assert not head.stop()
    finally:
        head.kill()
        shutil.rmtree(folder)


def wait_for(condition, process: subprocess.Popen[bytes], log: Path | None = None):
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if result := condition():
            return result
        time.sleep(0.05)
    shown = "" if log is None else log.read_text()[-3000:]
    raise AssertionError(f"it did not come about; the process's status is {process.poll()}\n{shown}")


ROUNDS, EVERY = 32, 4
"""Stopping a job takes a command seconds; a round takes a fraction of a second."""
OPTIONS = [
    *("--training.rounds", str(ROUNDS), "--training.checkpoint_every", str(EVERY), "--training.batch_size", "4"),
    *("--ofmu.preset", "full", "--ofmu.inner_steps", "2"),
    *("--evaluation.enabled", "false", "--tracking.system_metrics", "false"),
]


def open_ports(head: Head) -> set[tuple[str, str]]:
    """The cluster's listening sockets: (process, address)."""
    ports = set()
    for process in head.processes():
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    ports.add((process.name(), connection.laddr.ip.removeprefix("::ffff:")))
    return ports


@pytest.mark.full
def test_a_job_is_detached_stopped_killed_and_resumed(head):
    """One job through everything that can happen to it and its head; its result equals that of the plain command."""
    storage = head.folder / "storage"
    undisturbed = head.start(
        "plain.log",
        *("ray", "job", "submit", "--address", head.address, "--runtime-env", "runtime_env.yaml", "--working-dir", "."),
        *("--", "python", "-m", "pipelines.unlearn", "--storage", str(storage), "--name", "plain", *OPTIONS),
    )
    words = ["unlearn", "--storage", str(storage), "--name", "job", *OPTIONS]

    # Ctrl-C leaves the job running and says how to continue
    first = head.submit("first.log", *words)
    wait_for(lambda: f"run     {storage}/job" in head.output("first.log"), first)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=PATIENCE_SECONDS) == 130
    submission = re.search(r"--attach (\S+)", head.output("first.log"))[1]

    # the same command finds the job running and follows it; --stop ends both
    second = head.submit("second.log", *words)
    wait_for(lambda: checkpoints(storage / "job") - {"round_000000"}, second)
    ports = open_ports(head)
    stopped = time.time()
    stop = head.submit("stop.log", "--stop", submission)
    assert stop.wait(timeout=PATIENCE_SECONDS) == 0, head.output("stop.log")
    assert f"{submission} STOPPED" in head.output("stop.log")
    assert second.wait(timeout=PATIENCE_SECONDS) == 1
    assert f"{submission} with this configuration is already running" in head.output("second.log")
    assert not storage.joinpath("job/metrics.json").exists()

    # the next one is a new job that resumes the run; then the head is lost with everything that runs there
    assert undisturbed.wait(timeout=PATIENCE_SECONDS) == 0, head.output("plain.log")[-3000:]
    third = head.submit("third.log", *words)
    left = checkpoints(storage / "job")
    wait_for(lambda: checkpoints(storage / "job") - left, third, head.folder / "third.log")
    assert f"{submission}-2" in head.output("third.log")
    lost = time.time()
    head.kill()

    # a new head knows no jobs, and the same command resumes the run there
    head.launch()
    last = head.submit("last.log", *words)
    assert last.wait(timeout=PATIENCE_SECONDS) == 0, head.output("last.log")[-3000:]
    assert f"{submission} SUCCEEDED" in head.output("last.log")
    assert weights(storage / "job") == weights(storage / "plain")
    rounds, models = [head.folder / "job.rounds"], (storage / "job/model", storage / "plain/model")
    for fault, at in (("job stopped", stopped), ("head lost", lost)):
        name = f"{fault}, submitted again"
        fault_table.record(name, phase="any round", at=at, rounds=rounds, models=models)
    series = json.loads((storage / "job/training.json").read_text())["series"]
    assert [row["round"] for row in series] == list(range(1, ROUNDS + 1))

    assert {ip for _, ip in ports} == {"127.0.0.1"}  # torch's rendezvous of the workers included
    assert {"gcs_server", "ray::RayTrainWorker"} <= {name.partition(".")[0] for name, _ in ports}


@pytest.mark.full
def test_evaluate_benchmark_and_a_stopped_sweep_are_jobs_too(head):
    """With this repository's configurations, made smaller; the sweep is stopped after a trial and resumed."""
    storage = head.folder / "storage"
    tiny = ["--storage", str(storage), "--base.training.batch_size", "4", "--base.evaluation.max_new_tokens", "4"]
    evaluate = head.submit(
        *("evaluate.log", "evaluate", "--models", '{"target": "builtin:people/target"}', "--name", "evaluated"),
        *("--storage", str(storage), "--evaluation.max_rows", "8", "--evaluation.max_new_tokens", "4"),
    )
    benchmark = head.submit(
        *("benchmark.log", "benchmark", "--config", "pipelines/configs/benchmark_people.yaml", *tiny),
        *("--methods", "[npo]", "--budget.amount", "2e+10", "--tuning.trials", "1", "--seeds", "[1]"),
        *("--tuning.rows", "8", "--tuning.max_new_tokens", "0", "--rule.objective", "forget_probability"),
        *("--rule.utility", "retain_probability", "--rule.floor", "0.1", "--base.evaluation.max_rows", "8"),
    )
    words = [
        *("sweep", "--config", "pipelines/configs/sweep_people.yaml", *tiny, "--search.trials", "3"),
        *("--search.startup_trials", "1", "--base.training.rounds", "4", "--select.rows", "8"),
        *("--select.max_new_tokens", "0", "--select.objective", "forget_probability", "--select.seeds", "[]"),
        *("--select.utility", "retain_probability", "--select.utility_floor", "0.1", "--concurrency", "1"),
        *("--base.evaluation.max_rows", "8"),
    ]
    trials = storage / "sweep_people/trials"
    sweep = head.submit("sweep.log", *words)
    done = wait_for(lambda: {path: path.stat().st_mtime_ns for path in trials.glob("*.json")}, sweep)
    submission = re.search(r"(ofmu-sweep-\S+)", head.output("sweep.log"))[1]
    stop = head.submit("stop_sweep.log", "--stop", submission)
    assert stop.wait(timeout=PATIENCE_SECONDS) == 0, head.output("stop_sweep.log")
    assert sweep.wait(timeout=PATIENCE_SECONDS) == 1
    assert not storage.joinpath("sweep_people/best.yaml").exists()
    again = head.submit("sweep_again.log", *words)
    for name, job in {"sweep_again": again, "evaluate": evaluate, "benchmark": benchmark}.items():
        assert job.wait(timeout=PATIENCE_SECONDS) == 0, head.output(f"{name}.log")[-3000:]
    assert done.items() <= {path: path.stat().st_mtime_ns for path in trials.glob("*.json")}.items()
    assert len(list(trials.glob("*.json"))) == 3
    assert storage.joinpath("sweep_people/best.yaml").exists()
    for name in ("evaluated", "benchmark_people"):
        assert storage.joinpath(name, "report.html").exists()


@pytest.mark.full
def test_mistakes_that_only_the_cluster_sees_exit_with_2(head):
    """The exit status of the pipeline, not Ray's: a model does not exist."""
    words = ["evaluate", "--storage", str(head.folder / "storage"), "--models", '{"mine": "/no/such/model"}']
    job = head.submit("mistake.log", *words)
    assert job.wait(timeout=PATIENCE_SECONDS) == 2, head.output("mistake.log")
    assert "no such folder" in head.output("mistake.log")
    submission = re.search(r"(\S+) FAILED", head.output("mistake.log"))[1]
    status = head.submit("status.log", "--status", submission)
    assert status.wait(timeout=PATIENCE_SECONDS) == 2
    assert head.output("status.log") == f"{submission} FAILED\n"
    unknown = head.submit("unknown.log", "--attach", "nothing")
    assert unknown.wait(timeout=PATIENCE_SECONDS) == 2
    assert "no such job" in head.output("unknown.log")


@pytest.mark.full
def test_the_token_is_asked_for_and_written_nowhere(head):
    without = {key: value for key, value in head.environment.items() if not key.startswith("RAY_AUTH")}
    command = [sys.executable, "-m", "pipelines.submit", "--status", "x", "--address", head.address]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=without)
    assert refused.returncode == 2
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr
    token = head.folder.joinpath("token").read_bytes()
    files = [path for path in head.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path for path in files if token in path.read_bytes()] == [head.folder / "token"]
    assert {"manifest.json", "mlflow.db"} <= {path.name for path in files}


def checkpoints(run: Path) -> set[str]:
    """Names of existing checkpoints, including unfinished ones."""
    return {path.parent.name for path in run.glob("train/round_*/state.json")}


def weights(run: Path) -> str:
    return hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest()


def test_the_runtime_environment_leaves_threads_of_workers_to_ray():
    """OMP_NUM_THREADS set for an entire job would also apply to actors with many CPUs."""
    environment = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
    assert "OMP_NUM_THREADS" not in environment["env_vars"]
