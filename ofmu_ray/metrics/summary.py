"""From per-row values to the figures of `metrics.json`: the one path that every reported number takes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ofmu_ray.metrics import functions as metrics
from ofmu_ray.metrics import membership, memorisation
from ofmu_ray.metrics.columns import clusters_of, finite, of_tokens, rows_of, same_rows
from ofmu_ray.metrics.degeneration import MEASURES, Bounds, Sound, ngram_variety
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.intervals import (
    Clusters,
    Figure,
    attack_figures,
    forget_quality_figures,
    mean_figure,
    privleak_figure,
    utility_estimate,
)
from ofmu_ray.metrics.probes import probe_figures

SETS = ("forget", "retain", "real_authors", "world_facts")
_COLUMNS = {"probability": "probability", "rouge": "rouge_l_recall", "truth_ratio": "truth_ratio"}
_MEMORISATION = {
    "forget_extraction_strength": memorisation.extraction_strength,
    "forget_exact_memorisation": memorisation.exact_memorisation,
    "retain_extraction_strength": memorisation.extraction_strength,
}
_DEGENERATION = {
    "empty": "generated_empty",
    "repetition": "repetition",
    "length": "generated_tokens",
    "ngram_entropy": "generated_entropy",
}
_ATTACKS = ("loss", "zlib", "min_k", "min_k_plus", "reference")
_GRADIENT = "answer_gradient_norm"  # a column that only some tables have: it costs a backward pass per row

FIGURES = (
    "forget_quality",
    "ks_statistic",
    "model_utility",
    *(f"{name}_{metric}" for name in SETS for metric in _COLUMNS),
    *_MEMORISATION,
    *(f"{name}_{metric}" for name in ("forget", "retain") for metric in (*_DEGENERATION, "ngram_variety")),
)
"""Every name that `summarise` gives of a table with forget and retain rows, in the order of reports."""

MEMBERSHIP_FIGURES = (*(f"mia_{attack}_{part}" for attack in _ATTACKS for part in ("auc", "tpr")), "privleak")
"""What it gives besides where the table has holdout rows (and mia_gradient_norm_ where it has that column)."""

NEEDS_RETRAINED = "needs a model trained without the forget rows (evaluation.retrained)"


def summarise(
    table: pa.Table, retrained: pa.Table | None = None, *, bootstrap_samples: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """All figures of one model from its per-row values, as `evaluate_model` returns them.

    `retrained`: the same of the model trained without the forget rows; figures that need it are absent without it. A
    figure whose inputs are missing or not finite is absent with the reason. Listed are the names up to
    `world_facts_truth_ratio` always, the others where their set has rows: MEMBERSHIP_FIGURES with a set `holdout`, the
    probes' with sets `<probe>_forget` and `<probe>_retain`.
    """
    options = {"samples": bootstrap_samples, "seed": seed}
    absent: dict[str, str] = {}
    columns: dict[str, FloatArray] = {}
    clusters: dict[str, Clusters] = {}
    figures: dict[str, Figure] = {}
    for name in SETS:
        rows = rows_of(table, name)
        clusters[name] = clusters_of(rows)
        for metric, column in _COLUMNS.items():
            values = _scores(rows, name, metric, column)
            if isinstance(values, str):
                absent[f"{name}_{metric}"] = values
            else:
                columns[f"{name}_{metric}"] = values
            figures[f"{name}_{metric}"] = _mean(values, clusters[name], f"{name}_{metric}", options)
        if name in ("forget", "retain") and rows.num_rows:
            figures |= _generation_and_memory(rows, name, clusters[name], options)
    figures["model_utility"] = _utility(columns, absent, clusters, options)
    figures["forget_quality"], figures["ks_statistic"] = _quality(table, retrained, options)
    listed = {name: figures[name] for name in FIGURES if name in figures}
    if rows_of(table, "holdout").num_rows:
        listed |= _membership(table, retrained, options)
    return listed | probe_figures(table, retrained, needs_retrained=NEEDS_RETRAINED, **options)


def _scores(rows: pa.Table, name: str, metric: str, column: str) -> FloatArray | str:
    """The set's per-row scores [rows], NaN where a row lacks the inputs; or why there are none."""
    if rows.num_rows == 0:
        return f"no {name} rows were evaluated (evaluation.sets.{name})"
    found = finite(rows, name, column)
    if isinstance(found, str) or metric != "truth_ratio":
        return found
    return metrics.closer_to_1(found) if name == "forget" else metrics.true_better(found)


