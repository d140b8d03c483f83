"""A run's folder belongs to its configuration and, once it is finished, to its rows."""

from dataclasses import replace
from pathlib import Path

import pytest
from mistakes import refused

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import SourceConfig
from ofmu_ray.data.prepare import source_contents
from ofmu_ray.errors import UserError
from ofmu_ray.runs.claims import Claim
from pipelines import cli


@pytest.mark.parametrize(("command", "last"), [("unlearn", "metrics.json"), ("train", "training.json")])
def test_a_finished_run_whose_rows_changed_is_not_finished(command: str, last: str, tmp_path: Path) -> None:
    rows = tmp_path / "forget.jsonl"
    rows.write_text('{"question": "a", "answer": "b"}\n')
    home = tmp_path / "run"
    claim = Claim(str(home), command, "hash", {}, sources={"forget": SourceConfig(path=str(rows))})
    with claim.held():
        claim.note_sources(source_contents(claim.sources, None))
    rows.write_text(rows.read_text() + '{"question": "c", "answer": "d"}\n')
    assert claim.check()  # not finished: it takes up the new rows
    with claim.held():
        claim.note_sources(source_contents(claim.sources, None))
    (home / last).write_text("{}")
    assert claim.check()
    rows.write_text(rows.read_text() + '{"question": "e", "answer": "f"}\n')
    with pytest.raises(UserError, match=r"rows have changed since \(data\.forget\)"):
        claim.check()
    assert not replace(claim, overwrite=True).check()
    rows.unlink()  # deleted after the run, as it should be
    assert claim.check()


@pytest.mark.slow
def test_the_command_of_a_finished_run_does_no_work_and_refuses_other_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds in this process; what the run read is in run.json, and the next command looks at it."""
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    rows, home = tmp_path / "forget.jsonl", tmp_path / "runs/x"
    rows.write_text(Path(resolve_builtin("builtin:people/forget.jsonl")).read_text())
    words = [
        *("--storage", str(tmp_path / "runs"), "--name", "x", "--data.forget.path", str(rows)),
        *("--training.engine", "torch", "--training.workers", "1", "--training.rounds", "2"),
        *("--evaluation.enabled", "false", "--tracking.system_metrics", "false"),
    ]
    assert cli.main(["unlearn", *words]) == 0
    monkeypatch.setattr("ofmu_ray.runs.run.unlearn", None)  # no more work
    assert cli.main(["unlearn", *words]) == 0
    metrics = (home / "metrics.json").read_bytes()
    rows.write_text(rows.read_text() + rows.read_text().splitlines(keepends=True)[0])
    refused(["unlearn", *words], "its rows have changed since (data.forget)", capsys=capsys, notes=True)
    assert (home / "metrics.json").read_bytes() == metrics
