"""Each metric against independent numbers: by hand, SciPy, brute force, and the TOFU release's."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ofmu_ray.errors import UserError
from ofmu_ray.evaluation import tofu_log
from ofmu_ray.metrics import functions as metrics
from ofmu_ray.metrics import intervals
from ofmu_ray.metrics.rouge import rouge_l_recall

# ------------------------------------------------------------------------------------------------- by hand


def test_probability_by_hand() -> None:
    assert metrics.probability([0.0, math.log(4)]) == pytest.approx([1.0, 0.25])


def test_options_probability_by_hand() -> None:
    # P = 1/2 for the right answer, 1/4 and 1/8 for the wrong ones; the second row has one wrong answer of 1/2
    right = [math.log(2), math.log(2)]
    wrong = metrics.pad_ragged([[math.log(4), math.log(8)], [math.log(2)]])
    assert metrics.options_probability(right, wrong) == pytest.approx([0.5 / 0.875, 0.5])


def test_options_probability_survives_underflow() -> None:
    assert metrics.options_probability([5000.0, 5000.0], [[5000.0], [1.0]]) == pytest.approx([0.5, 0.0])


def test_truth_ratio_by_hand() -> None:
    # P(paraphrase) = 1/2; wrong: 1/2 and 1/8 -> geometric mean 1/4, arithmetic mean 5/16
    right, wrong = [math.log(2)], [[math.log(2), math.log(8)]]
    assert metrics.truth_ratio(right, wrong) == pytest.approx([0.5])
    assert metrics.truth_ratio(right, wrong, mean="arithmetic") == pytest.approx([0.625])


def test_truth_ratio_against_products_of_probabilities() -> None:
    rng = np.random.default_rng(0)
    right, wrong = rng.exponential(2, 50), rng.exponential(2, (50, 5))
    products = stats.gmean(np.exp(-wrong), axis=1) / np.exp(-right)
    assert metrics.truth_ratio(right, wrong) == pytest.approx(products)
    arithmetic = metrics.truth_ratio(right, wrong, mean="arithmetic")
    assert arithmetic == pytest.approx(np.exp(-wrong).mean(axis=1) / np.exp(-right))
    assert (arithmetic >= products).all()


def test_rows_without_wrong_answers_are_not_a_number() -> None:
    wrong = metrics.pad_ragged([None, [1.0, 3.0]])
    assert np.isnan(metrics.truth_ratio([1.0, 1.0], wrong)).tolist() == [True, False]
    assert np.isnan(metrics.options_probability([1.0, 1.0], wrong)).tolist() == [True, False]


def test_truth_ratio_scores_by_hand() -> None:
    assert metrics.closer_to_1([0.5, 1.0, 4.0, 0.0]) == pytest.approx([0.5, 1.0, 0.25, 0.0])
    assert metrics.true_better([0.5, 1.0, 4.0, 0.0]) == pytest.approx([0.5, 0.0, 0.0, 1.0])


def test_model_utility_against_scipy() -> None:
    nine = np.random.default_rng(1).uniform(0.01, 1, (20, 9))
    assert metrics.model_utility(nine) == pytest.approx(stats.hmean(nine, axis=1))
    assert metrics.model_utility(nine[0]) == pytest.approx(stats.hmean(nine[0]))
    nine[0, 3] = 0.0
    assert metrics.model_utility(nine[0]) == 0.0


def _ks_by_hand(a: list[float], b: list[float]) -> tuple[float, float]:
    """Statistic from its definition; p-value by enumerating every split of the pooled values."""

    def distance(first: list[float], second: list[float]) -> float:
        return max(
            abs(sum(x <= level for x in first) / len(first) - sum(x <= level for x in second) / len(second))
            for level in first + second
        )

    pooled, observed = a + b, distance(a, b)
    splits = list(itertools.combinations(range(len(pooled)), len(a)))
    extreme = sum(
        distance([pooled[i] for i in split], [pooled[i] for i in range(len(pooled)) if i not in split])
        >= observed - 1e-12
        for split in splits
    )
    return extreme / len(splits), observed


def test_forget_quality_against_enumeration() -> None:
    rng = np.random.default_rng(2)
    for shift in (0.0, 1.0, 3.0):
        a, b = list(rng.normal(size=6)), list(rng.normal(size=5) + shift)
        assert metrics.forget_quality(a, b) == pytest.approx(_ks_by_hand(a, b))


def test_forget_quality_is_the_same_for_reciprocals() -> None:
    a, b = np.random.default_rng(3).lognormal(size=(2, 300)) * np.array([[1.0], [1.3]])
    assert metrics.forget_quality(a, b) == pytest.approx(metrics.forget_quality(1 / a, 1 / b))


def test_repetition_by_hand() -> None:
    assert metrics.repetition([1, 2, 3]) == 0.0
    assert metrics.repetition([1, 2, 3, 4, 5]) == 0.0
    assert metrics.repetition([7] * 8) == pytest.approx(4 / 5)  # five 4-grams, one of them distinct


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence by trying every subsequence of `a`."""
    for length in range(len(a), 0, -1):
        for chosen in itertools.combinations(a, length):
            rest = iter(b)
            if all(word in rest for word in chosen):
                return length
    return 0


