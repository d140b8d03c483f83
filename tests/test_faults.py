"""Faults that a run survives: damaged checkpoints, non-finite rounds, and what it reports about them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fault_table
import pytest
import torch
from engine_ranks import run_ranks
from fault_job import METHOD, ROUNDS, make_job
from fault_ranks import Part, start

from ofmu_ray.cluster.watchdog import WAITING, Heartbeat, verdict
from ofmu_ray.config import OptimizerConfig, StopConfig
from ofmu_ray.data.batch_plan import read_plan
from ofmu_ray.data.batches import local_rounds
from ofmu_ray.errors import UserError
from ofmu_ray.storage.checksums import fingerprint
from ofmu_ray.training.session import LocalSession
from ofmu_ray.training.start import run_local
from ofmu_ray.training.worker import Worker
from ofmu_ray.training.worker_job import WorkerJob

pytestmark = pytest.mark.slow

FIRST = 5
"""Rounds before the interruption; checkpoints exist for 0, 2 and 4."""


def interrupted(job: WorkerJob, after: int) -> None:
    """Run some rounds and end like a killed process: nothing is saved or cleaned up."""
    plan = read_plan(job.plan_dir)

    def source(start: int, options: dict[str, Any]) -> Iterator[Any]:
        for number, batches in enumerate(local_rounds(plan, 0, start_round=start, **options)):
            if number == after:
                raise KeyboardInterrupt
            yield batches

    with pytest.raises(KeyboardInterrupt):
        Worker(job, LocalSession(job.run_dir, job.training.keep_checkpoints)).run(source)


def checkpoints(job: WorkerJob) -> list[Path]:
    return sorted(path for path in Path(job.run_dir, "train").iterdir() if path.is_dir())


def weights(worker: Worker) -> list[torch.Tensor]:
    return worker.engine.weights()


def same(a: Worker, b: Worker) -> bool:
    return all(map(torch.equal, weights(a), weights(b)))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> WorkerJob:
    job = make_job(tmp_path_factory.mktemp("killed"))
    interrupted(job, FIRST)
    assert [path.name[7:] for path in checkpoints(job)] == ["round_000000", "round_000002", "round_000004"]
    return job


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return run_local(make_job(tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture
def job(killed: WorkerJob, tmp_path: Path) -> WorkerJob:
    """A copy of the killed run."""
    shutil.copytree(killed.run_dir, tmp_path / "run")
    return make_job(tmp_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "rank_00000.pt does not match its checksum": lambda folder: flip(folder / "rank_00000.pt"),
    "state.json does not match its checksum": lambda folder: flip(folder / "state.json"),
    "rank_00000.pt has 1000 bytes": lambda folder: os.truncate(folder / "rank_00000.pt", 1000),
    "rank_00000.pt is missing": lambda folder: (folder / "rank_00000.pt").unlink(),
    "no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json is not readable": lambda folder: os.truncate(folder / "manifest.json", 30),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(words: str, job: WorkerJob, undisturbed: Worker) -> None:
    DAMAGE[words](checkpoints(job)[-1])
    worker = run_local(job)
    assert same(worker, undisturbed)
    (note,) = worker.state.notes
    assert "000002_round_000004 was skipped" in note
    assert words in note
    assert note.endswith("resumed from round 2")
    assert [row["round"] for row in worker.state.series] == list(range(1, ROUNDS + 1))
    assert worker.engine.account == undisturbed.engine.account


def test_without_a_complete_checkpoint_the_run_starts_over(job: WorkerJob, undisturbed: Worker) -> None:
    for folder in checkpoints(job):
        flip(folder / "rank_00000.pt")
    worker = run_local(job)
    assert same(worker, undisturbed)
    assert len(worker.state.notes) == 3
    assert all(note.endswith("started over") for note in worker.state.notes)


class Malicious:
    """What an attacker with access to the storage would put there."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(zipped: bool, job: WorkerJob, tmp_path: Path) -> None:
    """A pickle that would run code, with a matching manifest."""
    folder, mark = checkpoints(job)[-1], tmp_path / "executed"
    torch.save(Malicious(mark), folder / "rank_00000.pt", _use_new_zipfile_serialization=zipped)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["rank_00000.pt"] = fingerprint(folder / "rank_00000.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"rank_00000\.pt contains more than tensors"):
        run_local(job)
    assert not mark.exists()
    torch.load(folder / "rank_00000.pt", weights_only=False)
    assert mark.exists()  # it would have


SHRINK = 1e-18
EXPLODING = replace(METHOD, inner=OptimizerConfig(name="sgd", lr=1e15, clip=None))
"""An inner step that overflows in round 1, but not at `SHRINK` times its length."""


def test_a_round_that_is_not_finite_is_tried_again_with_shorter_steps(
    tmp_path: Path, undisturbed: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "round", fault_table.noting(Worker.round, tmp_path))
    worker = run_local(make_job(tmp_path, stop=StopConfig(shrink=SHRINK), method=EXPLODING))
    state = worker.state
    assert (state.status, state.round, state.rollbacks, state.thrown_away) == ("finished", ROUNDS, 1, 1)
    assert [row["inner_lr"] for row in state.series] == [pytest.approx(1e-3)] * ROUNDS
    (note,) = state.notes
    assert "not finite in round 1" in note
    assert "back to round 0, learning rates x 1e-18" in note
    # the round that was thrown away stays in the cost
    passes, eight = worker.engine.account.gradient_passes, undisturbed.engine.account.gradient_passes
    assert passes == {kind: count * (ROUNDS + 1) // ROUNDS for kind, count in eight.items()}
    inner, outer = (replace(config, lr=config.rate * SHRINK) for config in EXPLODING.optimizers)
    assert same(worker, run_local(make_job(tmp_path, name="short", method=replace(METHOD, inner=inner, outer=outer))))
    rounds = tmp_path / "run.rounds"
    at = json.loads(rounds.read_text().splitlines()[0])["at"]  # round 1
    fault_table.record("a loss is not finite (without Ray)", phase="any round", at=at, rounds=[rounds], difference=0.0)


def test_rollbacks_are_counted_and_then_the_last_good_model_is_kept(tmp_path: Path) -> None:
    worker = run_local(make_job(tmp_path, stop=StopConfig(shrink=0.5, max_rollbacks=1), method=EXPLODING))
    assert (worker.state.status, worker.state.round, worker.state.rollbacks) == ("non_finite", 0, 1)
    assert "the model is from round 0" in worker.state.message
    assert len(worker.state.notes) == 1


def test_a_kill_does_not_forget_a_rollback(tmp_path: Path) -> None:
    whole, killed = (
        make_job(tmp_path, name=name, stop=StopConfig(shrink=SHRINK), method=EXPLODING) for name in ("whole", "killed")
    )
    interrupted(killed, 3)
    resumed, undisturbed = run_local(killed), run_local(whole)
    assert same(resumed, undisturbed)
    assert resumed.state.notes == undisturbed.state.notes
    assert resumed.engine.account == undisturbed.engine.account


@pytest.mark.parametrize(
    ("signs", "words"),
    [
        ({0: (98.0, WAITING), 1: (60.0, WAITING)}, "rank 1 hung in round 7: no sign of life"),
        ({0: (98.0, WAITING), 1: (99.0, "batches.read_file")}, "rank 1 hung in round 7: still in batches.read_file"),
        ({0: (98.0, WAITING), 1: (99.0, WAITING)}, "round 7 hung: all ranks wait for each other"),
        ({0: (40.0, "a.b"), 1: (99.0, WAITING), 2: (41.0, WAITING)}, "ranks 0, 2 hung in round 7: no sign of life"),
    ],
)
def test_heartbeats_show_who_hung(signs: dict[int, tuple[float, str]], words: str) -> None:
    """Heartbeats every 5 s, checked in second 100."""
    assert verdict({rank: Heartbeat(*sign) for rank, sign in signs.items()}, 100.0, 5.0, "round 7") == words


STAGES = (0, 1, 2, 3)
OTHERS = {"fewer": "one worker goes on instead of two", "more": "two workers go on instead of one"}
TOLERANCE = 1e-4
"""Of the distance from the first to the last weights: ranks and shards change the order of fp32 sums."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Killed runs of two ranks and of one, resumed with the same or another number: results by part."""
    folder = tmp_path_factory.mktemp("ranks")

    def part(stage: int, name: str, **options: bool) -> Part:
        return Part(stage, str(folder / f"{name}{stage}"), **options)

    starts = [
        (
            2,
            [
                *(part(stage, "fewer", interrupt=True) for stage in STAGES),
                *(part(s, "same", interrupt=True) for s in (0, 2)),
            ],
        ),
        (1, [*(part(stage, "fewer") for stage in STAGES), *(part(stage, "more", interrupt=True) for stage in STAGES)]),
        (
            2,
            [
                *(part(stage, "more") for stage in STAGES),
                part(0, "same"),
                part(2, "same", damage=True),
                part(2, "undisturbed"),
            ],
        ),
    ]
    by_part: dict[str, dict[str, Any]] = {}
    for number, (world, parts) in enumerate(starts):
        (folder / str(number)).mkdir()
        measured = run_ranks(world, parts, folder / str(number), start)
        by_part |= {Path(name).name: values for name, values in measured.items()}
    return by_part


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in b)) ** 0.5


