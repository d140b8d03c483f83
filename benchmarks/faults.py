"""Real faults at exact points of a run with two workers, for `soak.py` and `tests/test_every_phase.py`.

The run is OFMU on the built-in model under Ray Train, as `ofmu unlearn` starts it. One of its workers injects the fault
into itself (SIGKILL, an exception, a bit flipped in a checkpoint) when it reaches the point. `run` reports how many
rounds were repeated and how long that took (`recovery`); `difference` reports how far the final weights of two runs are
apart.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

import ofmu_ray.training.start as start_module
import ofmu_ray.training.worker as worker_module
from ofmu_ray.config import StopConfig, TrainingConfig, UnlearnConfig
from ofmu_ray.methods.ofmu import OFMUConfig
from ofmu_ray.training.worker_job import WorkerJob

Phase = Literal[
    "start", "share", "first_gather", "inner_loop", "displaced", "outer_step", "checkpoint_write", "shard", "export"
]
ROUNDS, EVERY = 12, 4
METHOD = OFMUConfig.from_preset("full", inner_steps=2, relative_step=1e-3)


@dataclass(frozen=True)
class Fault:
    """What rank `rank` does to itself when it first reaches the phase in a round."""

    name: str
    phase: Phase
    does: Literal["SIGKILL", "raise", "damage"] = "SIGKILL"
    """damage: flip a bit in the newest checkpoint, then SIGKILL."""
    round: int = 1
    rank: int = 1


# ------------------------------------------------------------------------------------------------- inside the workers


def faulty_loop(config: dict[str, Any]) -> None:
    """`worker_loop`, with the faults of <run>/faults.json."""
    from ray.train import get_context

    folder, rank = Path(config["job"].run_dir), get_context().get_world_rank()
    Saboteur(folder, rank).arm()
    real_loop(config)


real_loop = start_module.worker_loop


class Saboteur:
    """Injects the faults of <run>/faults.json, each once, and records when they happen and when rounds start."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank, self.round = folder, rank, 0
        faults = [Fault(**fault) for fault in json.loads((folder / "faults.json").read_text())]
        self.faults = [(number, fault) for number, fault in enumerate(faults) if fault.rank == rank]

    def at(self, phase: Phase) -> None:
        """The loop reached a phase of round `self.round`."""
        for number, fault in self.faults:
            mark = self.folder / f"fault_{number}"
            if fault.phase == phase and (phase == "start" or fault.round == self.round) and not mark.exists():
                mark.write_text(json.dumps({"at": time.time(), "round": self.round}))
                self.do(fault)

    def do(self, fault: Fault) -> None:
        if fault.does == "raise":
            raise RuntimeError("a fault")
        if fault.does == "damage":
            newest = max((self.folder / "train").glob("round_*"), key=lambda path: path.stat().st_mtime)
            shard = newest / "rank_00001.pt"
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        os.kill(os.getpid(), signal.SIGKILL)

    def begin(self, number: int) -> None:
        """Record that a round starts; its batches have arrived."""
        with (self.folder / f"rounds_{self.rank}").open("a") as log:
            log.write(json.dumps({"at": time.time(), "round": number, "first": not self.round}) + "\n")
        self.round = number

    def arm(self) -> None:
        """Insert calls of `at` into the loop, the engine, the session and the export."""
        from ofmu_ray.models.unread import UnreadWeights
        from ofmu_ray.storage import NewFolder
        from ofmu_ray.training import export
        from ofmu_ray.training.session import RaySession
        from ofmu_ray.training.worker import Worker

        before(worker_module, "build_engine", lambda *_: self.at("start"))
        build, rounds = worker_module.build_engine, Worker.round  # type: ignore[attr-defined]

        def build_engine(*arguments: Any) -> Any:
            engine = build(*arguments)
            self.watch(engine)
            return engine

        def round_(worker: Any, batches: Any) -> bool:
            self.begin(worker.state.round + 1)
            return rounds(worker, batches)

        worker_module.build_engine = build_engine  # type: ignore[attr-defined, assignment]
        Worker.round = round_  # type: ignore[method-assign, assignment]
        reads = itertools.count()

        def reads_share(*_: Any) -> None:
            if next(reads) == 3:  # some of its weights are read
                self.at("share")

        before(UnreadWeights, "read", reads_share)
        before(NewFolder, "flush", lambda *_: self.at("shard"))  # the first file of the model is written
        before(RaySession, "report", lambda *_: self.at("checkpoint_write"))
        before(export, "atomic_write", lambda *_: self.at("export"))  # the model is written, the run is not

    def watch(self, engine: Any) -> None:
        displaced = engine.displaced

        @contextmanager
        def with_fault(*arguments: Any) -> Iterator[None]:
            with displaced(*arguments):
                self.at("displaced")
                yield

        engine.displaced = with_fault
        before(engine, "gradient", lambda *_, **__: self.at("first_gather"))
        before(engine, "apply", lambda _, loop: self.at("inner_loop" if loop == "inner" else "outer_step"))


