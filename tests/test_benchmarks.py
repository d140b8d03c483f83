"""The shipped benchmarks run and report a round's cost in gradient passes (seconds are not tested)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.full
def test_step_counts_passes(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    command = [sys.executable, str(ROOT / "benchmarks/step.py"), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    workloads = json.loads(out.read_text())["workloads"]
    assert [workload["engine"] for workload in workloads] == ["torch", "deepspeed"]
    for workload in workloads:
        rows = workload["methods"]
        passes = {name: (row["forget_passes"], row["retain_passes"]) for name, row in rows.items()}
        assert passes == {
            "gradient ascent": (6, 0),
            "GradDiff": (6, 6),
            "OFMU full": (14, 14),
            "OFMU lite": (7, 3),
            "OFMU first_order": (3, 3),
        }
        assert all(row["updates"] == 6 for row in rows.values())
        assert rows["OFMU full"]["passes_per_update"] <= 4.8
        assert rows["OFMU lite"]["passes_per_update"] <= 1.7
        assert rows["OFMU first_order"]["passes_per_update"] == 1.0
    assert "OFMU lite" in done.stdout
