"""Bootstrap by clusters against a slow loop, seeds, probes, and the metrics of a complete table."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from metric_names import LISTED, MEMBERSHIP
from scipy import stats
from sklearn.metrics import roc_auc_score

from ofmu_ray.data.evaluation_rows import evaluation_rows
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.rows import MEASURED, with_row_metrics
from ofmu_ray.metrics import functions as metrics
from ofmu_ray.metrics import intervals, membership, memorisation
from ofmu_ray.metrics.summary import summarise
from ofmu_ray.reporting.formats import DOWN, MATCH, UP, direction, label

# ------------------------------------------------------------------------------------------------- by clusters

LABELS = np.repeat(["a", "b", "c", "d", "e", "f"], [1, 2, 3, 5, 8, 13])


def _draws(seed: int, name: str, samples: int, *units: int) -> list[list[np.ndarray]]:
    """The units drawn in each resample, from the same random stream as the metrics."""
    import zlib

    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    blocks = [rng.integers(0, count, size=(samples, count)) for count in units]
    return [[block[sample] for block in blocks] for sample in range(samples)]


def _rows(drawn: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Row numbers of the drawn clusters, one cluster after the other."""
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.concatenate([groups[unit] for unit in drawn])


def _bounds(values: list[float], value: intervals.MetricValue) -> None:
    low, high = np.percentile(values, [2.5, 97.5])
    assert value.value is not None
    assert (value.low, value.high) == pytest.approx((min(low, value.value), max(high, value.value)))


def test_cluster_means_against_a_loop() -> None:
    values = np.random.default_rng(0).normal(size=len(LABELS))
    mean = intervals.mean_metric(values, samples=60, seed=3, name="x", clusters=LABELS)
    _bounds([values[_rows(drawn, LABELS)].mean() for (drawn,) in _draws(3, "x", 60, 6)], mean)
    assert (mean.n, mean.clusters) == (32, 6)


def test_cluster_quality_against_a_loop() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=32).round(1), rng.normal(size=32).round(1) + 0.4
    values = intervals.forget_quality_metrics(a, b, samples=60, seed=3, name="x", clusters=LABELS)
    tests = []
    for (drawn,) in _draws(3, "x", 60, 6):
        rows = _rows(drawn, LABELS)
        tests.append(stats.ks_2samp(a[rows], b[rows]))
    _bounds([float(test.pvalue) for test in tests], values[0])
    _bounds([float(test.statistic) for test in tests], values[1])


def test_cluster_auc_and_privleak_against_a_loop() -> None:
    rng = np.random.default_rng(2)
    forget, holdout, other = rng.normal(size=32), rng.normal(size=20) + 0.5, np.repeat(["p", "q", "r", "s"], 5)
    options: dict[str, Any] = {"samples": 60, "seed": 3, "name": "x", "clusters": (LABELS, other)}
    auc, rate = intervals.attack_metrics(forget, holdout, **options)
    retrained = forget + 0.5, holdout
    leak = intervals.privleak_metric((forget, holdout), retrained, **options)
    areas, rates, leaks = [], [], []
    for one, two in _draws(3, "x", 60, 6, 4):
        members, others = _rows(one, LABELS), _rows(two, other)
        labels = [0] * len(members) + [1] * len(others)
        areas.append(float(roc_auc_score(labels, [*forget[members], *holdout[others]])))
        rates.append(membership.tpr_at_fpr(forget[members], holdout[others]))
        reference = float(roc_auc_score(labels, [*retrained[0][members], *holdout[others]]))
        leaks.append(100 * (reference - areas[-1]) / (1 - reference))
    _bounds(areas, auc)
    _bounds(rates, rate)
    _bounds(leaks, leak)
    assert auc.clusters == 10


