"""Files and folders appear whole or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ofmu_ray import storage


def test_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.json"
    storage.atomic_write(target, "one")
    storage.atomic_write(str(target), b"two")
    assert storage.read_bytes(f"file://{target}") == b"two"
    assert os.listdir(target.parent) == ["file.json"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~storage._umask()


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


def test_join_and_locality() -> None:
    assert storage.join("s3://bucket/runs/", "a", "b.json") == "s3://bucket/runs/a/b.json"
    assert storage.join("runs", "a") == "runs/a"
    assert storage.is_uri("gs://bucket")
    assert not storage.is_uri("file:///tmp")
    with pytest.raises(ValueError, match="not a local path"):
        storage.local_path("s3://bucket/a")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server on loopback with one bucket; the URI names the endpoint as pyarrow takes it."""
    boto3 = pytest.importorskip("boto3", reason="boto3 is in the dev extra")
    server_module = pytest.importorskip("moto.server", reason="moto[server] is in the dev extra")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    server.stop()


def test_an_object_store(bucket: str) -> None:
    assert not storage.exists(f"{bucket}/run/metrics.json")
    storage.atomic_write(f"{bucket}/run/metrics.json", "{}")
    assert storage.read_bytes(f"{bucket}/run/metrics.json") == b"{}"
    with storage.atomic_dir(f"{bucket}/run/model") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_bytes(b"123")
    assert storage.read_bytes(f"{bucket}/run/model/sub/weights") == b"123"
    with pytest.raises(RuntimeError):
        _fail_half_way(f"{bucket}/run/broken")
    assert not storage.exists(f"{bucket}/run/broken/weights")


def _fail_half_way(path: str) -> None:
    with storage.atomic_dir(path) as folder:
        (folder / "weights").write_text("half")
        raise RuntimeError
