"""Hypervolume of multi-objective TPE against the Sobol sequence at the same number of trials, on the built-in people.

    python benchmarks/search.py [--trials 20] [--seeds 0 1 2] [--storage FOLDER] [--out FILE]

Every sweep is a complete one (`pipelines.sweep`), without early stopping. The hypervolume is that of (objective on its
scale from 0 to 1, utility) above (0, 0), as in the sweep's report, after half of the trials and after all. A second
start resumes where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

KINDS = ("random", "multi_objective")


def configuration(kind: str, seed: int, trials: int, storage: str) -> Any:
    """One sweep: OFMU lite, eight rounds, judged on all rows without generations."""
    from ofmu_ray.config import SweepConfig, apply_overrides

    return apply_overrides(
        SweepConfig(name=f"{kind}_{seed}", storage=storage, label="ofmu_lite", lr_scale=30),
        {
            "space": {"ofmu.inner_steps": "integer(1, 4)", "ofmu.outer_steps": "integer(1, 6)"},
            "search": {"kind": kind, "trials": trials, "startup_trials": max(2, trials // 3), "seed": seed},
            "early.kind": "none",
            "early.stages": 1,
            "select": {"utility": "retain_probability", "rows": None, "max_new_tokens": 0, "utility_floor": 0.9},
            "base": {
                "training": {"engine": "torch", "rounds": 8, "batch_size": 8, "checkpoint_every": 1000},
                "evaluation": {"max_new_tokens": 8, "bootstrap_samples": 20},
                "tracking.system_metrics": False,
            },
        },
    )


def volumes(folder: Path) -> list[float]:
    """Hypervolume after the first half of the trials and after all."""
    import pyarrow.parquet as pq

    from ofmu_ray.metrics.fronts import hypervolume
    from ofmu_ray.metrics.rule import Goal

    goal = Goal("forget_quality", "retain_probability", None)
    rows = [row for row in pq.read_table(folder / "trials.parquet").to_pylist() if row["phase"] == "search"]
    points = [(goal.height(row) or 0.0, row["retain_probability"]) for row in rows if row["status"] == "finished"]
    return [hypervolume(points[: len(rows) // 2], (0.0, 0.0)), hypervolume(points, (0.0, 0.0))]


def main() -> None:
    """Run all sweeps, print one line each and the comparison, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--storage", default=None)
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    storage = options.storage or tempfile.mkdtemp(prefix="ofmu_search_")

    from ofmu_ray.search.run_sweep import sweep

    volumes_by_kind: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for seed in options.seeds:
        for kind in KINDS:
            sweep(configuration(kind, seed, options.trials, storage), sys.argv)
            volumes_by_kind[kind].append(volumes(Path(storage) / f"{kind}_{seed}"))
            print(f"hypervolume {kind} seed {seed}: {volumes_by_kind[kind][-1]}", flush=True)
    content = {
        "trials": options.trials,
        "seeds": options.seeds,
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()}",
        "hypervolume": volumes_by_kind,
        "mean": {
            kind: [statistics.mean(column) for column in zip(*rows, strict=True)]
            for kind, rows in volumes_by_kind.items()
        },
    }
    print(json.dumps(content["mean"], indent=1))
    if options.out:
        Path(options.out).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
