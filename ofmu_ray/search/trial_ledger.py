"""A sweep's suggestions, decisions and results, all on storage: the driver may be killed at any time."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ofmu_ray.config import SweepConfig, UnlearnConfig, apply_overrides, config_hash
from ofmu_ray.metrics.fronts import plain
from ofmu_ray.runs.trial import SplitData, Trial, published, read_result, result_path, work_path
from ofmu_ray.search.suggest import EarlierTrial, Search, Suggestion
from ofmu_ray.storage import atomic_write
from ofmu_ray.training import stage_files


@dataclass(frozen=True, kw_only=True)
class SweepTrial(Trial):
    """A trial of a sweep: equal options make the same trial, whatever its number.

    Only a population's members may repeat the options of another; they run side by side, so each has its own key.
    """

    stages: int
    parent: str | None = None
    """Key of the trial that it continues from."""
    copy: int = 0
    """Earlier trials with the same options and parent."""

    def key(self, data: SplitData) -> str:
        from ofmu_ray.metrics.functions import METRIC_VERSION

        run = ["sweep", self.phase, str(self.rows), str(self.stages), str(self.parent)]
        copy = [f"copy {self.copy}"] if self.copy else []
        return config_hash(self.config, *run, *copy, str(METRIC_VERSION), data.fingerprint)


@dataclass
class TrialLedger:
    """The trials of a sweep."""

    config: SweepConfig
    search: Search
    data: SplitData
    suggestions: list[Suggestion] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return Path(self.data.folder)

    @property
    def stage_count(self) -> int:
        """Number of evaluations of a trial that is not stopped early."""
        search, early = self.config.search, self.config.early
        return search.generations if search.kind == "population" else early.stages

    # -------------------------------------------------------------------------------------------------- suggestions

    def read(self) -> None:
        """Read suggestions.jsonl; ignore a line that a kill cut off."""
        path, suggestions = self._journal, []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                content = json.loads(line)
            except json.JSONDecodeError:
                break
            suggestions.append(Suggestion(content["number"], content["options"], content["parent"]))
        self.suggestions = suggestions

    def suggestion(self, number: int) -> Suggestion | None:
        """The trial with this number: the recorded suggestion, or else a new one, which is recorded first."""
        if number < len(self.suggestions):
            return self.suggestions[number]
        assert number == len(self.suggestions), "trials are suggested in order"
        new = self.search.suggest(number, self.earlier())
        if new is not None:
            self.suggestions.append(new)
            lines = [json.dumps({**asdict(one), "time": time.time()}) for one in (new,)]
            self._journal.parent.mkdir(parents=True, exist_ok=True)
            kept = self._journal.read_text().splitlines()[:number] if self._journal.exists() else []
            atomic_write(self._journal, "\n".join([*kept, *lines]) + "\n")
        return new

    @property
    def _journal(self) -> Path:
        return self.folder / "suggestions.jsonl"

    def started(self) -> float | None:
        """When the first trial was suggested (seconds since the epoch)."""
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        return float(json.loads(lines[0])["time"]) if lines else None

    # ------------------------------------------------------------------------------------------------------- trials

    def trial(self, number: int) -> SweepTrial:
        """The suggested trial with this number."""
        if number >= len(self.suggestions):
            self.read()  # a trial's process makes no suggestions
        one = self.suggestions[number]
        alike = [(other.options, other.parent) == (one.options, one.parent) for other in self.suggestions[:number]]
        return SweepTrial(
            method=self.config.label,
            split=self.data.name,
            phase="tune",
            trial=number,
            config=self.configured(one.options),
            options=one.options,
            budget_unit="",
            budget=0.0,
            rows=self.config.select.rows,
            stages=self.stage_count,
            parent=None if one.parent is None else self.key(one.parent),
            copy=sum(alike),
        )

    def configured(self, options: dict[str, Any]) -> UnlearnConfig:
        """The run configuration for a trial's options, with the trials' evaluation settings."""
        config = apply_overrides(self.config.run, options)
        longest = self.config.select.max_new_tokens
        return config if longest is None else apply_overrides(config, {"evaluation.max_new_tokens": longest})

    def key(self, number: int) -> str:
        """The key of a trial's result."""
        return self.trial(number).key(self.data)

    def result(self, number: int) -> dict[str, Any] | None:
        """The result of a finished trial."""
        return read_result(self.folder, self.key(number))

    def evaluations(self, number: int) -> list[dict[str, Any]]:
        """A trial's intermediate evaluations so far, oldest first."""
        running: list[dict[str, Any]] = []
        with suppress(FileNotFoundError):
            running = published(work_path(self.folder, self.key(number)))
        result = self.result(number)  # read last: a trial that has ended meanwhile deleted files once they were in it
        return running if result is None else result.get("evaluations") or []

    def earlier(self) -> list[EarlierTrial]:
        """All trials so far, in order."""
        return [self._earlier(number) for number in range(len(self.suggestions))]

    def _earlier(self, number: int) -> EarlierTrial:
        suggestion, result = self.suggestions[number], self.result(number)
        if result is None:
            return EarlierTrial(suggestion, "running")
        steps = [plain(one["figures"]) for one in result.get("evaluations") or []]
        if result.get("figures"):
            steps.append(plain(result["figures"]))
        return EarlierTrial(suggestion, result["status"], steps, result.get("flops"))

    def forget_failures(self) -> None:
        """Let failed trials run again."""
        for number in range(len(self.suggestions)):
            result = self.result(number)
            if result is not None and result["status"] == "failed":
                result_path(self.folder, self.key(number)).unlink()

    # ---------------------------------------------------------------------------------------------------- decisions

    def decide(self, number: int, stage: int, *, go: bool) -> bool:
        """Whether a trial continues after a stage: the recorded decision, or else `go`, which is recorded."""
        if self.result(number) is not None:
            return True  # it has already finished and is only reported again
        folder = work_path(self.folder, self.key(number)) / "stages"
        known = stage_files.decision(folder, stage)
        if known is None:
            stage_files.decide(folder, stage, go=go)
        return go if known is None else known


def ranked(ledger: TrialLedger, numbers: Sequence[int]) -> list[int]:
    """Completed trials with metrics, the rule's best first; ties by cost or order (select.tie_break)."""
    results = {number: result for number in numbers if (result := ledger.result(number)) and result.get("figures")}
    measured = {number: plain(result["figures"]) for number, result in results.items()}
    goal, ranks = ledger.search.goal.choosing(list(measured.values())), []
    for number, values in measured.items():
        rank = goal.rank(values)
        if rank is not None:
            cost = results[number]["flops"] if ledger.config.select.tie_break == "cost" else 0.0
            ranks.append((rank, cost, number))
    return [number for _, _, number in sorted(ranks)]
