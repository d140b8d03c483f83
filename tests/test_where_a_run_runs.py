"""One worker needs no Ray, and a run keeps to what its checkpoints were written by."""

import json
from pathlib import Path

import pytest

from ofmu_ray.config import TrainingConfig
from ofmu_ray.errors import UserError
from ofmu_ray.progress import Listener, listening
from ofmu_ray.runs import preflight
from ofmu_ray.runs.claims import RECORD
from ofmu_ray.runs.preflight import check_machine, engine_of, needs_no_ray
from ofmu_ray.training.checkpoint_list import RAY_TRAIN_LIST

ONE, TWO = TrainingConfig(), TrainingConfig(workers=2)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


class Notes(Listener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, topic: str, text: str) -> None:
        self.texts.append(text)


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


@pytest.mark.parametrize(
    ("begun", "now", "engine"),
    [
        ({"engine": "auto", "workers": 1}, ONE, "torch"),  # a submitted job
        ({"engine": "auto", "workers": 2}, ONE, "deepspeed"),
        ({"engine": "auto", "workers": 2}, TWO, "deepspeed"),
        ({"engine": "auto", "workers": 1, "offload": "optimizer"}, ONE, "deepspeed"),
        ({"engine": "deepspeed"}, ONE, "deepspeed"),  # before there was `auto`
    ],
)
def test_a_run_of_ray_train_keeps_its_engine(begun: dict, now: TrainingConfig, engine: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / RAY_TRAIN_LIST).write_text("{}")
    record = {"config_hash": "x", "command": "unlearn", "options": {"training": begun}}
    (tmp_path / RECORD).write_text(json.dumps(record))
    assert engine_of(now, str(tmp_path)) == engine


def test_what_one_worker_started_is_not_begun_again_elsewhere(tmp_path: Path) -> None:
    """Ray Train does not see these checkpoints and would start from round 0."""
    (tmp_path / "train" / "000000_round_000006").mkdir(parents=True)
    assert needs_no_ray(ONE, str(tmp_path))
    with pytest.raises(UserError, match=r"started by one worker without Ray: resume it with --training\.workers 1"):
        needs_no_ray(TWO, str(tmp_path))


@pytest.mark.parametrize(
    ("workers", "there", "used", "said"),
    [
        (1, 0, 0.0, None),
        (1, 1, 1.0, "1 of 1 GPUs"),
        (1, 8, 1.0, "1 of 8 GPUs; --training.workers 8 uses all"),
        (2, 2, 1.0, "2 of 2 GPUs"),
        (2, 1, 0.0, "1 GPUs for training.workers = 2: the run uses CPUs; --training.workers 1 uses the GPUs"),
    ],
)
def test_gpus_are_used_where_every_worker_gets_one(
    workers: int, there: int, used: float, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine has none, so their count is the test's."""
    monkeypatch.setattr(preflight, "_gpus_here", lambda: there)
    with listening(notes := Notes()):
        assert check_machine(TrainingConfig(workers=workers)).gpus == used
    assert notes.texts == ([said] if said else [])
    assert check_machine(TrainingConfig(workers=workers, gpus_per_worker=0)).gpus == 0


@pytest.mark.parametrize(("visible", "said"), [(None, True), ("0", True), ("", False), ("-1", False)])
def test_gpus_that_torch_does_not_find_are_a_note(
    visible: str | None, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(preflight, "GPU_FILES", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)  # a build for CPUs
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with listening(notes := Notes()):
        assert check_machine(ONE).gpus == 0
        assert check_machine(TrainingConfig(gpus_per_worker=0)).gpus == 0
    found = f"torch finds none, although there is {tmp_path}/nvidia0: the run uses CPUs; install a build of torch"
    assert [text.startswith(found) for text in notes.texts] == [True] * said


def test_workers_do_not_share_a_gpu() -> None:
    assert TrainingConfig(gpus_per_worker=0.5).gpus == 0.5
    with pytest.raises(UserError, match="NCCL does not let workers share a GPU"):
        TrainingConfig(workers=2, gpus_per_worker=0.5)
    with pytest.raises(UserError, match=r"training\.gpus_per_worker"):
        TrainingConfig(gpus_per_worker=-1)
