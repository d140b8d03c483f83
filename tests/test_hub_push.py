"""A push to the hub, against a local server that speaks its HTTP API: refused before the start, private by default."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import Hub, Repository
from mistakes import refused

from ofmu_ray.commandline.parse import parse
from ofmu_ray.config import ExportConfig, UnlearnConfig, outcome_hash
from ofmu_ray.errors import StorageError, UserError
from ofmu_ray.storage.hub_push import check_push, push
from pipelines import cli

pytestmark = pytest.mark.slow  # a server in the process

QUICK = ["--training.rounds", "1", "--evaluation.enabled", "false", "--ofmu.forget_level", "4"]


def model(folder: Path) -> dict[str, bytes]:
    files = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "README.md": b"---\nlicense: mit\n---\n"}
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


def test_a_push_is_private_whole_and_repeatable(hub: Hub, tmp_path: Path) -> None:
    files = model(tmp_path / "model")
    for _ in range(2):
        check_push("someone/forgetful", public=False)
        assert push(tmp_path / "model", "someone/forgetful", public=False) == f"{hub.url}/someone/forgetful"
    repository = hub.repositories["someone/forgetful"]
    assert repository.private
    assert repository.files == files
    assert [*hub.large.values()] == [files["model.safetensors"]]
    push(tmp_path / "model", "own", public=True)
    assert not hub.repositories["someone/own"].private


def test_a_public_repository_takes_a_model_only_if_asked(hub: Hub) -> None:
    hub.repositories["someone/known"] = Repository(private=False)
    for name in ("someone/known", "known"):
        with pytest.raises(UserError, match="this repository is public"):
            check_push(name, public=False)
    check_push("someone/known", public=True)


def test_a_push_that_fails_says_where_the_model_is(hub: Hub, tmp_path: Path) -> None:
    model(tmp_path / "model")
    hub.broken = True
    with pytest.raises(StorageError, match=r"it is in .*model, and the same command pushes it again"):
        push(tmp_path / "model", "someone/m", public=False)


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("someone/m", "", "there is no token for the hub; run `hf auth login` or set HF_TOKEN"),
        ("someone/m", "hf_other", "the hub refuses the token"),
    ],
)
def test_a_push_is_refused_before_the_start(
    name: str,
    token: str,
    message: str,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    refused(["unlearn", "--push-to-hub", name, "--storage", str(tmp_path / "runs")], message, capsys=capsys)
    assert not list((tmp_path / "runs").glob("*"))


def test_a_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the hub does not answer"):
        check_push("someone/m", public=False)


def test_where_a_model_is_pushed_is_no_part_of_the_outcome() -> None:
    config = parse(UnlearnConfig, ["--push-to-hub", "a/b", "--export.hub_public", "true"], "x")
    assert config.export == ExportConfig(push_to_hub="a/b", hub_public=True)
    assert parse(UnlearnConfig, ["--push-to-hub=a/b"], "x").export.push_to_hub == "a/b"
    assert outcome_hash(config) == outcome_hash(UnlearnConfig())


@pytest.mark.slow
def test_a_run_pushes_its_model_and_pushes_again_when_it_is_shown(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["unlearn", *QUICK, "--name", "r", "--storage", str(tmp_path), "--push-to-hub", "someone/m"]
    for commits in (1, 2):
        assert cli.main(words) == 0
        assert f"hub     {hub.url}/someone/m" in capsys.readouterr().err
        repository = hub.repositories["someone/m"]
        assert repository.commits == commits
    assert repository.private
    assert repository.files == {path.name: path.read_bytes() for path in (tmp_path / "r/model").iterdir()}
