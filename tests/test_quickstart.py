"""The quickstart as it is shipped: DeepSpeed, two Ray Train workers, all rounds, the default loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines import cli

pytestmark = [pytest.mark.system, pytest.mark.full, pytest.mark.usefixtures("local_ray")]


def test_the_quickstart_forgets_and_keeps_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["unlearn", "--config", "quickstart", "--storage", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "quickstart/metrics.json").read_text())
    assert (metrics["run"]["status"], metrics["run"]["degenerate"]) == ("finished", False)
    assert "p > 0.05" in metrics["run"]["forgetting"]
    assert metrics["after"]["forget_quality"]["value"] >= 0.3
    assert metrics["after"]["retain_probability"]["value"] >= 0.97
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  before  ") for line in printed) == 3
    assert sum(line.startswith("  after   ") for line in printed) == 3
