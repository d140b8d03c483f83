"""A small OFMU job on the built-in model, laid out as by `ofmu unlearn`, on random tokens, without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ofmu_ray.config import ModelConfig, StopConfig, TrainingConfig
from ofmu_ray.data.batch_plan import write_plan
from ofmu_ray.data.stored_stream import TokenisedStream
from ofmu_ray.methods.ofmu import OFMUConfig
from ofmu_ray.training.worker_job import WorkerJob

ROUNDS = 8
METHOD = OFMUConfig.from_preset("lite", inner_steps=2, relative_step=1e-3, rho=1e-7)
"""A penalty so small that the run makes no note of it."""

ROWS = {"forget": 9, "retain": 14}


def stream(folder: Path, name: str) -> TokenisedStream:
    """Rows of 6 to 20 random tokens in one Parquet file."""
    rng = np.random.default_rng(len(name))
    lengths = rng.integers(6, 21, size=ROWS[name]).astype(np.int32)
    rows = {
        "row_id": [f"{name}/{i}" for i in range(len(lengths))],
        "input_ids": [rng.integers(5, 200, size=n).astype(np.int32) for n in lengths],
        "prompt_tokens": rng.integers(1, 5, size=len(lengths)).astype(np.int32),
        "length": lengths,
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), folder / "part.parquet")
    none = np.empty(0, dtype=np.int64)
    parts = (("part.parquet", len(lengths)),)
    return TokenisedStream(name, str(folder), parts, none, int(lengths.sum()), int(lengths.max()), name)


def make_job(
    folder: Path,
    *,
    training: TrainingConfig | None = None,
    stop: StopConfig | None = None,
    method: OFMUConfig = METHOD,
    name: str = "run",
) -> WorkerJob:
    """The job with its batch plan written; `folder` also keeps the tokens."""
    training = training or TrainingConfig(
        engine="torch", rounds=ROUNDS, batch_size=4, checkpoint_every=2, keep_checkpoints=3
    )
    model = ModelConfig()
    job = WorkerJob(
        run_dir=str(folder / name),
        plan_dir=str(folder / name / "plan"),
        config_hash=name,
        seed=0,
        model=model,
        method=method,
        training=training,
        stop=stop or StopConfig(),
        utility_rows=None,
    )
    write_plan(
        {name: stream(folder / name, name) for name in ROWS},
        job.plan_dir,
        batches_per_round=job.build_method().batches_per_round(),
        rounds=training.rounds,
        batch_size=training.batch_size,
        workers=training.workers,
        seed=0,
        here=True,
    )
    return job