def test_rouge_against_brute_force() -> None:
    # words of three letters are not stemmed
    words, rng = ["cat", "dog", "fox", "hen", "owl"], random.Random(4)
    references = [[rng.choice(words) for _ in range(rng.randint(1, 8))] for _ in range(60)]
    generated = [[rng.choice(words) for _ in range(rng.randint(0, 9))] for _ in range(60)]
    expected = [
        _common_subsequence(reference, text) / len(reference)
        for reference, text in zip(references, generated, strict=True)
    ]
    recalls = rouge_l_recall([" ".join(text) for text in references], [" ".join(text) for text in generated])
    assert recalls == pytest.approx(expected)


def test_rouge_stems_and_ignores_case() -> None:
    assert rouge_l_recall(["She writes novels."], ["she WRITING novel"]) == [1.0]


# ----------------------------------------------------------------------------------------------- intervals


def test_mean_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(5).beta(2, 3, 400)
    mean = intervals.mean_metric(values, samples=2000, seed=0, name="x")
    reference = stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert mean.value == pytest.approx(values.mean())
    assert (mean.low, mean.high) == pytest.approx((reference.low, reference.high), abs=0.003)
    assert mean.n == 400


def test_intervals_depend_on_seed_and_name_only() -> None:
    values = np.random.default_rng(6).random(50)
    first = intervals.mean_metric(values, samples=100, seed=0, name="x")
    assert intervals.mean_metric(values, samples=100, seed=0, name="x") == first
    assert intervals.mean_metric(values, samples=100, seed=1, name="x") != first
    assert intervals.mean_metric(values, samples=100, seed=0, name="y") != first


def test_resampling_in_blocks_keeps_the_number_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_BLOCK_ELEMENTS", 64)
    blocks = list(intervals._resamples(10, 25, np.random.default_rng(0)))
    assert sum(len(block) for block in blocks) == 25
    assert max(len(block) for block in blocks) == 6


def test_resampled_statistics_are_those_of_scipy() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=40).round(1), rng.normal(size=40).round(1) + 0.5  # rounded: with ties
    draws = rng.integers(0, 40, size=(30, 40))
    expected = [stats.ks_2samp(a[draw], b[draw]).statistic for draw in draws]
    assert intervals._ks_statistics(a, b, intervals._counts(draws, 40)) == pytest.approx(expected)


def test_forget_quality_interval() -> None:
    rng = np.random.default_rng(8)
    a = rng.lognormal(size=60)
    same, _ = intervals.forget_quality_metrics(a, a, samples=50, seed=0, name="fq")
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)  # a row's two ratios are drawn together
    apart, statistic = intervals.forget_quality_metrics(a, a * 30, samples=200, seed=0, name="fq")
    assert apart.value == pytest.approx(stats.ks_2samp(a, a * 30).pvalue)
    assert apart.low is not None
    assert apart.high is not None
    assert apart.low <= apart.value < apart.high < 1e-6
    assert statistic.value == pytest.approx(stats.ks_2samp(a, a * 30).statistic)


def test_utility_interval_contains_the_utility() -> None:
    rng = np.random.default_rng(9)
    sets = {name: [rng.beta(4, 2, rows) for _ in range(3)] for name, rows in (("a", 100), ("b", 50), ("c", 80))}
    utility = intervals.utility_metric(sets, samples=500, seed=0, name="mu")
    means = [column.mean() for columns in sets.values() for column in columns]
    assert utility.value == pytest.approx(stats.hmean(means))
    assert utility.n == 230
    assert utility.low is not None
    assert utility.high is not None
    # delta method: the deviation of hmean follows from the columns' deviations (independent here)
    variance = sum(
        (utility.value**2 / 9 / column.mean() ** 2) ** 2 * column.var() / len(column)
        for columns in sets.values()
        for column in columns
    )
    assert utility.high - utility.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.15)


