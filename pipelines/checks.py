"""The further measurements of `ofmu evaluate`: which are asked for, run as Ray tasks, told as tables of the report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import SourceConfig
from ofmu_ray.config.evaluate import RETRAINED, EvaluateConfig
from pipelines.evaluation import Evaluator

Figures = dict[str, dict[str, Any]]
"""Model -> name -> {"value", "low", "high", "n"}."""

TITLES = {
    "relearn": (
        "Relearning attack",
        "Mean answer probability after the last step of a fine-tuning on a few rows, and the mean height of the curve. "
        "What comes back on forget rows that were not trained on should be no more than in the retrained model.",
    ),
    "quantise": (
        "Rounded weights",
        "Mean answer probability with weights rounded to 8 and 4 bits: forget rows should not come back.",
    ),
    "prefix": (
        "Other ways to ask",
        "Mean answer probability of forget rows under each attack, and each row's worst case over the attacks on the "
        "whole answer. Compare with the retrained model.",
    ),
    "alignment": (
        "Alignment with the retrained model",
        "Linear centred kernel alignment (1: alike) and mean cosine of the answers' hidden states by layer, embeddings "
        "first; mean over layers here, every layer in metrics.json.",
    ),
    "choice": ("Multiple choice", "Accuracy, and its distance to chance."),
    "lm_eval": ("lm-evaluation-harness", "As the harness computes them."),
}


class Checks:
    """Checks of all models; a check that is in the cache is not run again."""

    def __init__(self, config: EvaluateConfig, evaluator: Evaluator, models: Mapping[str, str]):
        self.config, self.evaluator, self.models = config, evaluator, models
        checks = config.checks
        self.wanted: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = []  # (name, kind, options, rows)
        for kind, options in (("relearn", checks.relearn), ("quantise", checks.quantise), ("prefix", checks.prefix)):
            if options is not None:
                self.wanted.append((kind, kind, asdict(options), self._rows("forget", "retain")))
        if checks.alignment:
            sampling = {"samples": config.evaluation.bootstrap_samples, "seed": config.seed}
            self.wanted.append(("alignment", "alignment", sampling, self._rows("forget", "retain")))
        for number, choice in enumerate(checks.choice):
            from ofmu_ray.evaluation.choice import choice_rows

            hub = {"hub_config": choice.hub_config, "hub_split": choice.hub_split}
            source = SourceConfig(path=choice.path, limit=choice.limit, **hub)  # type: ignore[arg-type]
            option = f"checks.choice[{number}].path"
            rows = choice_rows(source, config.data.root, name=choice.name, option=option)
            self.wanted.append((f"choice/{choice.name}", "choice", {"scoring": choice.scoring}, {choice.name: rows}))

    def _rows(self, *names: str) -> dict[str, Any]:
        from ofmu_ray.evaluation.rows import evaluation_rows

        return {name: evaluation_rows(name, self.evaluator.sets[name], self.evaluator.row_format) for name in names}

    def with_gradient_norms(self, tables: dict[str, Any]) -> dict[str, Any]:
        """The tables with the column that the GradNorm attack reads, if that is asked for."""
        import pyarrow as pa

        if not self.config.checks.gradient_norm:
            return tables
        found = self._measure([("gradient_norm", "gradient_norm", {}, self._rows("forget", "holdout"))])
        joined = {}
        for label, table in tables.items():
            norms = found["gradient_norm", label]
            values = dict(zip(norms["row_id"].to_pylist(), norms["answer_gradient_norm"].to_pylist(), strict=True))
            column = pa.array([values.get(row) for row in table["row_id"].to_pylist()], pa.float64())
            joined[label] = table.append_column("answer_gradient_norm", column)
        return joined

    def run(self) -> tuple[list[Any], dict[str, Figures]]:
        """Sections of the report, and all figures by check and model."""
        from ofmu_ray.evaluation.check_figures import check_figures

        tables = self._measure(self.wanted)
        sampling = {"samples": self.config.evaluation.bootstrap_samples, "seed": self.config.seed}
        figures: dict[str, Figures] = {}
        for name, kind, _, _ in self.wanted:
            reference = tables.get((name, RETRAINED))
            figures[name] = {
                label: {
                    figure: value.to_json()
                    for figure, value in check_figures(kind, tables[name, label], reference, **sampling).items()
                }
                for label in self.models
                if (name, label) in tables
            }
        if self.config.checks.lm_eval:
            figures["lm_eval"] = self._lm_eval()
        return [_section(name, found) for name, found in figures.items()], figures

    def _lm_eval(self) -> Figures:
        from ofmu_ray.evaluation.lm_eval import run_lm_eval

        found: Figures = {}
        for label, path in self.models.items():
            tasks = run_lm_eval(resolve_builtin(path), self.config.checks.lm_eval)
            found[label] = {
                f"{task} {metric}": figure.to_json()
                for task, metrics in tasks.items()
                for metric, figure in metrics.items()
            }
        return found

    def _measure(self, wanted: list[Any]) -> dict[tuple[str, str], Any]:
        """(check, model) -> table; every missing one is a Ray task of one CPU, or of one GPU where there are some."""
        import ray
        from tqdm import tqdm

        from ofmu_ray.evaluation.actors import device_kind
        from ofmu_ray.evaluation.cache import TableCache
        from ofmu_ray.evaluation.checks import measure
        from ofmu_ray.training.launch import user_error_within

        device, cache = device_kind(), TableCache(self.evaluator.cache, "checks")
        task = ray.remote(measure).options(**({"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}))
        found: dict[tuple[str, str], Any] = {}
        running: dict[Any, tuple[tuple[str, str], str]] = {}
        for place, check in self._checks(wanted):
            key = check.key
            stored = cache.load(key)
            if stored is not None:
                found[place] = stored
            else:
                running[task.remote(check, device)] = (place, key)
        waiting = list(running)
        with tqdm(total=len(waiting), desc="checks", disable=not sys.stderr.isatty() or not waiting) as bar:
            while waiting:
                done, waiting = ray.wait(waiting)
                place, key = running[done[0]]
                try:
                    found[place] = ray.get(done[0])
                except ray.exceptions.RayTaskError as error:
                    raise user_error_within(error) or error from None
                cache.save(key, found[place])
                bar.update()
        return found

    def _checks(self, wanted: list[Any]) -> Any:
        from ofmu_ray.evaluation.cache import model_fingerprint, weights_folder
        from ofmu_ray.evaluation.checks import Check

        loadings = {label: self.evaluator.loading(path) for label, path in self.models.items()}
        prints = {
            label: model_fingerprint(weights_folder(resolve_builtin(path))) for label, path in self.models.items()
        }
        for name, kind, options, rows in wanted:
            for label in self.models:
                if kind == "alignment" and label == RETRAINED:
                    continue
                compared = kind == "alignment"
                yield (
                    (name, label),
                    Check(
                        kind,
                        loadings[label],
                        prints[label],
                        rows,
                        options,
                        reference=loadings[RETRAINED] if compared else None,
                        reference_weights=prints[RETRAINED] if compared else "",
                        batch_size=self.config.evaluation.batch_size,
                    ),
                )


def _section(name: str, figures: Figures) -> Any:
    """A check as a table of the report: models as columns."""
    from ofmu_ray.reporting.comparison import Section
    from ofmu_ray.reporting.figures import cell

    kind, _, which = name.partition("/")
    title, note = TITLES[kind]
    shown: Callable[[str], bool] = (lambda row: "/layer_" not in row) if kind == "alignment" else (lambda row: True)
    names = [row for row in dict.fromkeys(row for found in figures.values() for row in found) if shown(row)]

    def text(figure: dict[str, Any] | None) -> str:
        part = cell(figure)
        return f"{part.text} [{part.interval}]" if part.interval else part.text

    rows = [[row.replace("_", " "), *(text(found.get(row)) for found in figures.values())] for row in names]
    return Section(title=f"{title}: {which}" if which else title, note=note, header=["", *figures], rows=rows)
