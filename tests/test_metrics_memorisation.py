"""Extraction strength, exact memorisation and n-gram entropy against their definitions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ofmu_ray.metrics.degeneration import ngram_entropy
from ofmu_ray.metrics.memorisation import (
    exact_memorisation,
    extraction_strength,
    extraction_strength_with_floor,
)

MATCHES = st.lists(st.booleans(), max_size=12)


def _by_definition(matches: list[bool], last: int) -> float:
    """1 - k*/n with k* = min{k in 0..last: a_t = y_t for all t > k}, or last if there is none."""
    n = len(matches)
    fitting = [k for k in range(last + 1) if all(matches[t - 1] for t in range(k + 1, n + 1))]
    return 1 - min(fitting, default=last) / n


@given(MATCHES.filter(len))
def test_extraction_strength_by_brute_force(matches: list[bool]) -> None:
    n = len(matches)
    assert extraction_strength(matches) == pytest.approx(_by_definition(matches, n))
    assert extraction_strength_with_floor(matches) == pytest.approx(_by_definition(matches, n - 1))


def test_extraction_strength_by_hand() -> None:
    assert extraction_strength([True, False, True, True]) == 0.5
    assert extraction_strength([True, True, True, False]) == 0.0
    assert extraction_strength_with_floor([True, True, True, False]) == 0.25
    assert (extraction_strength([False]), extraction_strength_with_floor([False])) == (0.0, 1.0)  # the peer's defect
    assert (extraction_strength([]), extraction_strength_with_floor([])) == (0.0, 0.0)


@given(MATCHES.filter(len))
def test_bounds_of_memorisation(matches: list[bool]) -> None:
    strength, memorised = extraction_strength(matches), exact_memorisation(matches)
    assert 0 <= strength <= memorised <= 1  # the run at the end is matched
    assert strength <= extraction_strength_with_floor(matches)
    assert (strength == 1) == (memorised == 1) == all(matches)
    assert extraction_strength([False, *matches]) <= strength


def test_exact_memorisation_by_hand() -> None:
    assert exact_memorisation([True, False, True, True]) == 0.75
    assert math.isnan(exact_memorisation([]))


def test_entropy_by_hand() -> None:
    # bigrams ab ba ab: H_2 = log2(3) - 2/3; trigrams aba bab: H_3 = 1
    assert ngram_entropy([1, 2, 1, 2]) == pytest.approx((math.log2(3) - 2 / 3 + 2 * 1.0) / 3)
    assert ngram_entropy([7] * 30) == 0.0
    assert ngram_entropy([1, 2]) == ngram_entropy([1]) == ngram_entropy([]) == 0.0


@given(st.lists(st.integers(0, 3), min_size=3, max_size=30))
def test_entropy_against_scipy(tokens: list[int]) -> None:
    def entropy(n: int) -> float:
        grams = list(zip(*(tokens[shift:] for shift in range(n)), strict=False))
        return float(stats.entropy([grams.count(gram) for gram in set(grams)], base=2))

    # ROME's weights 2/3 and 4/3, averaged over the two
    assert ngram_entropy(tokens) == pytest.approx((2 / 3 * entropy(2) + 4 / 3 * entropy(3)) / 2)
    assert ngram_entropy(tokens) == pytest.approx(ngram_entropy([token + 9 for token in tokens]))
    assert ngram_entropy(tokens) <= math.log2(len(tokens) - 1) + 1e-9
