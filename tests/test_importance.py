"""Importance of options: finds a known order, separates effect from chance, and works with all priors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ofmu_ray.attacks.importance import MINIMUM_TRIALS, Importance, importances

SPACE = [
    {"field": "ofmu.inner.lr", "prior": "loguniform(1e-6, 1e-3)"},
    {"field": "ofmu.inner_steps", "prior": "integer(1, 6)"},
    {"field": "ofmu.beta", "prior": "uniform(0, 1)"},
    {"field": "ofmu.rho", "prior": "zero_or_loguniform(1e-5, 1e-2)"},
    {"field": "ofmu.rho_growth", "prior": "uniform(1, 1.1)", "given": "ofmu.rho"},
    {"field": "ofmu.kind", "prior": "choice(null, cosine)"},
]


def draws(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        rho = 0.0 if rng.random() < 0.4 else float(10 ** rng.uniform(-5, -2))
        options = {
            "ofmu.inner.lr": float(10 ** rng.uniform(-6, -3)), "ofmu.inner_steps": int(rng.integers(1, 7)),
            "ofmu.beta": float(rng.random()), "ofmu.rho": rho, "ofmu.kind": [None, "cosine"][rng.integers(2)],
        }  # fmt: skip
        drawn.append(options | ({"ofmu.rho_growth": float(rng.uniform(1, 1.1))} if rho else {}))
    return drawn


def ranked_options(options: list[dict[str, Any]], goodness: Any, samples: int = 20) -> dict[str, Importance]:
    rows = importances(options, list(goodness), SPACE, samples=samples)
    assert rows is not None
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert [row.share for row in rows] == sorted((row.share for row in rows), reverse=True)
    return {row.option: row for row in rows}


@pytest.mark.slow
def test_the_order_of_a_known_function_is_found() -> None:
    options = draws(60)
    rows = ranked_options(options, [np.log10(o["ofmu.inner.lr"]) + 2 * o["ofmu.inner_steps"] / 5 for o in options], 49)
    assert list(rows)[:2] == ["ofmu.inner.lr", "ofmu.inner_steps"]
    first = rows["ofmu.inner.lr"]
    assert first.low <= first.share <= first.high
    others = [row for name, row in rows.items() if name not in list(rows)[:2]]
    assert first.low > max(row.share for row in others)
    assert first.p_value == pytest.approx(1 / 50)  # as small as 49 shuffles let it be
    assert min(row.p_value for row in others) > 0.1
    assert rows["ofmu.rho_growth"].trials == sum("ofmu.rho_growth" in o for o in options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "effect"),
    [
        ("ofmu.rho", lambda o: float(o["ofmu.rho"] > 0)),  # on or off: zeros under a logarithmic prior
        ("ofmu.kind", lambda o: float(o["ofmu.kind"] is None)),  # null as a choice
        ("ofmu.beta", lambda o: -abs(o["ofmu.beta"] - 0.5)),  # a peak, where rank correlation sees nothing
        ("ofmu.rho_growth", lambda o: o.get("ofmu.rho_growth", 1.05)),  # which only some trials have
    ],
)
def test_each_kind_of_option_can_be_the_first(name: str, effect: Any) -> None:
    options = draws(80, seed=3)
    noise = np.random.default_rng(7).standard_normal(len(options)) * 1e-3
    rows = ranked_options(options, [effect(o) + e for o, e in zip(options, noise, strict=True)])
    assert next(iter(rows)) == name


@pytest.mark.slow
def test_an_outcome_that_no_option_affects_counts_as_chance() -> None:
    rows = ranked_options(draws(40), np.random.default_rng(5).standard_normal(40), samples=50)
    assert min(row.p_value for row in rows.values()) > 0.05


@pytest.mark.slow
def test_only_the_order_counts_and_the_answer_is_the_same_again() -> None:
    options = draws(30)
    goodness = np.array([np.log10(o["ofmu.inner.lr"]) for o in options])
    assert ranked_options(options, goodness) == ranked_options(options, 10**goodness)


def test_too_little_gives_none() -> None:
    options = draws(MINIMUM_TRIALS)
    goodness = [o["ofmu.beta"] for o in options]
    assert importances(options, goodness, SPACE, samples=2) is not None
    assert importances(options[1:], goodness[1:], SPACE) is None
    assert importances(options, [0.5] * len(options), SPACE) is None
    assert importances([{"ofmu.beta": 0.1}] * 30, list(range(30)), SPACE) is None
    assert importances(options, goodness, []) is None
    assert importances([], [], SPACE) is None