def test_cluster_utility_against_a_loop() -> None:
    rng = np.random.default_rng(3)
    one, two = [rng.uniform(0.2, 0.9, 32) for _ in range(3)], [rng.uniform(0.2, 0.9, 10) for _ in range(3)]
    one[2][:4] = np.nan
    estimate = intervals.utility_estimate(
        {"one": one, "two": two}, samples=60, seed=3, name="x", clusters={"one": LABELS}
    )
    utilities = []
    for drawn, single in _draws(3, "x", 60, 6, 10):
        rows = _rows(drawn, LABELS)
        means = [np.nanmean(values[rows]) for values in one] + [values[single].mean() for values in two]
        utilities.append(float(stats.hmean(means)))
    _bounds(utilities, estimate.metric_value())
    assert (estimate.n, estimate.clusters) == (42, 6)


def test_rows_alike_within_clusters_widen_the_interval() -> None:
    """Twenty equal rows per author are as much evidence as one: the interval of 400 rows is that of 20."""
    authors = np.random.default_rng(4).normal(size=20)
    values, labels = np.repeat(authors, 20), np.repeat(np.arange(20), 20)
    wide = intervals.mean_metric(values, samples=1000, seed=0, name="x", clusters=labels)
    alone = intervals.mean_metric(authors, samples=1000, seed=0, name="x")
    narrow = intervals.mean_metric(values, samples=1000, seed=0, name="x")
    assert (wide.low, wide.high) == pytest.approx((alone.low, alone.high))
    assert None not in (wide.low, wide.high, narrow.low, narrow.high)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)  # type: ignore[operator]


def test_one_cluster_has_no_interval() -> None:
    value = intervals.mean_metric(np.arange(5.0), samples=10, seed=0, name="x", clusters=np.array(["a"] * 5))
    assert value.to_json().keys() == {"value", "low", "high", "n", "clusters", "reason"}
    assert (value.value, value.low, value.high, value.n, value.clusters) == (2.0, None, None, 5, 1)
    assert "cannot be resampled" in str(value.reason)


