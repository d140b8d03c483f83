"""Files and folders appear atomically, on a disk and at a URI."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow.fs import FileSelector
from s3_server import s3_server
from safetensors.torch import save_file
from small_disk import small_disk

from ofmu_ray import storage
from ofmu_ray.data.sidecar import new_table
from ofmu_ray.errors import StorageError
from ofmu_ray.storage import local


@pytest.mark.system
def test_import_costs_neither_torch_nor_pyarrow() -> None:
    code = "import sys, ofmu_ray.storage; print([name for name in ('torch', 'pyarrow') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.json"
    storage.atomic_write(target, "one")
    storage.atomic_write(str(target), b"two")
    assert storage.read_text(f"file://{target}") == "two"
    assert os.listdir(target.parent) == ["file.json"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~local.umask()


def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    storage.atomic_write(target, "old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        storage.atomic_write(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.system
def test_a_full_disk_gives_one_sentence_and_keeps_the_old_content(tmp_path: Path) -> None:
    disk = tmp_path / "disk"

    def write(content: str) -> None:
        with storage.atomic_dir(disk / "model") as folder:
            save_file({"a": torch.zeros(len(content))}, folder / content[0])

    def table() -> None:
        with storage.explained(disk), new_table(f"{disk}/table", ["x"], np.array([1 << 20]), [], "float32", {}):
            raise AssertionError("there is no room")

    with small_disk(disk, "1m"):
        write("old")
        for fill in (lambda: write("new" * 100_000), table):
            with pytest.raises(StorageError, match=f"{disk}.* no space left: free some space"):
                fill()
            assert [path.name for path in disk.rglob("*")] == ["model", "o"]


def test_a_folder_takes_its_place_when_it_is_full(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("one", "two"):
        with storage.atomic_dir(target) as folder:
            (folder / content).write_text(content)
            assert not (target / content).exists()
        assert os.listdir(target) == [content]
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with storage.atomic_dir(target) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError):
        _fail_half_way(str(target))
    assert (target / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


LEAVES = """
import sys
from pathlib import Path
from ofmu_ray import storage

with storage.scratch() as scratch, storage.atomic_dir(Path(sys.argv[1])) as beside:
    for folder in (scratch, beside):
        (folder / "weights").write_text("of a model that knows it all")
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.mark.system
def test_what_a_killed_process_leaves_goes_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a living process uses stays, as do other files there."""
    temporary, target = tmp_path / "tmp", tmp_path / "runs/model"
    temporary.mkdir()
    others = temporary / "ofmu_results"
    others.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES, str(target)], env=os.environ | {"TMPDIR": str(temporary)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip

    def remaining() -> list[list[Path]]:
        return [sorted(set(temporary.iterdir()) - {others}), sorted(target.parent.glob(".*"))]

    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"there\n"
        assert [len(folders) for folders in remaining()] == [2, 2]
        processes[0].kill()
        processes[0].wait()
        with storage.scratch() as mine, storage.atomic_dir(target):
            folders_left = remaining()
            assert mine in folders_left[0]
            assert [len(folders) for folders in folders_left] == [2, 2]  # this one's and the living one's
        assert [len(folders) for folders in remaining()] == [1, 1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    with storage.scratch(), storage.atomic_dir(target):
        pass
    assert remaining() == [[], []]
    assert others.is_dir()


@pytest.mark.slow
def test_scratch_folders_are_made_by_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers of a node write checkpoints at the same time: none considers another's abandoned."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def use(number: int) -> bool:
        with storage.scratch() as folder:
            (folder / "file").write_text(str(number))
            return (folder / "file").read_text() == str(number)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(2000)))
    assert not list(tmp_path.iterdir())


def test_join_and_locality() -> None:
    assert storage.join("s3://bucket/runs/", "a", "b.json") == "s3://bucket/runs/a/b.json"
    assert storage.join("runs", "a") == "runs/a"
    assert storage.is_uri("gs://bucket")
    assert not storage.is_uri("file:///tmp")
    assert storage.name_of("s3://bucket/runs/a?scheme=http") == storage.name_of("runs/a/") == "a"
    with pytest.raises(ValueError, match="not a local path"):
        storage.local_path("s3://bucket/a")


def test_one_place_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / "a b%"
    for path in ("a b%", "~/a b%", "x/../a b%", str(place), place, place.as_uri()):
        assert storage.local_path(path) == place
        assert storage.absolute(path) == str(place) == storage.locate(path)[1]
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"


def test_credentials_of_a_uri_are_never_shown() -> None:
    assert storage.without_credentials("s3://key:secret@bucket/a.jsonl?access_key=k") == "s3://bucket/a.jsonl"
    assert storage.without_credentials("s3://key:sec/ret+x@bucket/a") == "s3://bucket/a"
    for plain in ("s3://bucket/a@b", "hdfs://host:8020/a@b/c"):
        assert storage.without_credentials(plain) == plain
    assert storage.join("s3://k:s@bucket/a?scheme=http", "b", "c") == "s3://k:s@bucket/a/b/c?scheme=http"


@pytest.mark.system
def test_published_leaves_nothing_half_written(tmp_path: Path) -> None:
    target = str(tmp_path / "runs" / "x")

    def fail() -> None:
        with storage.published(target, "done.json") as folder:
            storage.write_text(storage.join(folder, "part"), "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list((tmp_path / "runs").iterdir()) == []
    for _ in range(2):  # the second one finds the first in place
        with storage.published(target, "done.json") as folder:
            storage.write_text(storage.join(folder, "done.json"), "{}")
    assert [p.name for p in (tmp_path / "runs").rglob("*")] == ["x", "done.json"]
    _killed_half_way(target)
    (tmp_path / "runs/xy").mkdir()
    storage.remove_folder(target)
    assert [p.name for p in (tmp_path / "runs").rglob("*")] == ["xy"]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server.bucket


@pytest.mark.system
def test_an_object_store(bucket: str) -> None:
    run = f"{bucket}/run"
    assert not storage.is_file(f"{run}/model/done.json")
    with storage.published(f"{run}/model", "done.json") as folder:
        storage.write_text(storage.join(folder, "sub", "weights"), "123")
        storage.write_text(storage.join(folder, "done.json"), "{}")
    assert storage.read_text(f"{run}/model/done.json") == "{}"
    assert storage.read_text(f"{run}/model/sub/weights") == "123"
    with pytest.raises(RuntimeError):
        _publish_half(f"{run}/broken")
    assert not storage.is_file(f"{run}/broken/weights")
    with pytest.raises(RuntimeError):
        _fail_half_way(f"{run}/broken")
    assert not storage.is_file(f"{run}/broken/weights")
    filesystem, path = storage.locate(run)
    assert [info.base_name for info in filesystem.get_file_info(FileSelector(path))] == ["model"]
    _killed_half_way(f"{run}/model")
    storage.remove_folder(f"{run}/model")
    assert filesystem.get_file_info(FileSelector(path, recursive=True)) == []
    storage.remove_folder(f"{run}/model")  # nothing is there


def _killed_half_way(path: str) -> None:
    """SIGKILL of a process while it publishes a folder."""
    code = """
import os, signal, sys
from ofmu_ray import storage
with storage.published(sys.argv[1], "done.json") as folder:
    storage.write_text(storage.join(folder, "weights"), "half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -signal.SIGKILL


def _publish_half(path: str) -> None:
    with storage.published(path, "done.json") as folder:
        storage.write_text(storage.join(folder, "weights"), "half")
        raise RuntimeError


def _fail_half_way(path: str) -> None:
    with storage.atomic_dir(path) as folder:
        (folder / "weights").write_text("half")
        raise RuntimeError