def largest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in b)


@pytest.mark.system
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["fewer", "more"])
def test_a_run_resumes_with_another_number_of_workers(name: str, stage: int, ranks: dict[str, dict[str, Any]]) -> None:
    """2 -> 1 and 1 -> 2 workers: weights and both optimisers' moments are resharded."""
    resumed, whole = ranks[f"{name}{stage}-whole"], ranks["undisturbed2-whole"]
    before = ranks[f"{name}{stage}-begun"]
    assert (resumed["first"], resumed["notes"]) == (4, [])
    moved = distance(before["weights"], whole["weights"])
    assert distance(resumed["weights"], whole["weights"]) <= TOLERANCE * moved
    fault_table.record(
        f"killed, {OTHERS[name]} (without Ray, worst of ZeRO stages 0 to 3)", phase="any round",
        lost=len(before["series"]) - resumed["first"], difference=largest(resumed["weights"], whole["weights"]),
    )  # fmt: skip
    assert [row["round"] for row in resumed["series"]] == list(range(1, ROUNDS + 1))
    assert resumed["account"] == whole["account"]


@pytest.mark.system
def test_ranks_that_have_the_same_write_it_once(ranks: dict[str, dict[str, Any]]) -> None:
    """At stage 0; both of the ranks that go on read it."""
    before, resumed, whole = ranks["same0-begun"], ranks["same0-whole"], ranks["undisturbed2-whole"]
    first, other = before["bytes"]
    assert other < 4096 < first / 4
    assert min(ranks["same2-begun"]["bytes"]) > first / 4
    assert (resumed["first"], resumed["notes"], resumed["agreed"]) == (4, [], True)
    moved = distance(before["weights"], whole["weights"])
    assert distance(resumed["weights"], whole["weights"]) <= TOLERANCE * moved


@pytest.mark.system
def test_ranks_agree_on_what_they_pass_over(ranks: dict[str, dict[str, Any]]) -> None:
    """A bit in rank 1's shard is flipped: both ranks go back and end with exactly an undisturbed run's weights."""
    resumed, whole = ranks["same2-whole"], ranks["undisturbed2-whole"]
    assert resumed["agreed"]
    assert resumed["first"] == 2
    (note,) = resumed["notes"]
    assert "round_000004 was skipped: rank_00001.pt does not match its checksum" in note
    assert distance(resumed["weights"], whole["weights"]) == 0
