"""The benchmark of methods runs, compares like with like, and both steps give the same losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.full
def test_methods_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "methods.json"
    command = [sys.executable, "-m", "benchmarks.methods", "--smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]  # it asserts that plain and ours have the same losses
    (workload,) = json.loads(out.read_text())["workloads"]
    assert list(workload["cpu_seconds"]) == [
        "plain",
        "without resident reference",
        "and cross entropy once",
        "and head at answers only",
        "and sorted",
        "ours",
    ]
    assert workload["padding"]["sorted"] < workload["padding"]["unsorted"]
    assert "plain / ours" in done.stdout