def _mean(values: FloatArray | str, clusters: Clusters, figure: str, options: dict[str, int]) -> Figure:
    """Mean over the rows that have the value; absent with the reason where there is none."""
    if isinstance(values, str):
        return Figure.absent(values)
    there = ~np.isnan(values)
    if not there.any():
        return Figure.absent("no row has it")
    return mean_figure(values[there], name=figure, clusters=None if clusters is None else clusters[there], **options)


def _generation_and_memory(rows: pa.Table, name: str, clusters: Clusters, options: dict[str, int]) -> dict[str, Figure]:
    found: dict[str, FloatArray | str] = {
        figure: of_tokens(rows, name, "answer_matches", value)
        for figure, value in _MEMORISATION.items()
        if figure.startswith(f"{name}_")
    }
    found |= {f"{name}_{metric}": _generations(rows, name, metric) for metric in (*_DEGENERATION, "ngram_variety")}
    return {figure: _mean(values, clusters, figure, options) for figure, values in found.items()}


def _generations(rows: pa.Table, name: str, metric: str) -> FloatArray | str:
    """A measure of each generation, [rows]; or why there is none."""
    if metric != "ngram_variety":
        return finite(rows, name, _DEGENERATION[metric])
    entropy, tokens = (finite(rows, name, column) for column in ("generated_entropy", "generated_tokens"))
    if isinstance(entropy, str) or isinstance(tokens, str):
        return entropy if isinstance(entropy, str) else tokens
    return ngram_variety(entropy, tokens)


def sound_generations(
    target: pa.Table | None,
    retrained: pa.Table | None,
    *,
    bootstrap_samples: int = 1000,
    seed: int = 0,
    longest: int | None = None,
) -> Sound | None:
    """What a model's answers to forget prompts are held against: the retrained model's to the same prompts; where there
    is none, the target's to prompts of holdout rows, which it never saw either, else to those of the retain rows.

    `longest`: of the other model's generations (tokens). None where nothing was generated, or where generations so
    short could not be compared: those of the reference are longer.
    """
    options = {"samples": bootstrap_samples, "seed": seed}
    sources = [("retrained", retrained, "forget")] if retrained is not None else []
    sources += [(f"target on {name} rows", target, name) for name in ("holdout", "retain") if retrained is None]
    for whose, table, name in sources:
        rows = None if table is None else rows_of(table, name)
        if rows is None or not rows.num_rows:
            continue
        bounds: dict[str, Bounds] = {}
        for measure in MEASURES:
            values = _generations(rows, name, measure)
            found = _bounds(measure, _mean(values, clusters_of(rows), f"{name}_{measure}", options))
            if found is not None:
                bounds[measure] = found
        if bounds:
            tokens = pc.max(rows["generated_tokens"]).as_py()
            return Sound(whose, bounds) if longest is None or longest >= tokens else None
    return None


def _bounds(measure: str, figure: Figure) -> Bounds | None:
    if figure.value is None or figure.low is None or figure.high is None:
        return None
    low, high = figure.low, figure.high
    # resampling nothing but zeros (of variety: ones) says that the mean is 0 for sure; the exact bound on the share of
    # rows that are not 0 (Clopper and Pearson, 1934), and so on the mean of values in [0, 1], is
    room = 1.0 - 0.025 ** (1.0 / figure.n) if figure.n else 0.0
    if measure == "ngram_variety":
        low = 1.0 - room if figure.value == 1.0 else low
    elif figure.value == 0.0:
        high = room
    return figure.value, low, high


def _utility(
    columns: dict[str, FloatArray], absent: dict[str, str], clusters: dict[str, Clusters], options: dict[str, int]
) -> Figure:
    names = {name: [f"{name}_{metric}" for metric in _COLUMNS] for name in SETS if name != "forget"}
    reasons = [absent[key] for keys in names.values() for key in keys if key in absent]
    if reasons:
        return Figure.absent(f"model utility needs all of its nine components: {'; '.join(dict.fromkeys(reasons))}")
    sets = {name: [columns[key] for key in keys] for name, keys in names.items()}
    return utility_estimate(sets, name="model_utility", clusters=clusters, **options).figure()