def test_exact_ks_p_values() -> None:
    for n in (1, 7, 40, 400):
        for distance in {1, max(n // 20, 1), n // 3, n // 2, n} - {0}:
            p_value = metrics.exact_ks_p_value(distance / n, n)
            steps = [(-1) ** (j + 1) * math.comb(2 * n, n - j * distance) for j in range(1, n // distance + 1)]
            assert p_value == pytest.approx(float(Fraction(2 * sum(steps), math.comb(2 * n, n))), rel=1e-10)
            if n >= 40 and distance > 1:  # below, SciPy's sum rounds to more than 1 and it takes the asymptotic formula
                a = np.arange(n, dtype=float)
                b = np.concatenate([a[distance:], np.full(distance, 2.0 * n)])
                assert p_value == pytest.approx(stats.ks_2samp(a, b).pvalue, rel=1e-9), (n, distance)
    assert metrics.exact_ks_p_value(0.0, 7) == 1.0


# ---------------------------------------------------------------------------------------------- seeds and variances


def test_over_seeds() -> None:
    values = [0.61, 0.55, 0.70, 0.64]
    mean = intervals.over_seeds(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (mean.value, mean.low, mean.high) == pytest.approx((np.mean(values), low, high))
    assert mean.n == 4
    single = intervals.over_seeds([0.61])
    assert (single.value, single.low, single.high, single.n) == (0.61, None, None, 1)
    assert "one seed" in str(single.to_json()["reason"])
    assert intervals.over_seeds([]).value is None


def test_variance_over_probes() -> None:
    one, two = (intervals.ResampledValue(value, np.array([value, value + 0.1]), 5) for value in (0.2, 0.6))
    variance = intervals.variance_metric([one, two])
    assert variance.value == pytest.approx(0.08)
    assert (variance.low, variance.high, variance.n) == pytest.approx((0.08, 0.08, 2))
    assert intervals.variance_metric([one]).value is None


# ----------------------------------------------------------------------------------------------- a complete table


def _table(seed: int, sizes: dict[str, int], clusters: dict[str, int] | None = None) -> pa.Table:
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    for name, rows in sizes.items():
        plain = name in ("real_authors", "world_facts", "holdout") or "_" in name
        for index in range(rows):
            tokens = 1 + index % 9
            logprobs = rng.exponential(1.0, tokens)
            records.append(
                {
                    "row_id": f"{name}-{index}",
                    "set": name,
                    "index": index,
                    "answer_nll": float(logprobs.mean()),
                    "answer_tokens": tokens,
                    "paraphrase_nll": None if plain else float(rng.exponential()),
                    "wrong_nll": rng.exponential(1.2, 3).tolist(),
                    "rouge_l_recall": float(rng.uniform()),
                    "generated_tokens": int(rng.integers(0, 30)),
                    "generated_empty": bool(rng.integers(0, 2)),
                    "repetition": float(rng.uniform()),
                    "generated_entropy": float(rng.uniform(0, 5)),
                    "answer_logprobs": (-logprobs).tolist(),
                    "answer_matches": rng.integers(0, 2, tokens).astype(bool).tolist(),
                    "answer_zscores": rng.normal(size=tokens).tolist(),
                    "answer_zlib_bytes": int(rng.integers(20, 60)),
                    "cluster": str(index // clusters[name]) if clusters and name in clusters else None,
                }
            )
    return with_row_metrics(pa.Table.from_pylist(records, schema=MEASURED))


SIZES = {"forget": 40, "retain": 30, "real_authors": 10, "world_facts": 12, "holdout": 25}
PROBES = {"other_words_forget": 12, "other_words_retain": 14, "german_forget": 20, "german_retain": 10}


def _values(table: pa.Table, name: str, column: str) -> list[Any]:
    return [record[column] for record in table.to_pylist() if record["set"] == name]


def test_memorisation_and_degeneration_metrics() -> None:
    table = _table(0, SIZES)
    metrics_of_table = summarise(table, bootstrap_samples=20)
    assert tuple(metrics_of_table) == LISTED + MEMBERSHIP
    matches = [tokens[:-1] for tokens in _values(table, "forget", "answer_matches")]
    strengths = [memorisation.extraction_strength(each) for each in matches]
    assert metrics_of_table["forget_extraction_strength"].value == pytest.approx(np.mean(strengths))
    assert metrics_of_table["forget_extraction_strength"].n == 40
    memorised = [np.mean(each) for each in matches if each]
    assert len(memorised) == 35  # answers with only the end-of-text token are excluded here
    assert metrics_of_table["forget_exact_memorisation"].value == pytest.approx(np.mean(memorised))
    assert metrics_of_table["forget_exact_memorisation"].n == 35
    columns = {"empty": "generated_empty", "repetition": "repetition", "length": "generated_tokens"}
    for name in ("forget", "retain"):
        for metric, column in (columns | {"ngram_entropy": "generated_entropy"}).items():
            assert metrics_of_table[f"{name}_{metric}"].value == pytest.approx(np.mean(_values(table, name, column)))


def test_membership_metrics() -> None:
    table, retrained = _table(0, SIZES), _table(1, SIZES)
    metrics_of_table = summarise(table, retrained, bootstrap_samples=20)

    def lowest(tokens: list[float]) -> float:
        kept = sorted(tokens[:-1])[: max(1, math.floor(0.4 * (len(tokens) - 1)))]
        return -float(np.mean(kept)) if kept else math.nan

    def scores(source: pa.Table, attack: str, name: str) -> np.ndarray:
        nll = np.array(_values(source, name, "answer_nll"))
        return {
            "loss": nll,
            "zlib": nll / np.array(_values(source, name, "answer_zlib_bytes")),
            "reference": nll - np.array(_values(retrained, name, "answer_nll")),
            "min_k": np.array([lowest(tokens) for tokens in _values(source, name, "answer_logprobs")]),
            "min_k_plus": np.array([lowest(tokens) for tokens in _values(source, name, "answer_zscores")]),
        }[attack]

    def auc(source: pa.Table, attack: str) -> tuple[float, float]:
        forget, holdout = (scores(source, attack, name) for name in ("forget", "holdout"))
        forget, holdout = forget[~np.isnan(forget)], holdout[~np.isnan(holdout)]
        area = roc_auc_score([0] * len(forget) + [1] * len(holdout), [*forget, *holdout])
        return float(area), membership.tpr_at_fpr(forget, holdout)

    for attack in ("loss", "zlib", "reference", "min_k", "min_k_plus"):
        values = metrics_of_table[f"mia_{attack}_auc"].value, metrics_of_table[f"mia_{attack}_tpr"].value
        assert values == pytest.approx(auc(table, attack)), attack
    a, r = auc(table, "min_k")[0], auc(retrained, "min_k")[0]
    assert metrics_of_table["privleak"].value == pytest.approx(100 * (r - a) / (1 - r))
    alone = summarise(table, bootstrap_samples=20)
    for name in ("mia_reference_auc", "mia_reference_tpr", "privleak"):
        assert "evaluation.retrained" in str(alone[name].reason)
    other = _table(1, {**SIZES, "holdout": 24})
    assert "other forget or holdout rows" in str(summarise(table, other, bootstrap_samples=5)["privleak"].reason)
    norms = table.append_column("answer_gradient_norm", table["answer_nll"])
    assert summarise(norms, bootstrap_samples=5)["mia_gradient_norm_auc"].value == alone["mia_loss_auc"].value


def test_reports_know_the_direction_of_every_metric() -> None:
    metrics_of_table = summarise(_table(0, SIZES | PROBES), bootstrap_samples=5)
    up = {"model_utility", "retain_extraction_strength", "other_words_utility", "german_utility"}
    up |= {name for name in metrics_of_table if name.endswith("forget_quality")}
    up |= {name for name in LISTED[3:15] if not name.startswith("forget_")}
    down = {name for name in metrics_of_table if name.endswith(("ks_statistic", "_variance"))}
    for name in metrics_of_table:
        match = "0" if name == "privleak" else MATCH
        assert direction(name) == (UP if name in up else DOWN if name in down else match), name
    assert label("mia_min_k_plus_tpr") == "Membership Min-K++ TPR at 1 % FPR"
    assert label("retain_length") == "Retain generated tokens"


def test_only_sets_with_rows_are_listed() -> None:
    metrics_of_table = summarise(_table(0, {"retain": 5}), bootstrap_samples=5)
    assert tuple(metrics_of_table) == tuple(
        name for name in LISTED if not name.startswith("forget_") or name in LISTED[:6]
    )
    without_forget = summarise(_table(0, {"retain": 5, "holdout": 5}), bootstrap_samples=5)
    assert "no forget rows" in str(without_forget["mia_loss_auc"].reason)


def test_tables_of_an_earlier_version_say_so() -> None:
    table = _table(0, SIZES).drop_columns(["answer_matches", "generated_entropy", "cluster"])
    metrics_of_table = summarise(table, bootstrap_samples=5)
    assert "without answer_matches" in str(metrics_of_table["forget_extraction_strength"].reason)
    assert "without generated_entropy" in str(metrics_of_table["retain_ngram_entropy"].reason)
    assert metrics_of_table["forget_repetition"].value is not None


def test_probe_metrics() -> None:
    table, retrained = _table(0, SIZES | PROBES), _table(1, SIZES | PROBES)
    metrics_of_table = summarise(table, retrained, bootstrap_samples=20)
    qualities, utilities = [], []
    for probe in ("other_words", "german"):

        def ratios(source: pa.Table, name: str) -> np.ndarray:
            nll, wrong = (np.array(_values(source, name, column)) for column in ("answer_nll", "wrong_nll"))
            return stats.gmean(np.exp(-wrong), axis=1) / np.exp(-nll)

        test = stats.ks_2samp(ratios(table, f"{probe}_forget"), ratios(retrained, f"{probe}_forget"))
        assert metrics_of_table[f"{probe}_forget_quality"].value == pytest.approx(test.pvalue)
        assert metrics_of_table[f"{probe}_ks_statistic"].value == pytest.approx(test.statistic)
        qualities.append(test.pvalue)
        name = f"{probe}_retain"
        means = [
            np.exp(-np.array(_values(table, name, "answer_nll"))).mean(),
            np.mean(_values(table, name, "rouge_l_recall")),
            np.maximum(0, 1 - ratios(table, name)).mean(),
        ]
        utilities.append(stats.hmean(means))
        assert metrics_of_table[f"{probe}_utility"].value == pytest.approx(utilities[-1])
    assert metrics_of_table["probes_forget_quality_variance"].value == pytest.approx(np.var(qualities, ddof=1))
    assert metrics_of_table["probes_utility_variance"].value == pytest.approx(np.var(utilities, ddof=1))
    alone = summarise(table, bootstrap_samples=5)
    assert "evaluation.retrained" in str(alone["german_forget_quality"].reason)
    assert "evaluation.retrained" in str(alone["probes_forget_quality_variance"].reason)
    half = summarise(_table(0, SIZES | {"german_forget": 20}), retrained, bootstrap_samples=5)
    assert "no german_retain rows" in str(half["german_utility"].reason)
    assert "two probes" in str(half["probes_forget_quality_variance"].reason)


def test_clusters_of_a_table_reach_every_metric() -> None:
    groups = {"forget": 8, "retain": 2, "holdout": 5}
    table, retrained = _table(0, SIZES, groups), _table(1, SIZES, groups)
    metrics_of_table = summarise(table, retrained, bootstrap_samples=20)
    plain = summarise(_table(0, SIZES), _table(1, SIZES), bootstrap_samples=20)
    expected = {"forget_probability": 5, "retain_rouge": 15, "model_utility": 15, "forget_quality": 5, "privleak": 10}
    assert {name: metrics_of_table[name].clusters for name in expected} == expected
    for name, value in metrics_of_table.items():
        assert value.value == pytest.approx(plain[name].value), name
        clustered = not name.startswith(("real_authors", "world_facts"))
        assert (value.clusters is not None) == clustered, name
        assert ((value.low, value.high) == (plain[name].low, plain[name].high)) != clustered, name


# ---------------------------------------------------------------------------------------------- clusters of rows


def test_clusters_of_tofu_are_its_authors(shared_dir: Path) -> None:
    """Every evaluated file contains complete authors, 20 consecutive rows each, in the order of full.json."""
    folder = str(shared_dir / "data" / "tofu")
    authors = {
        (row["question"], row["answer"]): row["cluster"] for row in evaluation_rows("full.json", folder, cluster=20)
    }
    for name in ("forget01", "forget10", "forget01_perturbed", "forget10_perturbed", "retain_perturbed"):
        rows = evaluation_rows(f"{name}.json", folder, cluster=20)
        pairs = {(row["cluster"], authors[row["question"], row["answer"]]) for row in rows}
        assert len(pairs) == len({cluster for cluster, _ in pairs}) == len(rows) // 20, name


def test_clusters_from_a_column_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    people = ["SECRET", "other", "SECRET"]
    path.write_text("".join(f'{{"question": "q", "answer": "a", "who": "{name}"}}\n' for name in people))
    rows = evaluation_rows(str(path), None, cluster="who")
    assert [row["cluster"] for row in rows] == ["0", "1", "0"]
    assert [row["cluster"] for row in evaluation_rows(str(path), None, cluster=2)] == ["0", "0", "1"]
    assert "cluster" not in evaluation_rows(str(path), None)[0]
    with pytest.raises(UserError, match=r"column 'whose' \(evaluation.clusters\) is missing \(row 1"):
        evaluation_rows(str(path), None, cluster="whose")
