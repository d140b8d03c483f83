"""The evaluation benchmark runs, and its plain evaluation agrees with ours (never what either costs)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.full
def test_ours_and_the_plain_evaluation_agree(tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks/evaluation.py"),
        "--rows",
        "4",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    [found] = json.loads(out.read_text())
    assert found["rows"] == dict.fromkeys(("forget", "retain", "real_authors", "world_facts"), 4)
    assert found["worst_difference"] < 1e-4
    assert found["reference_attack"]
    assert found["reference_seconds"] > 0
    assert found["generated_tokens"] > 0
    assert found["gflop"] > 0
    assert set(found["where"]) == {"trees", "decoding", "scores of logits", "ROUGE", "tokenising"}
    assert 0.2 < sum(found["where"].values()) <= 1
    assert "times faster" in done.stdout
