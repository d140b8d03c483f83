"""The evaluation benchmark runs, and its plain evaluation agrees with ours (cost is not tested)."""

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
        "-m",
        "benchmarks.evaluation",
        "--rows",
        "4",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    [result] = json.loads(out.read_text())
    assert result["rows"] == dict.fromkeys(("forget", "retain", "real_authors", "world_facts"), 4)
    assert result["worst_difference"] < 1e-4
    assert result["reference_attack"]
    assert result["reference_seconds"] > 0
    assert result["generated_tokens"] > 0
    assert result["gflop"] > 0
    assert set(result["where"]) == {"trees", "decoding", "scores of logits", "ROUGE", "tokenising"}
    assert 0.2 < sum(result["where"].values()) <= 1
    assert "times faster" in done.stdout