def before(owner: Any, name: str, call: Callable[..., object]) -> None:
    """Call `call` with a function's arguments before the function itself."""
    function = getattr(owner, name)

    def both(*arguments: Any, **options: Any) -> Any:
        call(*arguments, **options)
        return function(*arguments, **options)

    setattr(owner, name, both)


# --------------------------------------------------------------------------------------------------------- the driver


def make_job(folder: Path, name: str, rounds: int = ROUNDS, every: int = EVERY, **options: Any) -> WorkerJob:
    """OFMU on the built-in people with two workers at ZeRO stage 2; writes its plan.

    Nothing hangs here, and a slow machine must not look like a hang: `round_timeout` has its default.
    """
    from ofmu_ray.data.answer_encoder import AnswerEncoder
    from ofmu_ray.data.batch_plan import write_plan
    from ofmu_ray.data.prepare import prepare_streams
    from ofmu_ray.models.loading import load_tokenizer

    training = TrainingConfig(workers=2, rounds=rounds, batch_size=4, checkpoint_every=every, max_failures=100)
    config = UnlearnConfig(training=training, ofmu=METHOD)  # type: ignore[call-arg]
    data, tokenizer = config.data, load_tokenizer(config.model)
    sources = {"forget": data.forget, "retain": data.retain}
    prepared = prepare_streams(sources, None, AnswerEncoder(tokenizer, data.format), str(folder))
    run = folder / name
    job = WorkerJob(
        run_dir=str(run), plan_dir=str(run / "plan"), config_hash="faults", seed=0, model=config.model,
        method=METHOD, training=training, stop=StopConfig(), utility_rows=None,
    )  # fmt: skip
    job = replace(job, **options)
    write_plan(
        prepared.streams, job.plan_dir, batches_per_round=job.build_method().batches_per_round(), rounds=rounds,
        batch_size=training.batch_size, workers=training.workers, seed=0,
    )  # fmt: skip
    return job


def run(job: WorkerJob, faults: Sequence[Fault]) -> dict[str, Any]:
    """Train to the end despite the faults; return seconds, notes and the cost of each fault."""
    from ofmu_ray.training.launch import fit

    folder = Path(job.run_dir)
    (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    started = time.perf_counter()
    start_module.worker_loop = faulty_loop  # `fit` passes it to Ray Train
    try:
        summary = fit(job, "faults")
    finally:
        start_module.worker_loop = real_loop
    rounds_started = [json.loads(line) for line in (folder / "rounds_0").read_text().splitlines()]
    costs = []
    for number, fault in enumerate(faults):
        done = json.loads((folder / f"fault_{number}").read_text())
        lost, seconds = recovery(rounds_started, done["at"], done["round"])
        if seconds is None:  # only the export was left
            seconds = (folder / "training.json").stat().st_mtime - done["at"]
        costs.append({"fault": fault.name, "phase": fault.phase, "rounds_lost": lost, "seconds": seconds})
    return {"seconds": time.perf_counter() - started, "notes": summary["notes"], "costs": costs}


def recovery(rounds_started: Sequence[dict[str, Any]], at: float, round: int | None = None) -> tuple[int, float | None]:
    """Number of rounds that a fault at time `at` cost the run, and the seconds until it had caught up.

    `rounds_started`: {"at", "round", "first"} of each round that started, oldest first; "first" after a start or a
    rollback. `round`: the round that the fault hit; None: the last one started before the rollback. A run that was not
    rolled back lost no round; its seconds are then the longest wait for a round to start (None: no round followed).
    """
    later = [number for number, row in enumerate(rounds_started) if row["at"] > at]
    back = next((number for number in later if rounds_started[number]["first"]), None)
    if back is None:
        times = [at, *(rounds_started[number]["at"] for number in later)]
        return 0, max((after - before for before, after in pairwise(times)), default=None)
    if round is None:
        round = rounds_started[back - 1]["round"] if back else 0
    there = next((row for row in rounds_started[back:] if row["round"] >= round), rounds_started[-1])
    return max(0, round - rounds_started[back]["round"] + 1), there["at"] - at


def difference(one: WorkerJob, other: WorkerJob) -> float:
    """Largest difference of any weight between two exported models."""
    return largest_difference(*(Path(job.run_dir, "model") for job in (one, other)))


def largest_difference(one: Path, other: Path) -> float:
    """The same for two model folders."""
    a, b = (
        {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        for folder in (one, other)
    )
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
