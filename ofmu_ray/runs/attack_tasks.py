"""The attacks of `ofmu evaluate`: which to run, running them here or on other processes, and caching."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ofmu_ray import progress
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import SourceConfig
from ofmu_ray.config.evaluate import RETRAINED, EvaluateConfig
from ofmu_ray.config.robustness import PrefixOptions, RelearnOptions
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.evaluator import Evaluator
from ofmu_ray.models.source import model_source

Metrics = dict[str, dict[str, Any]]
"""Model -> name -> {"value", "low", "high", "n"}."""
GRADIENT_NORM = "gradient_norm"
ONE_DEVICE = ("relearn", "quantise", "alignment", GRADIENT_NORM)
"""Attacks that are no plain passes of one model."""


@dataclass(frozen=True)
class AttackTask:
    """An attack that the configuration requests, for every model."""

    name: str
    kind: Any
    options: Mapping[str, Any]
    rows: Mapping[str, Sequence[Any]]


class Checks:
    """Attacks on all models; cached results are not computed again.

    Construction refuses attacks that the options or the rows do not allow, before a model is looked at.
    """

    def __init__(self, config: EvaluateConfig, evaluator: Evaluator, models: Mapping[str, str]):
        self.config, self.evaluator, self.models = config, evaluator, models
        self.attacks = list(self._attacks())
        self.tables: dict[tuple[str, str], Any] = {}
        if config.checks.lm_eval and importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                "checks.lm_eval: lm-evaluation-harness is not installed: pip install 'ofmu-ray[lm-eval]', "
                "or remove the option"
            )
        if config.evaluation.device_map is not None:
            self._check_spread()

    def _attacks(self) -> Iterator[AttackTask]:
        checks = self.config.checks
        if checks.relearn is not None:
            _check_relearn(checks.relearn, self.evaluator)
            yield AttackTask("relearn", "relearn", asdict(checks.relearn), self._rows("forget", "retain"))
        if checks.quantise is not None:
            yield AttackTask("quantise", "quantise", asdict(checks.quantise), self._rows("forget", "retain"))
        if checks.prefix is not None:
            _check_prefix(checks.prefix, self.evaluator)
            yield AttackTask("prefix", "prefix", asdict(checks.prefix), self._rows("forget", "retain"))
        if checks.alignment:
            yield AttackTask("alignment", "alignment", self._sampling, self._rows("forget", "retain"))
        if checks.gradient_norm:
            yield AttackTask(GRADIENT_NORM, GRADIENT_NORM, {}, self._rows("forget", "holdout"))
        for number, choice in enumerate(checks.choice):
            from ofmu_ray.data.choices import choice_rows

            source = SourceConfig(
                path=choice.path,
                format=choice.format,
                hub_config=choice.hub_config,
                hub_split=choice.hub_split,
                limit=choice.limit,
            )
            option = f"checks.choice[{number}]"
            rows = choice_rows(source, self.config.data.root, name=choice.name, option=option)
            yield AttackTask(f"choice/{choice.name}", "choice", {"scoring": choice.scoring}, {choice.name: rows})

    @property
    def _sampling(self) -> dict[str, int]:
        return {"samples": self.config.evaluation.bootstrap_samples, "seed": self.config.seed}

    def _rows(self, *names: str) -> dict[str, Any]:
        from ofmu_ray.evaluation.rows import evaluation_rows

        return {name: evaluation_rows(name, self.evaluator.sets[name], self.evaluator.row_format) for name in names}

    def check_depths(self) -> None:
        """Raise UserError if layers are to be compared, and the models have not equally many."""
        if not self.config.checks.alignment:
            return
        depths = {label: self.evaluator.model_config(path).num_hidden_layers for label, path in self.models.items()}
        for label, depth in depths.items():
            if depth != depths[RETRAINED]:
                raise UserError(
                    f"checks.alignment: models.{label} has {depth} layers, evaluation.retrained {depths[RETRAINED]}, "
                    "and layers are compared one by one: remove this check or this model"
                )

    def _check_spread(self) -> None:
        wanted = [attack.name for attack in self.attacks if attack.kind in ONE_DEVICE]
        wanted += ["lm_eval"] if self.config.checks.lm_eval else []
        if wanted:
            raise UserError(
                f"checks.{wanted[0]}: it changes weights, takes gradients or loads a second model, which works on one "
                "GPU only: remove it, or evaluation.device_map"
            )

    def measure(self) -> None:
        """Run what is not cached: in this process if it is little work, else in processes with one CPU or GPU each."""
        from ofmu_ray.cluster.map_tasks import device_kind, map_tasks, runs_here
        from ofmu_ray.evaluation.cache import TableCache

        device, cache = device_kind(), TableCache(self.evaluator.cache, "checks")
        missing = []
        for target, check in self._checks():
            stored = cache.load(check.key(device))
            if stored is None:
                missing.append((target, check))
            else:
                self.tables[target] = stored
        make, checks = partial(_measurer, device), [check for _, check in missing]
        few = runs_here(sum(check.flops for check in checks))
        memory = 0 if device == "cuda" else max((check.host_bytes for check in checks), default=0)
        apart = partial(map_tasks, memory=memory, whole_nodes=self.config.evaluation.device_map is not None)
        with progress.bar("checks", len(missing), "check") as bar:
            for number, table in enumerate(map(make(), checks)) if few else apart(make, checks):
                target, check = missing[number]
                cache.save(check.key(device), table)
                self.tables[target] = table
                bar.update()

    def with_gradient_norms(self, tables: dict[str, Any]) -> dict[str, Any]:
        """The models' tables, with the column that the GradNorm attack reads if it was measured."""
        import pyarrow as pa

        joined = {}
        for label, table in tables.items():
            norms = self.tables.get((GRADIENT_NORM, label))
            if norms is not None:
                values = dict(zip(norms["row_id"].to_pylist(), norms["answer_gradient_norm"].to_pylist(), strict=True))
                column = pa.array([values.get(row) for row in table["row_id"].to_pylist()], pa.float64())
                table = table.append_column("answer_gradient_norm", column)
            joined[label] = table
        return joined

    def metrics(self) -> dict[str, Metrics]:
        """The metrics by attack and model; lm-evaluation-harness runs here."""
        from ofmu_ray.attacks.attack_metrics import check_metrics

        metrics: dict[str, Metrics] = {}
        for attack in self.attacks:
            if attack.kind == GRADIENT_NORM:
                continue  # a column of the tables
            reference = self.tables.get((attack.name, RETRAINED))
            tables = {label: self.tables[attack.name, label] for label in self.models if self._concerns(attack, label)}
            metrics[attack.name] = {
                label: {
                    name: value.to_json()
                    for name, value in check_metrics(attack.kind, table, reference, **self._sampling).items()
                }
                for label, table in tables.items()
            }
        if self.config.checks.lm_eval:
            metrics["lm_eval"] = self._lm_eval()
        return metrics

    def _lm_eval(self) -> Metrics:
        from ofmu_ray.attacks.lm_eval import run_lm_eval

        values: Metrics = {}
        for label, path in self.models.items():
            tasks = run_lm_eval(model_source(path), self.config.checks.lm_eval)
            values[label] = {
                f"{task}/{metric}": value.to_json()
                for task, metrics in tasks.items()
                for metric, value in metrics.items()
            }
        return values

    def _concerns(self, attack: AttackTask, label: str) -> bool:
        return attack.kind != "alignment" or label != RETRAINED  # the others are aligned with it

    def _checks(self) -> Iterator[tuple[tuple[str, str], Any]]:
        """((attack, model), what to run) of all wanted attacks, model by model."""
        from ofmu_ray.attacks.measurement import Check
        from ofmu_ray.models.source import model_fingerprint, weights_folder

        if not self.attacks:
            return
        loadings = {label: self.evaluator.loading(path) for label, path in self.models.items()}
        prints = {
            label: model_fingerprint(weights_folder(resolve_builtin(path))) for label, path in self.models.items()
        }
        for label in self.models:
            for attack in self.attacks:
                if self._concerns(attack, label):
                    compared = attack.kind == "alignment"
                    check = Check(
                        attack.kind,
                        loadings[label],
                        prints[label],
                        attack.rows,
                        attack.options,
                        reference=loadings[RETRAINED] if compared else None,
                        reference_weights=prints[RETRAINED] if compared else "",
                        batch_size=self.config.evaluation.batch_size,
                    )
                    yield (attack.name, label), check


def _measurer(device: str) -> Callable[[Any], Any]:
    from ofmu_ray.attacks.measurement import measure

    return partial(measure, device=device)


def _check_relearn(options: RelearnOptions, evaluator: Evaluator) -> None:
    rows = len(evaluator.sets[options.on])
    if options.rows >= rows:
        raise UserError(
            f"checks.relearn.rows = {options.rows}: there are {rows} {options.on} rows, and at least one must stay out "
            "of the attack; lower it"
        )


def _check_prefix(options: PrefixOptions, evaluator: Evaluator) -> None:
    for name in ("forget", "retain"):
        if evaluator.sets[name][0].get("kind", "qa") != "qa":
            raise UserError(
                f"checks.prefix asks questions in other words, but the {name} rows are not questions: remove it, or "
                f"name questions with evaluation.sets.{name}"
            )
    rows = len(evaluator.sets["retain"])
    if options.shots > rows:
        raise UserError(f"checks.prefix.shots = {options.shots}: there are {rows} retain rows to draw from; lower it")