def test_metrics_as_json() -> None:
    assert intervals.MetricValue(0.5, 0.4, 0.6, 9).to_json() == {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    assert intervals.MetricValue.absent("why").to_json() == {"value": None, "reason": "why"}


# --------------------------------------------------------------------------------------- the TOFU release's logs

_EXPECTED_NAMES = {
    "forget_quality": "Forget Quality",
    "ks_statistic": "KS statistic",
    "model_utility": "Model Utility",
    **{
        f"{part}_{metric}": f"{shown} {title}"
        for part, title in (
            ("forget", "Forget"),
            ("retain", "Retain"),
            ("real_authors", "Real Authors"),
            ("world_facts", "Real World"),
        )
        for metric, shown in (("probability", "Prob."), ("rouge", "ROUGE"), ("truth_ratio", "Truth Ratio"))
    },
}


@pytest.fixture(scope="module")
def logs(shared_dir: Path) -> dict[str, dict]:
    folder = shared_dir / "golden" / "tofu_eval_logs"
    return {name: tofu_log.load_log(folder / f"llama2-7b_{name}.json") for name in ("full", "retain90")}


@pytest.mark.parametrize("model", ["full", "retain90"])
def test_golden_numbers(logs: dict[str, dict], shared_dir: Path, model: str) -> None:
    expected = json.loads((shared_dir / "golden" / "tofu_expected.json").read_text())[f"{model}_vs_retain90"]
    metrics_of_log = tofu_log.tofu_metrics(logs[model], logs["retain90"])
    assert metrics_of_log.keys() == _EXPECTED_NAMES.keys()
    for name, value in metrics_of_log.items():
        assert value == pytest.approx(expected[_EXPECTED_NAMES[name]], rel=1e-6, abs=1e-12), name


@pytest.mark.parametrize("model", ["full", "retain90"])
def test_rouge_of_stored_generations(logs: dict[str, dict], model: str) -> None:
    recomputed = tofu_log.recomputed_rouge(logs[model])
    for part, key in tofu_log.PARTS.items():
        assert recomputed[part] == pytest.approx(list(logs[model][key]["rougeL_recall"].values()), abs=1e-6), part


def test_without_retrained_log(logs: dict[str, dict]) -> None:
    metrics_of_log = tofu_log.tofu_metrics(logs["full"])
    assert metrics_of_log["forget_quality"] is None
    assert metrics_of_log["ks_statistic"] is None
    assert metrics_of_log["model_utility"] is not None


def test_damaged_logs_are_refused_with_the_missing_part(logs: dict[str, dict], tmp_path: Path) -> None:
    complete = logs["full"]
    forget, secret = complete["eval_log_forget.json"], "a secret text"

    def damaged(**changes: object) -> dict:
        return {**complete, "eval_log_forget.json": {**forget, **changes}}

    cases = [
        ({key: complete[key] for key in complete if key != "eval_log.json"}, r"'eval_log.json' \(retain\) is missing"),
        (damaged(avg_gt_loss={}), "has no rows of 'avg_gt_loss'"),
        (damaged(avg_gt_loss={**forget["avg_gt_loss"], "0": secret}), "avg_gt_loss row 0 is not a finite number"),
        (damaged(avg_gt_loss={**forget["avg_gt_loss"], "7": float("nan")}), "avg_gt_loss row 7 is not a finite number"),
        (damaged(average_perturb_loss={**forget["average_perturb_loss"], "3": []}), "row 3 is not a list"),
        (damaged(rougeL_recall={"0": 1.0}), "have different rows"),
    ]
    for log, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            tofu_log.tofu_metrics(log, name="the log")
        assert secret not in str(caught.value)
    with pytest.raises(UserError, match="is not JSON"):
        tofu_log.load_log(_written(tmp_path, "{"))
    with pytest.raises(UserError, match="contains a list"):
        tofu_log.load_log(_written(tmp_path, "[]"))
    with pytest.raises(UserError, match="cannot read the log"):
        tofu_log.load_log(tmp_path / "absent.json")


@pytest.mark.system
def test_metrics_need_no_torch_and_no_ray() -> None:
    code = (
        "import sys, ofmu_ray.evaluation.tofu_log, ofmu_ray.metrics.summary; "
        "sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _written(folder: Path, text: str) -> Path:
    path = folder / "log.json"
    path.write_text(text)
    return path
