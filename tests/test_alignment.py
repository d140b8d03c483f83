"""Alignment of representations: CKA against the kernel formula, pooling against plain hidden states, real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_models import ARCHITECTURES, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.attacks.alignment import (
    align,
    alignment_table,
    alignment_texts,
    debiased_cka,
    linear_cka,
    representations,
    row_cosines,
)
from ofmu_ray.config import FormatConfig
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.rows import evaluation_rows

TEXTS = [
    Template(tiny_tokenizer(), FormatConfig()).encode(f"who is person {row}?", "the answer " * (1 + row % 4) + str(row))
    for row in range(11)
]
STREAM: dict[str, Any] = {"set_name": "forget", "samples": 100, "seed": 0, "name": "test"}


def _random(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, rows, width]).normal(size=(rows, width)) + 3.0


def _kernel_cka(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with centring matrices and traces."""
    n = len(x)
    centre = np.eye(n) - np.ones((n, n)) / n

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        return float(np.trace(k @ centre @ m @ centre)) / (n - 1) ** 2

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def _unbiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC as the mean over distinct quadruples of rows (the U-statistic itself)."""
    n = len(x)

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        quadruples = [
            k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
            for i in range(n)
            for j in range(n)
            for q in range(n)
            for r in range(n)
            if len({i, j, q, r}) == 4
        ]
        return float(np.mean(quadruples))

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


@given(rows=st.integers(2, 12), p=st.integers(1, 9), q=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_cka_equals_the_kernel_formula(rows: int, p: int, q: int, seed: int) -> None:
    x, y = _random(rows, p, seed), _random(rows, q, seed + 1)
    assert linear_cka(x, y) == pytest.approx(_kernel_cka(x, y), abs=1e-9)
    assert 0 <= linear_cka(x, y) <= 1 + 1e-9


def test_debiased_cka_equals_the_u_statistic() -> None:
    x, y = _random(7, 3), _random(7, 5) + _random(7, 3) @ np.ones((3, 5))
    assert debiased_cka(x @ x.T, y @ y.T, np.ones((1, 7))) == pytest.approx([_unbiased_cka(x, y)])


def test_weights_leave_rows_out() -> None:
    x, y = _random(9, 3), _random(9, 5)
    weights = np.array([[1.0, 0, 1, 1, 0, 1, 1, 1, 0], np.ones(9)])
    rows = weights[0] == 1
    alignment = debiased_cka(x @ x.T, y @ y.T, weights)
    assert alignment == pytest.approx([_unbiased_cka(x[rows], y[rows]), _unbiased_cka(x, y)])


def test_debiased_cka_is_small_for_unrelated_wide_representations() -> None:
    x, y = _random(30, 400, 1), _random(30, 400, 2)
    assert linear_cka(x, y) > 0.8
    row = align([x], [y], **STREAM)[0]
    assert row.cka_debiased.value == pytest.approx(0, abs=0.2)
    assert row.cka_debiased.low is not None
    assert row.cka_debiased.high is not None
    assert row.cka_debiased.low < 0 < row.cka_debiased.high


def test_cka_ignores_rotation_scale_and_shift_and_the_cosine_does_not() -> None:
    x = _random(20, 6)
    rotation = np.linalg.qr(_random(6, 6, 5))[0]
    moved = 2.5 * x @ rotation + 7.0
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, moved) == pytest.approx(1)
    assert linear_cka(x, x * np.arange(1.0, 7.0)) < 0.999  # not any linear map
    assert row_cosines(x, 2.5 * x) == pytest.approx(np.ones(20))
    assert row_cosines(x, x @ rotation).mean() < 0.9
    assert row_cosines(np.array([[1.0, 1.0], [0, 0]]), np.array([[1.0, 0], [1, 0]])) == pytest.approx([0.5**0.5, 0])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooling_equals_plain_hidden_states(architecture: str, pooling: Any) -> None:
    model = tiny_model(architecture)
    for batch_size in (1, 4, 64):
        pooled = representations(model, TEXTS, batch_size=batch_size, pooling=pooling)
        assert [layer.shape for layer in pooled] == [(11, 32)] * 3
        for row, (ids, prompt) in enumerate(TEXTS):
            with torch.no_grad():
                states = model.base_model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            first = prompt if pooling == "mean" else len(ids) - 2
            for layer, state in zip(pooled, states, strict=True):
                expected = state[0, first : len(ids) - 1].double().mean(dim=0).numpy()
                assert layer[row] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_no_logits_are_computed() -> None:
    model, shapes = tiny_model(), []
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.numel()))
    representations(model, TEXTS)
    handle.remove()
    assert shapes == []


def test_a_model_is_aligned_with_itself() -> None:
    states = representations(tiny_model(), TEXTS)
    for row in align(states, states, **STREAM):
        for value in (row.cka, row.cka_debiased, row.cosine):
            assert value.value == pytest.approx(1)
        assert row.cka_debiased.low == row.cka_debiased.high == pytest.approx(1)
        assert row.cka.low is None


def test_other_widths_have_no_cosine_and_other_depths_nothing() -> None:
    states = representations(tiny_model(), TEXTS)
    narrow = [layer[:, :9] for layer in representations(tiny_model(seed=1), TEXTS)]
    rows = align(states, narrow, **STREAM)
    assert all(row.cosine.value is None and "32 and 9" in str(row.cosine.reason) for row in rows)
    assert all(row.cka.value is not None for row in rows)
    table = alignment_table(rows)
    assert table["cosine"].to_pylist() == [None] * 3
    assert table["cka_debiased_low"].null_count == 0
    assert "debiased" in table["cka_reason"][0].as_py()
    with pytest.raises(UserError, match="2 layers and the reference 1"):
        align(states, states[:-1], **STREAM)


def test_a_layer_that_sees_no_difference_has_no_cka() -> None:
    """The last token's embedding is the same for every answer that ends alike."""
    same = [([*ids[:-2], 7, ids[-1]], prompt) for ids, prompt in TEXTS]
    states = representations(tiny_model(), same, pooling="last")
    first, *others = align(states, states, **STREAM)
    assert first.cka.value is None
    assert "all rows alike" in str(first.cka.reason)
    assert first.cosine.value == pytest.approx(1)
    assert all(row.cka.value == pytest.approx(1) for row in others)
    three = align([states[1][:3]], [states[1][:3]], **STREAM)[0]
    assert three.cka.value == pytest.approx(1)
    assert "four rows" in str(three.cka_debiased.reason)


