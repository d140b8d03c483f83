"""When generations are degenerate: against closed forms and known truth, from metrics as recorded."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ofmu_ray.commandline.terminal import metrics_table
from ofmu_ray.metrics.degeneration import SoundRange, failed_measures, ngram_entropy, ngram_variety, words
from ofmu_ray.metrics.fronts import plain
from ofmu_ray.metrics.generations import damaged_words, sound_generations
from ofmu_ray.metrics.summary import summarise
from ofmu_ray.metrics.tofu import forgetting_words, level_words
from ofmu_ray.reporting.samples import sample_rows

RETRAINED = SoundRange(
    "retrained", {"repetition": (0.0, 0.0, 0.04), "empty": (0.02, 0.0, 0.05), "ngram_variety": (0.9, 0.85, 0.95)}
)


LARGEST = (math.log2(11) + 2 * math.log2(10)) / 3
"""Largest entropy of a text of 12 tokens."""


def metrics_of(**values: tuple[float, float, float]) -> dict[str, Any]:
    ends = zip(("", "_low", "_high"), zip(*values.values(), strict=True), strict=True)
    return {f"forget_{name}{end}": value for end, ends_of in ends for name, value in zip(values, ends_of, strict=True)}


def test_the_interval_of_the_difference_decides() -> None:
    """Independent normal estimates: half-widths add in quadrature, so a difference of 0.07 is just too small here."""
    half = 0.05 * math.sqrt(2)
    for gap, failed in ((half - 1e-9, ()), (half + 1e-9, ("ngram_variety",))):
        value = 0.9 - gap
        assert failed_measures(metrics_of(ngram_variety=(value, value - 0.05, value + 0.05)), RETRAINED) == failed
    assert failed_measures(metrics_of(ngram_variety=(1.0, 0.99, 1.0), repetition=(0.0, 0.0, 0.0)), RETRAINED) == ()
    both = metrics_of(repetition=(0.76, 0.7, 0.8), empty=(0.02, 0.0, 0.1), ngram_variety=(0.3, 0.2, 0.4))
    assert failed_measures(both, RETRAINED) == ("repetition", "ngram_variety")


def test_an_unnoticeable_difference_is_not_degenerate() -> None:
    """Both are certain: 1.2 % of repeated 4-grams (the retrained model has 0.2 %), and 6 %."""
    certain = SoundRange("retrained", {"repetition": (0.002, 0.001, 0.003)})
    assert failed_measures(metrics_of(repetition=(0.012, 0.006, 0.020)), certain) == ()
    assert failed_measures(metrics_of(repetition=(0.06, 0.05, 0.07)), certain) == ("repetition",)


def test_what_is_not_measured_is_not_known() -> None:
    assert failed_measures({}, RETRAINED) is None
    assert failed_measures({"forget_repetition": 0.9, "forget_repetition_low": None}, RETRAINED) is None
    assert failed_measures(metrics_of(repetition=(0.9, 0.8, 1.0)), None) is None
    assert words({}, RETRAINED) is None


def test_the_verdict_in_words() -> None:
    loud = metrics_of(repetition=(0.76, 0.7, 0.8), empty=(0.0, 0.0, 0.0), ngram_variety=(0.9, 0.85, 0.95))
    assert words(loud, RETRAINED) == "answers to forget prompts: repetition 0.76 (retrained 0.00): degenerate"
    calm = metrics_of(repetition=(0.01, 0.0, 0.02))
    assert words(calm, RETRAINED) == "answers to forget prompts: repetition 0.01 (retrained 0.00): not degenerate"


def rows(name: str, rng: np.random.Generator, size: int = 100, loud: float = 0.02, tokens: int = 12) -> pa.Table:
    """Generations of a set: a share `loud` of them repeats itself, with lower entropy."""
    bad = rng.random(size) < loud
    return pa.table(
        {
            "row_id": [f"{name}-{index}" for index in range(size)], "set": [name] * size, "index": range(size),
            "generated_empty": rng.random(size) < 0.01, "repetition": np.where(bad, rng.uniform(0.4, 0.9, size), 0.0),
            "generated_entropy": np.where(bad, 1.0, LARGEST - rng.exponential(0.05, size)),
            "generated_tokens": [tokens] * size,
        }
    )  # fmt: skip


def judged(table: pa.Table) -> dict[str, Any]:
    return plain({name: value.to_json() for name, value in summarise(table, bootstrap_samples=200).items()})


@pytest.mark.slow
@pytest.mark.parametrize(("loud", "least", "most"), [(0.02, 0, 10), (0.4, 100, 100)])
def test_equally_good_models_are_rarely_marked_and_broken_ones_always(loud: float, least: int, most: int) -> None:
    """Of 100 pairs. Marking values outside the other's interval would mark one equal pair in five."""
    rng = np.random.default_rng(0)
    marked = outside = 0
    for _ in range(100):
        sound = sound_generations(None, rows("forget", rng), bootstrap_samples=200)
        metrics = judged(rows("forget", rng, loud=loud))
        marked += bool(failed_measures(metrics, sound))
        assert sound is not None
        outside += any(
            metrics[f"forget_{name}"] > high if name != "ngram_variety" else metrics[f"forget_{name}"] < low
            for name, (_, low, high) in sound.bounds.items()
        )
    assert least <= marked <= most
    assert outside >= (15 if loud < 0.1 else 100)


