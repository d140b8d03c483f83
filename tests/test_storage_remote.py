"""Folders and models in an object store: complete or ignored, retried, and refused in one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from gcs_server import gcs_server, lose_answers
from s3_server import BUCKET, Proxy, Server, proxy, s3_server

from ofmu_ray import storage
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import EvaluationConfig, FormatConfig
from ofmu_ray.data.sidecar import StoredValues, has_table, new_table
from ofmu_ray.errors import StorageError, UserError
from ofmu_ray.evaluation.runner import evaluate_model
from ofmu_ray.runs.catalog import read_past
from ofmu_ray.runs.claims import Claim, is_running, locked
from ofmu_ray.storage import bucket_lock
from ofmu_ray.storage.owners import owner_name
from pipelines import train, unlearn

pytestmark = pytest.mark.slow  # a server in the process

MODEL = Path(resolve_builtin("builtin:people/target"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def way(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """This process reaches the server through a proxy and has its own cache."""
    with proxy(server) as (before, state):
        for name, value in before.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield state


def put(place: str, files: dict[str, str]) -> None:
    with storage.atomic_dir(place) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)


def content(place: str) -> dict[str, str]:
    folder = storage.fetched(place)
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.system
def test_a_folder_comes_and_goes_through_a_network_that_breaks(server: Server, way: Proxy) -> None:
    place, files = f"{server.bucket}/broken/way", {"a": "1" * 100_000, "sub/b": "2"}
    way.broken = {"PUT": 2, "POST": 3}
    put(place, files)
    assert way.failures == 5
    way.broken = {"GET": 3, "HEAD": 2}
    assert content(place) == files
    assert way.failures == 10
    put(place, {"a": "new"})
    assert content(place) == {"a": "new"}
    assert server.keys("broken") == ["broken/way/a", "broken/way/manifest.json"]


def test_what_is_half_written_or_damaged_is_not_taken(server: Server, way: Proxy) -> None:
    place = f"{server.bucket}/bad/way"
    with pytest.raises(UserError, match=r"model\.path = s3://bucket/bad/way: nothing is there"):
        storage.fetched(place, "model.path")
    way.spoil = lambda path, body: body.replace(b"weights", b"weighty")
    with pytest.raises(StorageError, match="s3://bucket/bad/way/a: the data read back differs from what was written"):
        put(place, {"a": "weights"})
    assert not storage.is_whole(place)
    with pytest.raises(UserError, match="s3://bucket/bad/way is incomplete"):
        storage.fetched(place)

    way.spoil = lambda path, body: body
    put(place, {"a": "weights"})
    server.client.put_object(Bucket=BUCKET, Key="bad/way/a", Body=b"weighty")
    with pytest.raises(StorageError, match="a does not match its checksum"):
        storage.fetched(place)
    listing = {"complete": True, "files": {"../../a": {"bytes": 1, "sha256": ""}}}
    server.client.put_object(Bucket=BUCKET, Key="bad/way/manifest.json", Body=json.dumps(listing).encode())
    with pytest.raises(UserError, match="lists a file outside the folder"):
        storage.fetched(place)


def test_a_table_is_mapped_and_leaves_nothing_on_the_machine(server: Server, way: Proxy, tmp_path: Path) -> None:
    for place in (f"{server.bucket}/tables/one", str(tmp_path / "one")):
        with new_table(place, ["x", "y"], np.array([2, 1]), [3], "float16", {}) as (values, starts):
            values[:] = np.arange(9).reshape(3, 3)
            assert starts.tolist() == [0, 2]
        assert has_table(place)
        assert StoredValues(place).rows(["y", "x"]).tolist() == [[6, 7, 8], [0, 1, 2], [3, 4, 5]]
    assert np.load(tmp_path / "one/values.npy").shape == (3, 3)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_model_in_a_store_is_evaluated_as_a_folder_is(server: Server, way: Proxy, tmp_path: Path) -> None:
    """Uploaded by other means, so without a manifest; its values are cached in the store, too."""
    for path in MODEL.iterdir():
        server.client.put_object(Bucket=BUCKET, Key=f"models/target/{path.name}", Body=path.read_bytes())
    rows = {"retain": [{"question": "Who is it?", "answer": "Nobody."}, {"question": "Where?", "answer": "There."}]}
    config, tables = EvaluationConfig(max_new_tokens=0), []
    for model, cache in ((f"{server.bucket}/models/target", f"{server.bucket}/cache"), (str(MODEL), str(tmp_path))):
        tables.append(evaluate_model(model, model, rows, FormatConfig(), config, cache, label="target"))
    assert tables[0].equals(tables[1])
    (key,) = server.keys("cache")
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == [Path(key).name]


@pytest.mark.system
def test_a_storage_that_refuses_is_found_out_at_the_start(server: Server, way: Proxy, tmp_path: Path, capsys) -> None:
    fit = ["--data.train.path", "builtin:people/retain.jsonl"]

    def refusal(place: str, command=unlearn, *options: str) -> str:
        assert command.main(["--storage", place, "--name", "x", "--tracking.uri", "sqlite:///never.db", *options]) == 2
        return capsys.readouterr().err

    before = server.keys()
    with server.refusing():
        for said in (refusal(f"{server.bucket}/runs"), refusal(f"{server.bucket}/runs", train, *fit)):
            assert "storage = 's3://bucket/runs': access denied: check the credentials" in said
        place = f"{server.bucket}/x"
        for option, named in (
            ("model.path", f"{place} (model.path)"),
            ("data.forget.path", f"data.forget.path = {place}"),
        ):
            assert f"{named}: access denied" in refusal(str(tmp_path), unlearn, f"--{option}", place)
    assert "storage = 's3://nobody/runs': no such bucket" in refusal("s3://nobody/runs")
    secret = refusal("s3://key:secret@bucket/runs")
    assert "contains credentials" in secret
    assert "secret@" not in secret
    way.broken = {"POST": 99, "PUT": 99}
    assert "does not respond" in refusal(f"{server.bucket}/runs")
    assert server.keys() == before
    assert not Path("never.db").exists()


def test_credentials_that_expire_on_the_way(server: Server, way: Proxy) -> None:
    refused = r"s3://bucket/late \(storage\): access denied: check the credentials"
    with server.refusing(), pytest.raises(StorageError, match=refused) as caught:
        put(f"{server.bucket}/late", {"a": "a"})
    assert caught.value.status == 1


def test_googles_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is stored and removed completely, including subfolders that Google's lists omit (no own object)."""
    with gcs_server(tmp_path) as google:
        for name, value in google.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        place, files = f"{google.bucket}/runs/model", {"a": "1" * 100_000, "sub/b": "2"}
        put(place, files)
        assert content(place) == files
        put(place, {"a": "new"})
        assert content(place) == {"a": "new"}
        with storage.published(f"{google.bucket}/runs/table", "whole") as partial:
            storage.write_text(f"{partial}/whole", "yes")
        assert storage.read_text(f"{google.bucket}/runs/table/whole") == "yes"
        filesystem, inside = storage.locate(f"{place}.partial-123")
        filesystem.create_dir(inside)
        storage.write_text(f"{place}.partial-123/half", "done")
        lose_answers(deletions=2)
        storage.remove_folder(place)
        assert google.keys() == ["runs/table/whole"]
        storage.remove_folder(place)
        assert not storage.is_whole(place)
        assert at_once(f"{google.bucket}/runs/once", 3)[0] == 1