def test_intervals_follow_the_clusters() -> None:
    """Near copies of rows are less evidence than equally many different rows."""
    x = np.repeat(_random(8, 3), 6, axis=0) + 0.01 * _random(48, 3)
    y = x + np.repeat(_random(8, 3, 1), 6, axis=0)
    clusters = np.repeat(np.arange(8), 6)
    rows = align([x], [y], **STREAM)[0]
    together = align([x], [y], clusters=clusters, **STREAM)[0]
    for one, other in ((rows.cka_debiased, together.cka_debiased), (rows.cosine, together.cosine)):
        assert one.value == other.value
        assert (other.n, other.clusters) == (48, 8)
        assert other.high - other.low > 1.2 * (one.high - one.low)


def test_shipped_models() -> None:
    """Target and retrained model represent shared training rows more alike than rows one of them never saw."""
    target, retrained = (resolve_builtin(f"builtin:people/{name}") for name in ("target", "retrained"))
    template = Template(AutoTokenizer.from_pretrained(target), FormatConfig())
    sets = {}
    for name in ("forget", "retain"):
        lines = Path(resolve_builtin(f"builtin:people/{name}_perturbed.jsonl")).read_text(encoding="utf-8").splitlines()
        sets[name] = evaluation_rows(name, [json.loads(line) for line in lines[:32]], FormatConfig())
    texts = alignment_texts(sets, template)
    assert list(texts) == ["forget", "forget_paraphrase", "retain", "retain_paraphrase"]
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (target, retrained)]
    table = {}
    for name, some in texts.items():
        states = [representations(model, some) for model in models]
        table[name] = align(*states, set_name=name, samples=50, seed=0, name="people")
    assert {row.set for row in table["retain"]} == {"retain"}
    for measure in ("cka", "cka_debiased", "cosine"):
        deep = {name: getattr(rows[-1], measure).value for name, rows in table.items()}
        assert deep["forget"] < deep["retain"] - 0.05, measure
        assert deep["forget_paraphrase"] < deep["retain_paraphrase"] - 0.05, measure