def test_variety_does_not_ask_for_length() -> None:
    """A text without a repeated bigram has full variety, whatever its length; one word over and over has none.

    The entropy alone would mark the built-in target compared with the retrained model, whose answers are longer.
    """
    texts = [list(range(12)), list(range(40)), [1, 2, 3], [7], [], [5] * 30]
    entropy = np.array([ngram_entropy(text) for text in texts])
    variety = ngram_variety(entropy, np.array([float(len(text)) for text in texts]))
    assert variety.tolist() == pytest.approx([1, 1, 1, 1, 1, 0])
    half = ngram_variety(np.array([ngram_entropy([1, 2, 3, 4] * 3)]), np.array([12.0]))
    assert 0.5 < half[0] < 0.7
    assert np.isnan(ngram_variety(np.array([np.nan]), np.array([4.0])))[0]


def test_nothing_but_zeros_has_an_interval_too() -> None:
    """The resampled interval of 100 zeros has no width; four repetitive rows in a hundred prove nothing."""
    silent = rows("forget", np.random.default_rng(0), loud=0.0)
    sound = sound_generations(None, silent, bootstrap_samples=50)
    assert sound is not None
    assert sound.bounds["repetition"] == (0.0, 0.0, pytest.approx(0.0362, abs=1e-4))  # Clopper and Pearson of 0 in 100
    assert failed_measures(metrics_of(repetition=(0.04, 0.01, 0.08)), sound) == ()
    assert failed_measures(metrics_of(repetition=(0.09, 0.04, 0.15)), sound) == ("repetition",)


def test_without_a_retrained_model_the_target_on_rows_that_it_never_saw() -> None:
    rng = np.random.default_rng(0)
    forget, retain, holdout = rows("forget", rng, loud=0.9), rows("retain", rng), rows("holdout", rng, loud=0.1)
    target = pa.concat_tables([forget, retain, holdout])
    sound = sound_generations(target, None, bootstrap_samples=20)
    assert sound is not None
    assert sound.of == "target on holdout rows"
    assert sound.bounds["repetition"][0] == pytest.approx(np.mean(holdout["repetition"].to_numpy()))
    without = sound_generations(pa.concat_tables([forget, retain]), None, bootstrap_samples=20)
    assert without is not None
    assert without.of == "target on retain rows"
    assert sound_generations(forget, None) is None
    assert sound_generations(target, forget, bootstrap_samples=20, longest=12) is not None
    assert sound_generations(target, forget, bootstrap_samples=20, longest=11) is None  # cut off: not comparable


def table_of(repetition: list[float], empty: list[bool]) -> pa.Table:
    return pa.table({"set": ["forget"] * len(empty), "repetition": repetition, "generated_empty": empty})


def test_damaged_answers_are_counted() -> None:
    broken, sound = table_of([0.9, 0.2, 0.1, 0.0], [False, False, False, True]), table_of([0.0] * 4, [False] * 4)
    assert damaged_words(broken, sound, ("repetition",)) == (
        "answers to forget prompts: 2 of 4 repeat themselves, 1 are empty; the retrained model: 0: "
        "degenerate (repetition)"
    )
    assert damaged_words(sound, None, ()) == "answers to forget prompts: 0 of 4 repeat themselves: not degenerate"
    assert damaged_words(sound, None, None) == "answers to forget prompts: 0 of 4 repeat themselves"
    assert damaged_words(pa.table({"set": ["forget"]}), None, None) is None


def test_forget_quality_as_a_verdict() -> None:
    words = {value: forgetting_words({"value": value}) for value in (0.31, 2.7e-14, 0.05)}
    assert words[0.31] == "p = 0.31: not distinguishable from the retrained model (p > 0.05)"
    assert words[2.7e-14] == "p = 2.7e-14: distinguishable from the retrained model (p <= 0.05)"
    assert words[0.05] == "p = 0.05: distinguishable from the retrained model (p <= 0.05)"
    assert forgetting_words({"value": None, "reason": "no retrained model"}) == (
        "no verdict on forgetting: no retrained model"
    )
    assert forgetting_words(None) is None


