"""One worker needs no Ray, and a run keeps to what its checkpoints were written by."""

from pathlib import Path

import pytest

from ofmu_ray.config import TrainingConfig
from ofmu_ray.errors import UserError
from ofmu_ray.runs.preflight import engine_of, needs_no_ray
from ofmu_ray.training.checkpoint_list import RAY_TRAIN_LIST

ONE, TWO = TrainingConfig(), TrainingConfig(workers=2)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def test_one_worker_needs_no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(tmp_path)
    assert needs_no_ray(ONE, home)
    assert not needs_no_ray(TWO, home)
    assert not needs_no_ray(TrainingConfig(engine="deepspeed"), home)
    assert not needs_no_ray(TrainingConfig(offload="optimizer"), home)
    assert not needs_no_ray(ONE, "s3://bucket/runs/x")
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "x")
            assert not needs_no_ray(ONE, home)


def test_what_ray_train_started_goes_on_there(tmp_path: Path) -> None:
    assert engine_of(ONE, str(tmp_path)) == "torch"
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / RAY_TRAIN_LIST).write_text("{}")
    assert engine_of(ONE, str(tmp_path)) == "deepspeed"
    assert not needs_no_ray(ONE, str(tmp_path))


def test_what_one_worker_started_is_not_begun_again_elsewhere(tmp_path: Path) -> None:
    """Ray Train does not see these checkpoints and would start from round 0."""
    (tmp_path / "train" / "000000_round_000006").mkdir(parents=True)
    assert needs_no_ray(ONE, str(tmp_path))
    with pytest.raises(UserError, match=r"started by one worker without Ray: resume it with --training\.workers 1"):
        needs_no_ray(TWO, str(tmp_path))
