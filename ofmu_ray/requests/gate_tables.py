"""What gates are decided on: values by row of the result and of the champion, and relearning attacks.

Rows of requests come decrypted and stay in memory; the tables have no text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ofmu_ray.config import UnlearnConfig
from ofmu_ray.config.promotion import GateConfig
from ofmu_ray.config.robustness import RelearnOptions
from ofmu_ray.evaluation.evaluator import Evaluator
from ofmu_ray.models.source import model_fingerprint, weights_folder
from ofmu_ray.requests.gates import EARLIER, GateTables
from ofmu_ray.storage import join

Row = Mapping[str, Any]


@dataclass(frozen=True)
class GateRows:
    """The rows that gates look at, in TOFU's layout (question, answer and, optionally, other answers)."""

    requested: Sequence[Row]
    """Of the requests at hand."""
    earlier: Sequence[tuple[str, Row]]
    """(request id, row) of earlier requests."""
    kept: Mapping[str, Sequence[Row]]
    """Set -> rows: retain, and holdout, real_authors and world_facts where they are configured."""

    def sets(self, *, everything: bool) -> dict[str, Sequence[Row]]:
        """Rows by set; `everything`: also what only the result is measured on."""
        sets = {"forget": self.requested, **self.kept}
        if not everything:
            return {name: rows for name, rows in sets.items() if name != "holdout"}
        return sets | ({EARLIER: [row for _, row in self.earlier]} if self.earlier else {})


def gate_cache(storage: str) -> str:
    """Values of models on sets, as long as a batch is worked off: they quote rows that may be requested later."""
    return join(storage, "requests", "cache")


class GateMeasurement:
    """Measures models for gates; values of a model and a set that were measured before are read from `gate_cache`."""

    def __init__(self, config: UnlearnConfig, storage: str, gates: Sequence[GateConfig], rows: GateRows) -> None:
        """`config`: of the run, with the champion as its model."""
        self.rows, self.gates, self.seed = rows, gates, config.seed
        self.evaluation = replace(config.evaluation, enabled=True, max_rows=None)
        self.retrained = config.evaluation.retrained if any(map(_retrained, gates)) else None
        self._base = Evaluator(
            self.evaluation,
            config.data,
            config.model.tokenizer or config.model.path,
            gate_cache(storage),
            config.seed,
            trust_remote_code=config.model.trust_remote_code,
        )
        self.champion = config.model.path

    def tables(self, result: str) -> GateTables:
        """All but the attacks; `result`: folder of the unlearned model."""
        short, full = (replace(self._base, sets=self.rows.sets(everything=each)) for each in (False, True))
        aside = replace(self._base, sets={**self.rows.sets(everything=False), **_only(self.rows.kept, "holdout")})
        return GateTables(
            result=full.table(result, "result"),
            champion=short.table(self.champion, "champion"),
            retrained=aside.table(self.retrained, "retrained"),
            earlier=[request for request, _ in self.rows.earlier],
            samples=self.evaluation.bootstrap_samples,
            seed=self.seed,
        )

    def relearn(self, result: str, options: RelearnOptions) -> dict[str, Any]:
        """Tables of the relearning attack, as `GateTables.relearn`; empty where there are too few rows for it."""
        from ofmu_ray.attacks.measurement import Check, measure
        from ofmu_ray.cluster.map_tasks import device_kind, map_tasks, runs_here

        kept, requested = self.rows.kept, self.rows.requested
        places = {"requested": (result, requested), "holdout": (result, kept.get("holdout", ()))}
        if self.retrained is not None:
            places["retrained"] = (self.retrained, requested)
        fewest = min(len(rows) for _, rows in places.values() if rows)
        if fewest < 2:
            return {}
        attack = replace(options, rows=min(options.rows, fewest // 2))
        names, checks = [], []
        for name, (model, rows) in places.items():
            if rows:
                given = {"forget": self._rows("forget", rows), "retain": self._rows("retain", kept["retain"])}
                loading, weights = self._base.loading(model), model_fingerprint(weights_folder(model))
                names.append(name)
                checks.append(Check("relearn", loading, weights, given, asdict(attack)))
        make = partial(_measurer, measure, device_kind())
        here = runs_here(sum(check.flops for check in checks))
        done = enumerate(map(make(), checks)) if here else map_tasks(make, checks)
        return {names[number]: table for number, table in done}

    def _rows(self, name: str, rows: Sequence[Row]) -> Any:
        from ofmu_ray.evaluation.rows import evaluation_rows

        return evaluation_rows(name, rows, self._base.row_format)


def _measurer(measure: Any, device: str) -> Any:
    return partial(measure, device=device)


def _only(sets: Mapping[str, Sequence[Row]], name: str) -> dict[str, Sequence[Row]]:
    return {name: sets[name]} if name in sets else {}


def _retrained(gate: GateConfig) -> bool:
    from ofmu_ray.metrics.registry import metric

    return gate.against == "retrained" or "retrained" in metric(gate.metric).needs
