"""What faults cost (docs/results/faults.csv), measured by the tests that inject them.

    FAULT_TABLE=faults.jsonl make test-all
    python tests/fault_table.py faults.jsonl docs/results/faults.csv

With FAULT_TABLE, the workers of the tests' runs also record when each round starts (`watched`), which gives the cost of
a fault. Without it, the tests measure and record nothing, and runs are as a user starts them.
"""

from __future__ import annotations

import csv
import importlib.abc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

PHASES = (
    "tokenising",
    "start",
    "share",
    "first gather",
    "inner loop",
    "displaced",
    "outer step",
    "any round",
    "checkpoint write",
    "shard",
    "export",
    "evaluation",
)
"""In the order of a run, which is the order of the table."""
TABLE, ROUNDS = "FAULT_TABLE", "FAULT_ROUNDS"
WORKER = "ofmu_ray.training.worker"


def record(
    fault: str,
    *,
    phase: str,
    lost: int | None = None,
    unit: str = "round",
    seconds: float | None = None,
    difference: float | None = None,
    models: tuple[Path, Path] | None = None,
    at: float | None = None,
    rounds: Sequence[Path] = (),
) -> None:
    """One row.

    `lost`: how many `unit` had to be repeated; `seconds`: how long that took; `difference`: largest difference of a
    final weight (or of a value) from the undisturbed run. Instead of these: `at` (time.time() of the fault), the files
    of `watched` with the run's rounds, and the folders of the two models.
    """
    if TABLE not in os.environ:
        return
    from benchmarks.faults import largest_difference, recovery

    assert phase in PHASES, phase
    if at is not None:
        lines = [line for path in rounds if path.exists() for line in path.read_text().splitlines()]
        lost, seconds = recovery([json.loads(line) for line in lines], at)
    if models is not None:
        difference = largest_difference(*models)
    row = {"fault": fault, "phase": phase, "lost": lost, "unit": unit, "seconds": seconds, "difference": difference}
    with open(os.environ[TABLE], "a") as file:
        file.write(json.dumps(row) + "\n")


# ------------------------------------------------------------------------------------------- when the rounds started


def watched(folder: Path) -> dict[str, str]:
    """Variables that make a run's workers record in <folder>/<name of the run>.rounds when rounds start."""
    if TABLE not in os.environ:
        return {}
    paths = [str(Path(__file__).resolve().parent / "recording"), os.environ.get("PYTHONPATH", "")]
    return {ROUNDS: str(folder), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def noting(round_: Callable[[Any, Any], bool], folder: Path) -> Callable[[Any, Any], bool]:
    """`Loop.round` that first records on rank 0 that the round starts; "first": after a start or a rollback."""

    def noted(loop: Any, batches: Any) -> bool:
        number = loop.state.round + 1
        if loop.session.rank == 0:
            first = number <= getattr(loop, "noted", number)
            loop.noted = number
            with (folder / f"{loop.job.run_dir.rstrip('/').rpartition('/')[2]}.rounds").open("a") as file:
                file.write(json.dumps({"at": time.time(), "round": number, "first": first}) + "\n")
        return round_(loop, batches)

    return noted


def note_rounds_of_runs() -> None:
    """Make this process record them, should it become one that trains."""
    if ROUNDS in os.environ:
        sys.meta_path.insert(0, _WorkerFinder())


class _WorkerFinder(importlib.abc.MetaPathFinder):
    """Changes `Worker` when its module is imported, not before."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != WORKER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            module.Worker.round = noting(module.Worker.round, Path(os.environ[ROUNDS]))

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


# ---------------------------------------------------------------------------------------------------------- the table


def merged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows ordered by phase, then fault; several rows of one fault in one phase become one with the worst values."""
    worst: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        key = PHASES.index(row["phase"]), row["fault"]
        old = worst.setdefault(key, dict(row))
        for name in ("lost", "seconds", "difference"):
            values = [value for value in (old[name], row[name]) if value is not None]
            old[name] = max(values, default=None)
    return [worst[key] for key in sorted(worst)]


def table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The lines of the CSV file, the names of its columns first."""
    lines: list[tuple[str, ...]] = [
        ("fault", "phase", "done again", "seconds to recover", "largest difference at the end")
    ]
    for row in merged(rows):
        lost = f"{row['lost']} {row['unit']}" + ("" if row["lost"] == 1 else "s")
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        difference = "" if row["difference"] is None else f"{row['difference']:.2g}"
        lines.append((row["fault"], row["phase"], lost, seconds, difference))
    return lines


def main() -> None:
    rows, out = Path(sys.argv[1]), Path(sys.argv[2])
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(table([json.loads(line) for line in rows.read_text().splitlines()]))


if __name__ == "__main__":
    main()