def claim(place: str, **options: bool) -> Claim:
    return Claim(place, "unlearn", "hash", {}, **options)


def mark(server: Server, name: str, owner: str, state: str = "running") -> None:
    key = f"{name}/.lock-{state},{owner.replace('/', ',')}"
    server.client.put_object(Bucket=BUCKET, Key=key, Body=b"")


def elsewhere() -> str:
    """The name of a process of another machine."""
    return "/".join(["elsewhere", *owner_name().split("/")[1:]])


def at_once(place: str, starts: int) -> tuple[int, list[str]]:
    """Start a run that lasts until all others have ended: how many work, and what the others say."""
    together, ended, said, working = threading.Barrier(starts), threading.Semaphore(0), [], []

    def start() -> None:
        together.wait()
        try:
            with claim(place).held():
                working.append(1)
                for _ in range(starts - 1):
                    assert ended.acquire(timeout=20)
        except UserError as error:
            said.append(str(error))
            ended.release()

    threads = [threading.Thread(target=start) for _ in range(starts)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return len(working), said


@pytest.fixture
def quick(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process reaches the server without a proxy, and locks of buckets beat fast."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for name, seconds in (("BEAT", 0.1), ("LEASE", 1.0), ("POLL", 0.05)):
        monkeypatch.setattr(bucket_lock, name, seconds)


def test_of_starts_at_once_in_a_bucket_one_works(server: Server, quick: None) -> None:
    for attempt in range(3):
        place = f"{server.bucket}/runs/once-{attempt}"
        working, said = at_once(place, 4)
        assert working == 1
        name = f"process {os.getpid()} on {owner_name().split('/')[0]}"
        words = f"name = 'once-{attempt}': {name} is running it now; wait for it or stop it, or choose another --name"
        assert said == [words] * 3
        assert server.keys(f"runs/once-{attempt}/") == [f"runs/once-{attempt}/run.json"]


def test_the_lock_of_a_bucket_is_kept_while_a_run_is_deleted_or_given_back(server: Server, quick: None) -> None:
    place, marks = f"{server.bucket}/runs/again", lambda: [key for key in server.keys("runs/again/") if ".lock" in key]
    with claim(place).held():
        storage.write_text(f"{place}/train/old", "old")
    with Claim(place, "unlearn", "other", {}, overwrite=True).held():
        assert len(marks()) == 1
        assert is_running(place)
        assert read_past(place).status == "running"
        assert server.keys("runs/again/train") == []
        with pytest.raises(UserError, match="is running it now"), locked(place):
            pass
    assert not is_running(place)
    storage.remove_folder(place)
    with pytest.raises(UserError, match="mine"), claim(place).held():
        raise UserError("mine")
    assert server.keys("runs/again") == []


def test_a_lock_whose_owner_died_is_taken_over(server: Server, quick: None, monkeypatch) -> None:
    """At once on the same machine; of another machine, after its mark has not changed for the length of a lease."""
    dead = owner_name().replace(f"/{os.getpid()}/", f"/{2**22 + 1}/")
    monkeypatch.setattr(bucket_lock, "LEASE", 3600.0)
    for state in ("running", "starting"):
        mark(server, "runs/dead", dead, state)
        with claim(f"{server.bucket}/runs/dead").held():
            pass
    monkeypatch.setattr(bucket_lock, "LEASE", 0.5)
    for state in ("running", "starting"):
        mark(server, "runs/dead", elsewhere(), state)
        with claim(f"{server.bucket}/runs/dead").held():
            pass
    assert server.keys("runs/dead/") == ["runs/dead/run.json"]


def test_a_lock_of_another_machine_is_kept_while_it_is_renewed(server: Server, quick: None, monkeypatch) -> None:
    monkeypatch.setattr(bucket_lock, "LEASE", 3600.0)
    owner, ended = elsewhere(), threading.Event()

    def renew() -> None:
        while not ended.is_set():
            mark(server, "runs/alive", owner)
            time.sleep(0.3)

    mark(server, "runs/alive", owner)
    other = threading.Thread(target=renew)
    other.start()
    with pytest.raises(UserError, match="on elsewhere is running it now; wait"), locked(f"{server.bucket}/runs/alive"):
        pass
    ended.set()
    other.join()
    (key,) = server.keys("runs/alive")
    assert "elsewhere" in key


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as in a terminal: tests started in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_who_lost_the_lock_of_a_bucket_stops(server: Server, quick: None, interruptible: None) -> None:
    """Paused for longer than a lease; then another process took over."""

    def work() -> None:
        with locked(f"{server.bucket}/runs/lost"):
            (key,) = server.keys("runs/lost/")
            server.client.delete_object(Bucket=BUCKET, Key=key)
            mark(server, "runs/lost", elsewhere())
            time.sleep(60)

    with pytest.raises(StorageError, match="another one has taken its work over"):
        work()
    (key,) = server.keys("runs/lost/")
    assert "elsewhere" in key


@pytest.mark.full
def test_of_two_commands_at_once_in_a_bucket_one_works(server: Server, tmp_path: Path) -> None:
    words = ["--training.rounds", "4", "--training.batch_size", "4", "--evaluation.enabled", "false"]
    words += ["--storage", f"{server.bucket}/commands", "--name", "x", "--tracking.uri", f"sqlite:///{tmp_path}/m.db"]
    environment = os.environ | server.environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "pipelines.unlearn", *words, "--tracking.system_metrics", "false"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    said = [one.communicate(timeout=600)[1] for one in both]
    assert sorted(one.returncode for one in both) == [0, 2], said
    refused = said[0 if both[0].returncode else 1]
    assert "is running it now; wait for it or stop it, or choose another --name" in refused
    assert not [key for key in server.keys("commands/x") if ".lock" in key]


@pytest.mark.full
def test_a_run_in_googles_store(tmp_path: Path) -> None:
    """From start to end with only the bucket; afterwards nothing is left of the rows to forget."""
    words = ["--training.rounds", "4", "--training.checkpoint_every", "2", "--training.batch_size", "4"]
    words += ["--evaluation.enabled", "false", "--tracking.system_metrics", "false"]
    words += ["--name", "x", "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    with gcs_server(tmp_path) as google:
        command = [sys.executable, "-m", "pipelines.unlearn", "--storage", f"{google.bucket}/runs", *words]
        environment = os.environ | google.environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        for shown in ("report  gs://bucket/runs/x/report.html", "x is already finished"):
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            assert shown in done.stdout + done.stderr
        run = ["manifest.json", "metrics.json", "mlflow.json", "report.html", "run.json", "training.json"]
        assert [key for key in google.keys("runs/x/") if "/model/" not in key] == [f"runs/x/{name}" for name in run]
        # of the retain rows and of the holdout rows
        assert len({key.split("/")[3] for key in google.keys("runs/cache/data/")}) == 2
        assert json.loads(google.read("runs/x/metrics.json"))["run"]["status"] == "finished"
        weights = json.loads(google.read("runs/x/model/manifest.json"))["files"]["model.safetensors"]
        assert weights["bytes"] == len(google.read("runs/x/model/model.safetensors"))
