"""From per-row values to the figures of `metrics.json`: the one path that every reported number takes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ofmu_ray.evaluation import metrics
from ofmu_ray.evaluation.intervals import Figure, forget_quality_figures, mean_figure, utility_figure
from ofmu_ray.evaluation.metrics import FloatArray

SETS = ("forget", "retain", "real_authors", "world_facts")
_COLUMNS = {"probability": "probability", "rouge": "rouge_l_recall", "truth_ratio": "truth_ratio"}

FIGURES = (
    "forget_quality",
    "ks_statistic",
    "model_utility",
    *(f"{name}_{metric}" for name in SETS for metric in _COLUMNS),
)
"""Every name that `summarise` gives, in the order of reports."""


def summarise(
    table: pa.Table, retrained: pa.Table | None = None, *, bootstrap_samples: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """All figures of one model from its per-row values, as `evaluate_model` returns them.

    `retrained`: the same of the model trained without the forget rows; without it forget quality is absent. A figure
    whose inputs are missing or not finite is absent with the reason.
    """
    absent: dict[str, str] = {}
    columns: dict[str, FloatArray] = {}
    for name in SETS:
        rows = _rows_of(table, name)
        for metric, column in _COLUMNS.items():
            values = _scores(rows, name, metric, column)
            if isinstance(values, str):
                absent[f"{name}_{metric}"] = values
            else:
                columns[f"{name}_{metric}"] = values
    figures = {
        name: mean_figure(values[~np.isnan(values)], samples=bootstrap_samples, seed=seed, name=name)
        for name, values in columns.items()
    }
    figures |= {name: Figure.absent(reason) for name, reason in absent.items()}
    figures["model_utility"] = _utility(columns, absent, bootstrap_samples, seed)
    quality, statistic = _quality(table, retrained, bootstrap_samples, seed)
    figures |= {"forget_quality": quality, "ks_statistic": statistic}
    return {name: figures[name] for name in FIGURES}


def _rows_of(table: pa.Table, name: str) -> pa.Table:
    return table.filter(pc.equal(table["set"], name))


def _scores(rows: pa.Table, name: str, metric: str, column: str) -> FloatArray | str:
    """The set's per-row scores [rows], NaN where a row lacks the inputs; or why there are none."""
    if rows.num_rows == 0:
        return f"no {name} rows were evaluated (evaluation.sets.{name})"
    found = _finite(rows, name, column)
    if isinstance(found, str) or metric != "truth_ratio":
        return found
    return metrics.closer_to_1(found) if name == "forget" else metrics.true_better(found)


def _finite(rows: pa.Table, name: str, column: str) -> FloatArray | str:
    missing = rows[column].is_null().to_numpy()
    if missing.all():
        need = "perturbed_answer" if name in ("real_authors", "world_facts") else "paraphrased_answer, perturbed_answer"
        return f"the {name} rows lack what it needs (columns {need})"
    values = np.asarray(rows[column].fill_null(0.0).to_numpy(), dtype=np.float64)
    broken = int((~np.isfinite(values) & ~missing).sum())
    if broken:
        return f"the model's loss is not finite on {broken} of {len(values)} {name} rows"
    return np.where(missing, np.nan, values)


def _utility(columns: dict[str, FloatArray], absent: dict[str, str], samples: int, seed: int) -> Figure:
    names = {name: [f"{name}_{metric}" for metric in _COLUMNS] for name in SETS if name != "forget"}
    reasons = [absent[key] for keys in names.values() for key in keys if key in absent]
    if reasons:
        return Figure.absent(f"model utility needs all of its nine components: {'; '.join(dict.fromkeys(reasons))}")
    sets = {name: [columns[key] for key in keys] for name, keys in names.items()}
    return utility_figure(sets, samples=samples, seed=seed, name="model_utility")


def _quality(table: pa.Table, retrained: pa.Table | None, samples: int, seed: int) -> tuple[Figure, Figure]:
    if retrained is None:
        reason = "needs the truth ratios of a model trained without the forget rows (evaluation.retrained)"
        return Figure.absent(reason), Figure.absent(reason)
    ratios: list[FloatArray] = []
    for whose, source in (("", table), ("retrained model: ", retrained)):
        rows = _rows_of(source, "forget")
        found = _finite(rows, "forget", "truth_ratio") if rows.num_rows else "no forget rows were evaluated"
        if isinstance(found, str):
            return Figure.absent(whose + found), Figure.absent(whose + found)
        ratios.append(found)
    ids = [_rows_of(source, "forget")["row_id"].to_pylist() for source in (table, retrained)]
    if ids[0] != ids[1]:
        reason = "the retrained model was evaluated on other forget rows"
        return Figure.absent(reason), Figure.absent(reason)
    both = ~np.isnan(ratios[0]) & ~np.isnan(ratios[1])
    return forget_quality_figures(ratios[0][both], ratios[1][both], samples=samples, seed=seed, name="forget_quality")
