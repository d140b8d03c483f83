"""A run's folder belongs to its configuration and, once it is finished, to its rows."""

from dataclasses import replace
from pathlib import Path

import pytest

from ofmu_ray.config import SourceConfig
from ofmu_ray.data.prepare import source_contents
from ofmu_ray.errors import UserError
from ofmu_ray.runs.claims import Claim


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
