"""Memory and time of preparing and planning a run, by the number of rows to keep.

    OMP_NUM_THREADS=1 python benchmarks/rows.py [--rows 100000 1000000] [--cpus 2] [--out benchmarks/rows.json]

Generated questions and answers in JSON Lines: 1000 rows to forget, the others to keep, one of a thousand of them twice.
Each size has a driver of its own; Ray's tasks read and encode. Memory is what the driver adds (VmHWM) to what it has
once Ray is up. Seconds: `check` before a start (the file is read once for its digest), `prepare`, and `plan` of 120
rounds of 3 batches of 8 rows to forget and 8 to keep.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 2**20
FORGET = 1000


def peak() -> int:
    """VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def write_rows(path: Path, first: int, count: int) -> None:
    """`count` rows from number `first` on; the last thousandth repeats the first rows."""
    repeated = count // 1000
    with path.open("w") as file:
        for number in range(count):
            person = first + (number if number < count - repeated else number - count + repeated)
            row = {
                "question": f"Where does person {person} of the register live, and since when?",
                "answer": f"In house {person * 7919 % 99991} of street {person % 977}, since {1900 + person % 120}.",
            }
            file.write(json.dumps(row) + "\n")


def measure(rows: int, cpus: int, folder: Path) -> dict[str, Any]:
    """One size, in this process."""
    from ofmu_ray.cluster.connect import connect
    from ofmu_ray.config import DataConfig, ModelConfig, SourceConfig
    from ofmu_ray.data.batch_plan import write_plan
    from ofmu_ray.data.prepare import prepare_streams
    from ofmu_ray.models.loading import load_tokenizer
    from ofmu_ray.runs.preflight import check_sources
    from ofmu_ray.tasks import task_named

    named = {"forget": folder / "forget.jsonl", "retain": folder / "retain.jsonl"}
    sources = {name: SourceConfig(path=str(path)) for name, path in named.items()}
    data = DataConfig(forget=sources["forget"], retain=sources["retain"])
    encoder = task_named("causal_lm").encoder(load_tokenizer(ModelConfig()), data)
    connect(cpus)
    before, seconds = peak(), {}

    def timed(name: str, started: float) -> None:
        seconds[name] = round(time.perf_counter() - started, 1)

    started = time.perf_counter()
    check_sources(data)
    timed("check", started)
    started = time.perf_counter()
    prepared = prepare_streams(data.sources, None, encoder, str(folder / "runs"))
    timed("prepare", started)
    prepared_peak = peak()
    started = time.perf_counter()
    batches = {"forget": 3, "retain": 8}
    plan = write_plan(
        prepared.streams,
        str(folder / "plan"),
        batches_per_round=batches,
        rounds=120,
        batch_size=8,
        workers=2,
        seed=0,
    )
    timed("plan", started)
    retain = prepared.report.streams["retain"]
    return {
        "rows": rows,
        "file_mib": round(named["retain"].stat().st_size / MIB, 1),
        "parts": len(prepared.streams["retain"].parts),
        "duplicates": retain.normalised_duplicates,
        "planned": plan.total_rows,
        "before_mib": round(before / MIB),
        "prepare_mib": round((prepared_peak - before) / MIB, 1),
        "plan_mib": round((peak() - before) / MIB, 1),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--out", help="add the results to this file (JSON), in place of those of the same sizes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.rows[0], options.cpus, Path(options.one))))
        return
    results = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / "forget.jsonl", 0, FORGET)
            write_rows(Path(folder) / "retain.jsonl", FORGET, rows - FORGET)
            command = [sys.executable, __file__, "--one", folder, "--rows", str(rows), "--cpus", str(options.cpus)]
            cache = os.environ | {"XDG_CACHE_HOME": folder}
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=cache).stdout
            results.append(json.loads(printed.splitlines()[-1]))
            print(json.dumps(results[-1]), flush=True)
    if options.out:
        out = Path(options.out)
        known = {result["rows"]: result for result in (json.loads(out.read_text()) if out.exists() else [])}
        known |= {result["rows"]: result for result in results}
        out.write_text(json.dumps([known[rows] for rows in sorted(known)], indent=1) + "\n")


if __name__ == "__main__":
    main()
