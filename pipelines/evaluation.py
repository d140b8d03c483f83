"""Evaluation as the pipelines use it: which rows, which models, which figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import SourceConfig, UnlearnConfig


class Evaluator:
    """Evaluates models on the rows that a configuration names; results are cached under <storage>/cache.

    Rows are read, and refused if they are not usable, when it is built: before any worker starts.
    """

    def __init__(self, config: UnlearnConfig, storage: Path):
        self.config, self.cache = config, storage / "cache"
        self.sets = _rows(config) if config.evaluation.enabled else {}

    def table(self, model: str | None, label: str) -> Any:
        """Per-row values of a model as a pyarrow Table; None: no such model, or evaluation is off."""
        if model is None or not self.config.evaluation.enabled:
            return None
        from ofmu_ray.evaluation.runner import evaluate_model

        config = self.config
        folder = resolve_builtin(model)
        return evaluate_model(
            folder,
            resolve_builtin(config.model.tokenizer or config.model.path),
            self.sets,
            replace(config.data.format, question="question", answer="answer"),  # the rows are renamed already
            config.evaluation,
            self.cache,
            label=label,
            reveal_text=config.report.reveal_text,
            trust_remote_code=config.model.trust_remote_code,
        )

    def texts(self) -> dict[str, tuple[str, str]]:
        """Question and answer by row id; those of forget rows only if the report may reveal them."""
        return {
            f"{name}-{index}": (row["question"], row["answer"])
            for name, rows in self.sets.items()
            if name != "forget" or self.config.report.reveal_text
            for index, row in enumerate(rows)
        }

    def metrics(self, *, before: Any, after: Any, retrained: Any) -> dict[str, Any]:
        """Figures of the three models, each {"value", "low", "high", "n"} or {"value": null, "reason"}."""
        from ofmu_ray.evaluation.summary import summarise

        def figures(table: Any) -> dict[str, Any] | None:
            if table is None:
                return None
            samples = self.config.evaluation.bootstrap_samples
            found = summarise(table, retrained, bootstrap_samples=samples, seed=self.config.seed)
            return {name: figure.to_json() for name, figure in found.items()}

        return {"before": figures(before), "after": figures(after), "retrained": figures(retrained)}


def _rows(config: UnlearnConfig) -> dict[str, list[dict[str, Any]]]:
    from ofmu_ray.data.evaluation_rows import evaluation_rows

    sets, data, limit = config.evaluation.sets, config.data, config.evaluation.max_rows
    sources: dict[str, tuple[str, str | SourceConfig | None]] = {
        "forget": ("evaluation.sets.forget", sets.forget) if sets.forget else ("data.forget", data.forget),
        "retain": ("evaluation.sets.retain", sets.retain) if sets.retain else ("data.retain", data.retain),
        "real_authors": ("evaluation.sets.real_authors", sets.real_authors),
        "world_facts": ("evaluation.sets.world_facts", sets.world_facts),
    }
    return {
        name: evaluation_rows(source, data.root, limit, name=name, option=option, fmt=data.format)
        for name, (option, source) in sources.items()
        if source is not None
    }
