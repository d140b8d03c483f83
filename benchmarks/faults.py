"""What a run loses to a fault, and how long it takes to go on: real kills at exact points of a run of two workers.

    python -m benchmarks.faults --out faults.json            # all faults; about half a minute each on two quiet cores
    python -m benchmarks.faults --only inner_loop hang

Each run is OFMU on the built-in model under Ray Train, as `ofmu unlearn` starts it; one of its workers does the fault
to itself (SIGKILL, SIGSTOP, a bit flipped in a checkpoint) when it reaches the point. Written down are the rounds that
had to be run again, the seconds from the fault to the next batch, and the largest difference of a final weight from
the undisturbed run. The table of docs/reliability.md is what this prints.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

import ofmu_ray.training.worker as worker_module
from ofmu_ray.config import OFMUConfig, OptimizerConfig, StopConfig, TrainingConfig, UnlearnConfig
from ofmu_ray.training.job import WorkerJob

Phase = Literal["start", "first_gather", "inner_loop", "displaced", "outer_step", "checkpoint_write", "export"]
ROUNDS, EVERY = 12, 4
AT = 7
"""The round of a fault; the last checkpoint is that of round 4."""
HANG_SECONDS = 15.0
METHOD = OFMUConfig.from_preset("full", inner_steps=2)


@dataclass(frozen=True)
class Fault:
    """What rank `rank` does to itself when it first reaches the phase of a round."""

    name: str
    phase: Phase
    does: Literal["SIGKILL", "SIGSTOP", "raise", "damage"] = "SIGKILL"
    """damage: flip a bit of the newest checkpoint, then SIGKILL."""
    round: int = AT
    rank: int = 1


FAULTS = (
    Fault("worker killed while it loads the model", "start"),
    Fault("worker killed in the first pass", "first_gather", round=1),
    Fault("worker killed in the inner loop", "inner_loop"),
    Fault("worker killed with displaced weights", "displaced"),
    Fault("worker killed before the outer step", "outer_step"),
    Fault("rank 0 killed before the outer step", "outer_step", rank=0),
    Fault("worker killed in a checkpoint's write", "checkpoint_write", round=8),
    Fault("rank 0 killed in the export", "export", round=ROUNDS, rank=0),
    Fault("worker raises an exception", "inner_loop", "raise"),
    Fault("worker stands still (SIGSTOP)", "inner_loop", "SIGSTOP"),
    Fault("newest checkpoint damaged, worker killed", "inner_loop", "damage", round=11),
)


# ------------------------------------------------------------------------------------------------- inside the workers


def faulty_loop(config: dict[str, Any]) -> None:
    """`worker_loop`, with the faults of <run>/faults.json."""
    from ray.train import get_context

    folder, rank = Path(config["job"].run_dir), get_context().get_world_rank()
    Saboteur(folder, rank).arm()
    real_loop(config)


real_loop = worker_module.worker_loop


class Saboteur:
    """Does what <run>/faults.json says, each fault once, and notes when, and where the run went on."""

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
        os.kill(os.getpid(), signal.SIGSTOP if fault.does == "SIGSTOP" else signal.SIGKILL)

    def went_on(self, done: int) -> None:
        """The first batch after this start is there."""
        with (self.folder / f"starts_{self.rank}").open("a") as log:
            log.write(json.dumps({"at": time.time(), "round": done}) + "\n")

    def arm(self) -> None:
        """Put the points of `at` into the loop, the engine, the session and the export."""
        from ofmu_ray.training import export
        from ofmu_ray.training.loop import Loop
        from ofmu_ray.training.session import RaySession

        before(worker_module, "build_engine", lambda *_: self.at("start"))
        build, rounds = worker_module.build_engine, Loop.round

        def build_engine(*arguments: Any) -> Any:
            engine = build(*arguments)
            self.watch(engine)
            return engine

        def round_(loop: Any, batches: Any) -> bool:
            if not self.round:
                self.went_on(loop.state.round)
            self.round = loop.state.round + 1
            return rounds(loop, batches)

        worker_module.build_engine = build_engine
        Loop.round = round_  # type: ignore[method-assign]
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


def before(owner: Any, name: str, call: Callable[..., None]) -> None:
    """Have `call` see the arguments of a function first."""
    function = getattr(owner, name)

    def both(*arguments: Any, **options: Any) -> Any:
        call(*arguments, **options)
        return function(*arguments, **options)

    setattr(owner, name, both)


# --------------------------------------------------------------------------------------------------------- the driver


def make_job(
    folder: Path, name: str, rounds: int = ROUNDS, every: int = EVERY, timeout: float = HANG_SECONDS, **options: Any
) -> WorkerJob:
    """OFMU on the built-in people, two workers at ZeRO stage 2, with its plan written."""
    from ofmu_ray.data.plan import write_plan
    from ofmu_ray.data.prepare import prepare_streams
    from ofmu_ray.engines.models import load_tokenizer

    training = TrainingConfig(
        workers=2, rounds=rounds, batch_size=4, checkpoint_every=every, max_failures=100, round_timeout=timeout
    )
    config = UnlearnConfig(training=training, ofmu=METHOD)
    data, tokenizer = config.data, load_tokenizer(config.model)
    sources = {"forget": data.forget, "retain": data.retain}
    prepared = prepare_streams(sources, None, data.format, tokenizer, str(folder))
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
    """Train to the end through the faults: seconds, notes, and what each fault cost."""
    from ofmu_ray.training.launch import fit

    folder = Path(job.run_dir)
    (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    worker_module.worker_loop = faulty_loop  # what `fit` gives to Ray Train
    started = time.perf_counter()
    summary = fit(job, "faults")
    starts = [json.loads(line) for line in (folder / "starts_0").read_text().splitlines()]
    costs = []
    for number, fault in enumerate(faults):
        done = json.loads((folder / f"fault_{number}").read_text())
        after = [start for start in starts if start["at"] > done["at"]]
        if after:  # a round that was begun is lost; of a run that had only its export left, none
            seconds, lost = after[0]["at"] - done["at"], max(0, done["round"] - after[0]["round"])
        else:
            seconds, lost = (folder / "training.json").stat().st_mtime - done["at"], 0
        costs.append({"fault": fault.name, "phase": fault.phase, "rounds_lost": lost, "seconds": seconds})
    return {"seconds": time.perf_counter() - started, "notes": summary["notes"], "costs": costs}


def difference(one: WorkerJob, other: WorkerJob) -> float:
    """Largest difference of a weight of two exported models."""
    a, b = (load_file(Path(job.run_dir, "model/model.safetensors")) for job in (one, other))
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def not_finite(folder: Path) -> dict[str, Any]:
    """A round that overflows: no worker ends, the run goes back and takes shorter steps."""
    steep = replace(METHOD, inner=OptimizerConfig(name="sgd", lr=1e15, clip=None))
    job = make_job(folder, "not_finite", method=steep, stop=StopConfig(shrink=1e-18))
    notes = run(job, ())["notes"]
    return {"fault": "loss not finite in round 1", "phase": "round", "rounds_lost": 1, "notes": notes}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| fault | rounds run again | seconds to the next batch | largest difference of a final weight |"]
    lines += ["|---|---|---|---|"]
    for row in rows:
        seconds, off = row.get("seconds"), row.get("difference")
        cells = [row["fault"], row["rounds_lost"], "" if seconds is None else f"{seconds:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {'(other steps)' if off is None else f'{off:g}'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="phases; default all")
    parser.add_argument("--out", type=Path, help="JSON of all measurements")
    options = parser.parse_args()
    from ofmu_ray.training.launch import connect

    torch.set_num_threads(1)
    connect(2)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed = make_job(folder, "undisturbed")
        seconds = run(undisturbed, ())["seconds"]
        for number, fault in enumerate(FAULTS):
            if options.only and fault.phase not in options.only:
                continue
            job = make_job(folder, f"run{number}")
            found = run(job, [fault])
            (cost,) = found["costs"]
            rows.append(cost | {"notes": found["notes"], "difference": difference(job, undisturbed)})
            print(json.dumps(rows[-1]), flush=True)
        if not options.only:
            rows.append(not_finite(folder))
    print(f"\nundisturbed: {seconds:.1f} s\n\n{table(rows)}")
    if options.out:
        options.out.write_text(json.dumps({"undisturbed_seconds": seconds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
