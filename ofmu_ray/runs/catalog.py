"""What a storage contains: its runs, evaluations, sweeps and benchmarks, and how far each got."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ofmu_ray.errors import UserError
from ofmu_ray.runs.claims import RECORD, is_running
from ofmu_ray.storage import absolute, is_file, join, locate, name_of, read_text

HEADLINE = ("forget_quality", "model_utility")
NO_RUNS = ("cache", "mlartifacts", "requests")
"""Folders of a storage that belong to all runs."""


@dataclass(frozen=True)
class PastRun:
    """A folder of the storage."""

    home: str
    """Folder or URI."""
    command: str
    """unlearn, train, evaluate, sweep or benchmark."""
    status: str
    """finished, running or interrupted; or why a rule stopped the run (utility_floor, non_finite, stopped)."""
    method: str = ""
    rounds: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Of metrics.json: model -> metric -> {"value", "low", "high"}."""
    changed: datetime.datetime | None = None
    """When its newest file was written, UTC; object stores do not say it of folders."""

    @property
    def name(self) -> str:
        """The name it was given."""
        return name_of(self.home)

    @property
    def report(self) -> str | None:
        """report.html, once it is written."""
        path = join(self.home, "report.html")
        return path if is_file(path) else None

    def headline(self) -> dict[str, float]:
        """Forget quality and utility of the resulting model, where there are any."""
        after = self.metrics.get("after") or {}
        values = {name: (after.get(name) or {}).get("value") for name in HEADLINE}
        return {name: value for name, value in values.items() if value is not None}


def past_runs(storage: str) -> list[PastRun]:
    """All of a storage, the newest last.

    Raises:
        UserError: there is no such storage.
    """
    from pyarrow.fs import FileSelector, FileType

    storage = absolute(storage)
    filesystem, inside = locate(storage)
    try:
        entries = filesystem.get_file_info(FileSelector(inside))
    except OSError:
        raise UserError(f"storage = {storage}: there is no such folder; give the --storage of your runs") from None
    names = [entry.base_name for entry in entries if entry.type == FileType.Directory]
    found = [read_past(join(storage, name)) for name in sorted(names) if name not in NO_RUNS]
    oldest = datetime.datetime.min.replace(tzinfo=datetime.UTC)
    return sorted(filter(None, found), key=lambda run: run.changed or oldest)


def past_run(storage: str, name: str) -> PastRun:
    """One of them.

    Raises:
        UserError: there is none of this name; suggests the closest.
    """
    found = read_past(join(absolute(storage), name))
    if found is None:
        from ofmu_ray.config import close_match

        names = [run.name for run in past_runs(storage)]
        raise UserError(f"no run {name!r} in {absolute(storage)}.{close_match(name, names)} `ofmu runs` lists them")
    return found


def read_past(home: str) -> PastRun | None:
    """What a folder contains; None: nothing of ours."""
    record, summary = _json(home, RECORD), _json(home, "metrics.json")
    training = _json(home, "training.json")
    benchmark, swept = is_file(join(home, "benchmark.json")), is_file(join(home, "sweep.json"))
    if record is None and summary is None and training is None and not benchmark and not swept:
        return None
    command = (record or {}).get("command") or _command(record, summary, training, benchmark, swept)
    run = (summary or {}).get("run") or {}
    done = {"unlearn": summary, "train": training, "evaluate": summary, "sweep": swept, "benchmark": benchmark}[command]
    status = "running" if is_running(home) else "interrupted" if not done else "finished"
    if status == "finished":
        status = run.get("status") or (training or {}).get("status") or status
    return PastRun(
        home=home,
        command=command,
        status=status,
        method=run.get("method") or ((record or {}).get("options") or {}).get("method") or "",
        rounds=(training or {}).get("round"),
        metrics={name: value for name, value in (summary or {}).items() if name not in ("cost", "run")},
        changed=_changed(home),
    )


def _command(record: Any, summary: Any, training: Any, benchmark: bool, swept: bool) -> str:
    """For folders of earlier versions, and for commands that claim no name."""
    if benchmark or swept:
        return "benchmark" if benchmark else "sweep"
    if summary is not None:
        return "evaluate" if record is None else "unlearn"
    return "train" if training is not None else "unlearn"


def _json(home: str, name: str) -> dict[str, Any] | None:
    path = join(home, name)
    content: dict[str, Any] | None = json.loads(read_text(path)) if is_file(path) else None
    return content


def _changed(home: str) -> datetime.datetime | None:
    from pyarrow.fs import FileSelector

    filesystem, inside = locate(home)
    times = [entry.mtime for entry in filesystem.get_file_info(FileSelector(inside)) if entry.mtime is not None]
    return max(times, default=None)
