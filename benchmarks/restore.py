"""Continue a benchmark whose run folder is gone: its tuning trials come from the committed table.

    python -m benchmarks.restore docs/results/benchmark_forget10/trials.csv --config benchmark_tofu ...

What follows the table is for `ofmu benchmark`. A tuning trial of the table counts as done if the benchmark draws the
same options for that method, split and number; other trials run. So do the reported runs, as the paired tests need
their values per row, which are not in the table. Rebuild the models first, from the same configurations and seeds:
where a reported run gives the table's numbers again, they are the same.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ofmu_ray.runs import pool
from ofmu_ray.runs.trial import Trial, write_result

COUNTS = ("forget_passes", "retain_passes", "updates", "tokens", "flops", "peak_memory_bytes")
SECONDS = ("train_seconds", "total_seconds")
ENDS = ("_low", "_high")

Key = tuple[str, str, int]


def known_results(path: Path) -> dict[Key, dict[str, Any]]:
    """(method, split, number) -> the result of a tuning trial as `run_trial` returns it.

    Raises:
        SystemExit: there is no such file, or it does not have the columns of trials.csv.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from None
    if not rows or not {"method", "split", "phase", "trial", "options", *COUNTS, *SECONDS} <= set(rows[0]):
        raise SystemExit(f"{path}: not a trials.csv of a benchmark's report")
    return {(row["method"], row["split"], int(row["trial"])): _result(row) for row in rows if row["phase"] == "tune"}


def _result(row: dict[str, str]) -> dict[str, Any]:
    result: dict[str, Any] = {"status": row["status"], "message": row["message"], "options": json.loads(row["options"])}
    result |= {name: json.loads(row[name]) for name in (*COUNTS, *SECONDS) if row[name]}
    names = [name.removesuffix("_low") for name in row if name.endswith("_low")]
    figures = {name: _value(row, name) for name in names if row[name]}
    return result | ({"figures": figures} if figures else {})


def _value(row: dict[str, str], name: str) -> dict[str, float | None]:
    ends = {end.removeprefix("_"): float(row[name + end]) if row[name + end] else None for end in ENDS}
    return {"value": float(row[name]), **ends}


class RestoredPool(pool.Pool):
    """A pool that takes tuning trials from the table."""

    known: dict[Key, dict[str, Any]] = {}  # noqa: RUF012  one table a process

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]:
        """(trial, result): those of the table first."""
        left = []
        for trial in trials:
            found = self.known.get((trial.method, trial.split, trial.trial)) if trial.phase == "tune" else None
            if found is None or found["options"] != dict(trial.options):
                left.append(trial)
            else:
                yield trial, write_result(trial, self.data[trial.split], found)
        yield from super().run(left)


def main() -> None:
    """Run the benchmark."""
    from ofmu_ray.search import run_benchmark
    from pipelines.benchmark import main as benchmark

    if len(sys.argv) < 2:
        raise SystemExit("give the table first: python -m benchmarks.restore TRIALS.CSV, then ofmu benchmark's options")
    RestoredPool.known = known_results(Path(sys.argv[1]))
    setattr(run_benchmark, "Pool", RestoredPool)  # noqa: B010  not a name that it exports
    raise SystemExit(benchmark(sys.argv[2:]))


if __name__ == "__main__":
    main()