def _quality(table: pa.Table, retrained: pa.Table | None, options: dict[str, int]) -> tuple[Figure, Figure]:
    if retrained is None:
        reason = "needs the truth ratios of a model trained without the forget rows (evaluation.retrained)"
        return Figure.absent(reason), Figure.absent(reason)
    ratios: list[FloatArray] = []
    rows = [rows_of(source, "forget") for source in (table, retrained)]
    for whose, those in zip(("", "retrained model: "), rows, strict=True):
        found = finite(those, "forget", "truth_ratio") if those.num_rows else "no forget rows were evaluated"
        if isinstance(found, str):
            return Figure.absent(whose + found), Figure.absent(whose + found)
        ratios.append(found)
    if not same_rows(*rows):
        reason = "the retrained model was evaluated on other forget rows"
        return Figure.absent(reason), Figure.absent(reason)
    both = ~np.isnan(ratios[0]) & ~np.isnan(ratios[1])
    labels = clusters_of(rows[0])
    clusters = None if labels is None else labels[both]
    return forget_quality_figures(ratios[0][both], ratios[1][both], name="forget_quality", clusters=clusters, **options)


# --------------------------------------------------------------------------------------------- membership inference


def _membership(table: pa.Table, retrained: pa.Table | None, options: dict[str, int]) -> dict[str, Figure]:
    """MEMBERSHIP_FIGURES, forget rows against holdout rows."""
    rows = [rows_of(table, name) for name in ("forget", "holdout")]
    references = None if retrained is None else [rows_of(retrained, name) for name in ("forget", "holdout")]
    if references is None:
        unusable: str | None = NEEDS_RETRAINED
    else:
        same = all(same_rows(*pair) for pair in zip(rows, references, strict=True))
        unusable = None if same else "the retrained model was evaluated on other forget or holdout rows"
    figures: dict[str, Figure] = {}
    for attack in (*_ATTACKS, *(["gradient_norm"] if _GRADIENT in table.column_names else [])):
        scores = unusable if attack == "reference" and unusable else _both(rows, attack, references)
        auc, rate = f"mia_{attack}_auc", f"mia_{attack}_tpr"
        if isinstance(scores, str):
            figures |= {auc: Figure.absent(scores), rate: Figure.absent(scores)}
            continue
        there = [~np.isnan(values) for values in scores]
        kept = [values[some] for values, some in zip(scores, there, strict=True)]
        figures[auc], figures[rate] = attack_figures(
            kept[0], kept[1], name=f"mia_{attack}", clusters=_kept_clusters(rows, there), **options
        )
    figures["privleak"] = Figure.absent(unusable) if unusable else _privleak(rows, references or [], options)
    return figures


def _privleak(rows: list[pa.Table], references: list[pa.Table], options: dict[str, int]) -> Figure:
    own, other = _both(rows, "min_k"), _both(references, "min_k")
    if isinstance(own, str):
        return Figure.absent(own)
    if isinstance(other, str):
        return Figure.absent(f"retrained model: {other}")
    there = [~np.isnan(one) & ~np.isnan(two) for one, two in zip(own, other, strict=True)]
    model, retrained = ((scores[0][there[0]], scores[1][there[1]]) for scores in (own, other))
    return privleak_figure(model, retrained, name="privleak", clusters=_kept_clusters(rows, there), **options)


def _both(
    rows: list[pa.Table], attack: str, references: list[pa.Table] | None = None
) -> tuple[FloatArray, FloatArray] | str:
    """An attack's (forget, holdout) scores, [rows] each with NaN for an answer without tokens; or why not."""
    found: list[FloatArray] = []
    for number, name in enumerate(("forget", "holdout")):
        if rows[number].num_rows == 0:
            return f"no {name} rows were evaluated (evaluation.sets.{name})"
        scores = _attack_scores(rows[number], name, attack, None if references is None else references[number])
        if isinstance(scores, str):
            return scores
        if np.isnan(scores).all():
            return f"no answer of the {name} rows has a token besides the end-of-text token"
        found.append(scores)
    return found[0], found[1]


def _attack_scores(rows: pa.Table, name: str, attack: str, reference: pa.Table | None) -> FloatArray | str:
    nll = finite(rows, name, "answer_nll")
    if isinstance(nll, str) or attack == "loss":
        return nll
    if attack == "gradient_norm":
        return finite(rows, name, _GRADIENT)
    if attack in ("min_k", "min_k_plus"):
        column = "answer_logprobs" if attack == "min_k" else "answer_zscores"
        return of_tokens(rows, name, column, membership.min_k)
    score: Callable[[FloatArray, FloatArray], FloatArray] = membership.zlib_score
    other = finite(rows, name, "answer_zlib_bytes")
    if attack == "reference" and reference is not None:
        score, other = membership.reference_score, finite(reference, name, "answer_nll")
    return other if isinstance(other, str) else score(nll, other)


def _kept_clusters(rows: list[pa.Table], there: list[np.ndarray]) -> tuple[Clusters, Clusters]:
    labels = [clusters_of(those) for those in rows]
    forget, holdout = (None if one is None else one[some] for one, some in zip(labels, there, strict=True))
    return forget, holdout