def test_the_level_as_a_verdict() -> None:
    table = pa.table({"set": ["forget"] * 40 + ["retain"], "answer_nll": [1.7, 1.9] * 20 + [0.0]})

    def words(level: float | None, of: pa.Table = table) -> str | None:
        return level_words(of, level, samples=200, seed=0)

    beyond = words(0.89)
    assert beyond is not None
    shown = re.fullmatch(r"forget answers: 1\.80 \[(.+), (.+)\] nats per token, beyond the level of 0\.89", beyond)
    assert shown is not None
    low, high = map(float, shown.groups())
    assert 1.75 < low < 1.80 < high < 1.85
    assert (words(1.8) or "").endswith(", at the level of 1.80")
    assert (words(5.0) or "").endswith(", short of the level of 5.00")
    assert words(None) is None
    assert words(0.89, table.slice(40)) is None
    clustered = table.append_column("cluster", pa.array((["a", "b"] * 20) + ["c"]))  # two clusters, 1.7 and 1.9
    assert "[1.70, 1.90]" in (words(0.89, clustered) or "")


def test_samples_are_chosen_by_damage() -> None:
    def rows(rouge: list[float], repetition: list[float], name: str) -> pa.Table:
        ids = [f"{name}-{index}" for index in range(3)]
        columns = {"row_id": ids, "set": [name] * 3, "rouge_l_recall": rouge, "repetition": repetition}
        return pa.table(columns | {"generated_empty": [False] * 3})

    def shown(name: str, before: list[float], after: list[float], repetition: list[float]) -> list[str]:
        tables = {"before": rows(before, [0.0] * 3, name), "after": rows(after, repetition, name)}
        return [row.row_id for row in sample_rows(tables, {}, 2, reveal=False)[name]]

    assert shown("forget", [1.0] * 3, [0.0, 0.9, 0.9], [0.0, 0.1, 0.9]) == [
        "forget-2",
        "forget-1",
    ]  # forgetting is wanted
    assert shown("retain", [1.0] * 3, [0.9, 0.2, 1.0], [0.0, 0.0, 0.3]) == ["retain-1", "retain-2"]
    assert shown("retain", [1.0] * 3, [1.0] * 3, [0.0] * 3) == ["retain-0", "retain-1"]


def test_samples_of_texts_are_continuations() -> None:
    """The end of what the model read, and the beginning of how the text goes on."""
    long, more = "the beginning " + "x" * 200 + " the end", "goes on" + "y" * 700
    table = pa.table({"row_id": ["retain-0"], "set": ["retain"], "kind": ["text"], "generated": ["goes off"]})
    (sample,) = sample_rows({"after": table}, {"retain-0": (long, more)}, 2, reveal=False)["retain"]
    assert sample.continues
    assert sample.question is not None
    assert sample.answer is not None
    assert sample.question.startswith("…x")
    assert sample.question.endswith("x the end")
    assert (sample.answer[:7], sample.answer[-2:], len(sample.answer)) == ("goes on", "y…", 601)
    (plain,) = sample_rows(
        {"after": table.set_column(2, "kind", [["qa"]])}, {"retain-0": (long, more)}, 2, reveal=False
    )["retain"]
    assert (plain.question, plain.answer, plain.continues) == (long, more, False)
    private = pa.table({"row_id": ["forget-0"], "set": ["forget"], "kind": ["text"], "generated": ["secret"]})
    (hidden,) = sample_rows({"after": private}, {"forget-0": (long, more)}, 2, reveal=False)["forget"]
    assert (hidden.row_id, hidden.question, hidden.answer, hidden.generations["after"].text) == (
        "forget-0",
        *[None] * 3,
    )


def test_the_terminal_gives_intervals_their_values_digits_and_a_reason_for_what_is_missing() -> None:
    def metric(value: float | None, *bounds: float) -> dict:
        return {"value": value, "low": bounds[0], "high": bounds[1]} if bounds else {"value": None, "reason": "no rows"}

    after = {"forget_quality": metric(2.74e-14, 2.9e-19, 7.44e-12), "model_utility": metric(0.7791, 0.76, 0.8)}
    after |= {"forget_probability": metric(0.00326, 0.0024, 0.0044), "retain_probability": metric(None)}
    text = metrics_table({"after": after})
    assert "2.7e-14 [2.9e-19, 7.4e-12]" in text
    assert "0.779 [0.760, 0.800]" in text
    assert "0.00326 [0.00240, 0.00440]" in text
    assert text.splitlines()[-1] == "- Retain probability: no rows"
