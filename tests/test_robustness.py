"""Attacks: relearning, quantisation and prompt prefixes, on the shipped models and against slow references."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_models import tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.attacks import curves, prefix, quantisation, relearning
from ofmu_ray.config import FormatConfig
from ofmu_ray.config.robustness import PrefixOptions, QuantiseOptions, RelearnOptions
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.rows import EvaluationRow, evaluation_rows
from ofmu_ray.evaluation.scorer import Scorer

RELEARN = RelearnOptions(rows=8, steps=(1, 2, 5, 10), lr=1e-3, batch_size=4)


def _rows(name: str, count: int) -> list[EvaluationRow]:
    with open(resolve_builtin(f"builtin:people/{name}.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return evaluation_rows(name, rows[:count], FormatConfig())


FORGET, RETAIN = _rows("forget", 16), _rows("retain", 12)


def _model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve_builtin(f"builtin:people/{name}"), dtype="float32").eval()


@pytest.fixture(scope="module")
def target() -> Any:
    return _model("target")


@pytest.fixture(scope="module")
def retrained() -> Any:
    return _model("retrained")


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(AutoTokenizer.from_pretrained(resolve_builtin("builtin:people/target")), FormatConfig())


def _bits(model: Any) -> dict[str, tuple[int, bytes]]:
    """Each weight's address and content."""
    return {name: (weight.data_ptr(), weight.detach().numpy().tobytes()) for name, weight in model.named_parameters()}


# -------------------------------------------------------------------------------------------------------- relearning


def test_relearning_raises_the_attacked_rows_and_leaves_the_model(retrained: Any, template: Template) -> None:
    before = _bits(retrained)
    table = relearning.relearn(retrained, template, FORGET, RETAIN, RELEARN)
    assert _bits(retrained) == before
    assert all(parameter.grad is None for parameter in retrained.parameters())
    groups = {group: curves.row_curves(table, group) for group in ("attacked", "forget", "retain")}
    assert [len(curve.row_ids) for curve in groups.values()] == [8, 8, 12]
    assert set(groups["attacked"].row_ids) | set(groups["forget"].row_ids) == {row.row_id for row in FORGET}
    assert groups["attacked"].steps.tolist() == [0, 1, 2, 5, 10]
    assert (groups["attacked"].probability[:, -1] > 2 * groups["attacked"].probability[:, 0]).all()
    assert groups["attacked"].mean[-1] > groups["forget"].mean[-1]
    rows = {row.row_id: row for row in FORGET}
    plain = Scorer(retrained, template.tokenizer, template).mean_nll(
        [rows[name].question for name in groups["forget"].row_ids],
        [rows[name].answer for name in groups["forget"].row_ids],
    )
    assert groups["forget"].probability[:, 0] == pytest.approx(np.exp(-plain), rel=1e-6)


def test_relearning_is_plain_adamw(retrained: Any, template: Template) -> None:
    """The same steps with transformers' loss and torch's AdamW, on one batch of all attacked rows."""
    options = replace(RELEARN, steps=(3,), batch_size=8)
    table = relearning.relearn(retrained, template, FORGET, RETAIN, options)
    row_curves = curves.row_curves(table, "attacked")
    rows = [row for row in FORGET if row.row_id in row_curves.row_ids]
    model = _model("retrained")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    encoded = [template.encode(row.question, row.answer) for row in rows]
    for _ in range(3):
        losses, tokens = 0.0, 0
        for ids, prompt in encoded:
            labels = torch.tensor([[-100] * prompt + ids[prompt:]])
            count = len(ids) - prompt
            losses = losses + model(input_ids=torch.tensor([ids]), labels=labels).loss * count
            tokens += count
        optimizer.zero_grad()
        (losses / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    after = Scorer(model, template.tokenizer, template).mean_nll([r.question for r in rows], [r.answer for r in rows])
    assert row_curves.probability[:, -1] == pytest.approx(np.exp(-after), rel=1e-3)


@pytest.mark.slow
def test_benign_relearning_and_batch_sizes(retrained: Any, template: Template) -> None:
    options = replace(RELEARN, on="retain", steps=(1, 3))
    whole = relearning.relearn(retrained, template, FORGET, RETAIN, options)
    pieces = relearning.relearn(retrained, template, FORGET, RETAIN, replace(options, micro_batch_size=1), batch_size=3)
    assert whole.drop_columns(["answer_nll", "probability"]) == pieces.drop_columns(["answer_nll", "probability"])
    assert whole["answer_nll"].to_numpy() == pytest.approx(pieces["answer_nll"].to_numpy(), rel=1e-3, abs=1e-5)
    assert {name.split("-")[0] for name in curves.row_curves(whole, "attacked").row_ids} == {"retain"}
    assert len(curves.row_curves(whole, "forget").row_ids) == len(FORGET)
    other = relearning.attacked_groups(FORGET, RETAIN, replace(options, seed=1))
    assert [row.row_id for row in other["attacked"]] != curves.row_curves(whole, "attacked").row_ids


def test_areas_and_steps_to_reach() -> None:
    steps = np.array([0.0, 1.0, 3.0])
    curve = curves.RowCurves(["a", "b"], [None, None], steps, np.array([[0.0, 0.4, 0.8], [0.2, 0.2, 0.2]]))
    assert curves.areas(curve) == pytest.approx([(0.2 + 1.2) / 3, 0.2])
    assert curves.areas(curve, curve).tolist() == [0.0, 0.0]
    assert curve.mean == pytest.approx([0.1, 0.3, 0.5])
    assert curves.steps_to_reach(steps, curve.mean, 0.4) == pytest.approx(2.0)
    assert curves.steps_to_reach(steps, curve.mean, 0.1) == 0.0
    assert curves.steps_to_reach(steps, curve.mean, 0.51) is None
    with pytest.raises(AssertionError, match="different attacks"):
        curves.areas(curve, curve._replace(row_ids=["a", "c"]))


# ------------------------------------------------------------------------------------------------------ quantisation


def _slow_rtn(weight: np.ndarray, bits: int, group_size: int | None) -> np.ndarray:
    result = np.empty_like(weight)
    largest = np.float32(2 ** (bits - 1) - 1)
    width = group_size or weight.shape[1]
    for out in range(weight.shape[0]):
        for start in range(0, weight.shape[1], width):
            group = weight[out, start : start + width]
            scale = np.float32(max(abs(value) for value in group)) / largest or np.float32(1)
            for offset, value in enumerate(group):
                steps = np.rint(value / scale)
                assert abs(steps) <= largest
                result[out, start + offset] = steps * scale
    return result


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 20)),
    bits=st.integers(2, 8),
    group_size=st.none() | st.integers(1, 24),
)
def test_rtn_equals_a_slow_reference(seed: int, shape: tuple[int, int], bits: int, group_size: int | None) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=shape) * rng.integers(0, 2, size=shape)).astype(np.float32)  # zeros and zero groups too
    rounded = quantisation.rtn(torch.from_numpy(weight), bits, group_size)
    assert np.array_equal(rounded.numpy(), _slow_rtn(weight, bits, group_size))


def test_a_change_within_a_rounding_step_vanishes() -> None:
    """Why quantisation can undo unlearning: both weights round to the same value."""
    target = torch.tensor([[7.0, 3.1, -2.0]])
    assert torch.equal(quantisation.rtn(target, 4), quantisation.rtn(target + torch.tensor([[0.0, 0.3, -0.4]]), 4))
    assert not torch.equal(quantisation.rtn(target, 8), quantisation.rtn(target + torch.tensor([[0.0, 0.3, -0.4]]), 8))


def test_fewer_bits_are_farther_from_the_target(target: Any, template: Template) -> None:
    before = _bits(target)
    options = QuantiseOptions(bits=(8, 4, 2))
    table = quantisation.quantisation_attack(target, template, FORGET, options)
    assert _bits(target) == before
    nll = curves.by_condition(table, "scheme", "answer_nll")
    assert list(nll) == ["full", "rtn8", "rtn4", "rtn2"]
    distance = {scheme: float(np.abs(values - nll["full"]).mean()) for scheme, values in nll.items()}
    assert 0 < distance["rtn8"] < distance["rtn4"] < distance["rtn2"]
    assert nll["rtn8"] == pytest.approx(nll["full"], abs=1e-3)
    again = quantisation.quantisation_attack(target, template, FORGET, options, batch_size=5)
    assert again["answer_nll"].to_numpy() == pytest.approx(table["answer_nll"].to_numpy(), rel=1e-4, abs=1e-6)


def test_quantised_rounds_every_linear_layer_but_the_tied_head(target: Any) -> None:
    before = _bits(target)
    embedding = target.get_input_embeddings().weight
    assert embedding is target.get_output_embeddings().weight
    linear = [m.weight for n, m in target.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    given_head = embedding.detach().clone()
    with quantisation.quantised(target, 4, group_size=32) as rounded:
        assert rounded == sum(weight.numel() for weight in linear)
        assert all(len(weight[0, :32].unique()) <= 15 for weight in linear)
        assert torch.equal(embedding, given_head)
    assert _bits(target) == before
    with quantisation.quantised(target, 4, head=True) as rounded:
        assert rounded == sum(weight.numel() for weight in linear) + embedding.numel()
        assert torch.equal(embedding, quantisation.rtn(given_head, 4))
    assert _bits(target) == before
    with pytest.raises(ValueError, match="input_ids"), quantisation.quantised(target, 4):
        target(input_ids=None)  # a failure inside
    assert _bits(target) == before


def test_quantised_conv1d_rounds_per_output_channel() -> None:
    model = tiny_model("gpt2")
    weight = model.transformer.h[0].mlp.c_fc.weight  # [in, out]
    expected = quantisation.rtn(weight.detach().T, 4).T
    with quantisation.quantised(model, 4):
        assert torch.equal(weight, expected)


def test_bitsandbytes_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"bnb_nf4 is not available: .*(not installed|CUDA)"):
        quantisation.load_bitsandbytes("anywhere", "bnb_nf4")


# ------------------------------------------------------------------------------------------------------------ prefix


@pytest.fixture(scope="module")
def prefixed(target: Any, template: Template) -> Any:
    return prefix.prefix_attack(target, template, FORGET, RETAIN, PrefixOptions(), max_new_tokens=16)


@pytest.mark.slow
def test_worst_case_is_never_below_the_plain_question(prefixed: Any) -> None:
    probability = curves.by_condition(prefixed, "attack")
    recall = curves.by_condition(prefixed, "attack", "rouge_l_recall")
    assert list(probability) == ["plain", "prefix_1", "prefix_2", "prefix_3", "prefix_4", "few_shot", "hint"]
    worst = prefix.worst_case(prefixed)
    assert worst["row_id"].to_pylist() == [row.row_id for row in FORGET]
    whole = [name for name in probability if name != "hint"]
    assert np.array_equal(worst["probability"].to_numpy(), np.max([probability[name] for name in whole], axis=0))
    assert np.array_equal(worst["rouge_l_recall"].to_numpy(), np.max([recall[name] for name in whole], axis=0))
    assert (worst["probability"].to_numpy() >= probability["plain"]).all()
    for row, name in enumerate(worst["attack"].to_pylist()):
        assert probability[name][row] == worst["probability"][row].as_py()


def test_prefixes_and_shots_reach_the_model(target: Any, template: Template, prefixed: Any) -> None:
    """Each attack's loss against an explicit conversation, and no text in the table."""
    nll = curves.by_condition(prefixed, "attack", "answer_nll")
    scorer = Scorer(target, template.tokenizer, template)
    questions = [PrefixOptions().prefixes[1].replace("{question}", row.question) for row in FORGET]
    assert nll["prefix_2"] == pytest.approx(scorer.mean_nll(questions, [row.answer for row in FORGET]), rel=1e-5)
    drawn = np.random.default_rng(0).permutation(len(RETAIN))[:3]
    context = [template.bos]
    for index in drawn:
        context += template.encode(RETAIN[index].question, RETAIN[index].answer)[0][1:]
    ids, prompt = template.encode(FORGET[4].question, FORGET[4].answer)
    with torch.no_grad():
        logp = target(input_ids=torch.tensor([context + ids[1:]])).logits[0].log_softmax(-1)
    start = len(context) + prompt - 1
    tokens = [-float(logp[start + offset - 1, token]) for offset, token in enumerate(ids[prompt:])]
    assert nll["few_shot"][4] == pytest.approx(np.mean(tokens), rel=1e-4)
    texts = [row.answer for row in FORGET] + [row.question for row in FORGET]
    assert not any(text in str(prefixed.to_pydict()) for text in texts)


def test_a_hint_measures_the_rest_of_the_answer(target: Any, template: Template, prefixed: Any) -> None:
    ids, prompt = template.encode(FORGET[2].question, FORGET[2].answer)
    with torch.no_grad():
        logp = target(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    rest = [-float(logp[position - 1, ids[position]]) for position in range(prompt + 3, len(ids))]
    loss = curves.by_condition(prefixed, "attack", "answer_nll")["hint"][2]
    assert loss == pytest.approx(np.mean(rest), rel=1e-4, abs=1e-7)
    # the target completes what it knows: the recall counts the words after the hint, and all of them are there
    assert curves.by_condition(prefixed, "attack", "rouge_l_recall")["hint"].mean() > 0.9
    long = next(
        attack
        for attack in prefix.attacks(template, FORGET, RETAIN, PrefixOptions(hint_tokens=999))
        if attack.name == "hint"
    )
    assert all(prompt == len(ids) - 2 for ids, prompt in long.texts)


def test_prefix_attack_without_generation_and_in_other_batches(target: Any, template: Template, prefixed: Any) -> None:
    table = prefix.prefix_attack(target, template, FORGET, RETAIN, PrefixOptions(generate=False), batch_size=3)
    assert table["rouge_l_recall"].null_count == table.num_rows
    assert table["answer_nll"].to_numpy() == pytest.approx(prefixed["answer_nll"].to_numpy(), rel=1e-4, abs=1e-6)
    assert prefix.worst_case(table)["rouge_l_recall"].null_count == len(FORGET)
    plain = PrefixOptions(prefixes=(), shots=0, hint_tokens=0)
    assert [attack.name for attack in prefix.attacks(template, FORGET, [], plain)] == ["plain"]


# ------------------------------------------------------------------------------------------------------ user's errors


@pytest.mark.parametrize(
    ("build", "option"),
    [
        (lambda: RelearnOptions(rows=0), r"checks\.relearn\.rows"),
        (lambda: RelearnOptions(lr=float("nan")), r"checks\.relearn\.lr"),
        (lambda: RelearnOptions(steps=(5, 2)), r"checks\.relearn\.steps"),
        (lambda: RelearnOptions(steps=(0, 2)), r"checks\.relearn\.steps"),
        (lambda: RelearnOptions(steps=()), r"checks\.relearn\.steps"),
        (lambda: RelearnOptions(on="both"), r"checks\.relearn\.on"),  # type: ignore[arg-type]
        (lambda: QuantiseOptions(bits=(16,)), r"checks\.quantise\.bits"),
        (lambda: QuantiseOptions(bits=(4, 4)), r"checks\.quantise\.bits"),
        (lambda: QuantiseOptions(group_size=0), r"checks\.quantise\.group_size"),
        (lambda: PrefixOptions(prefixes=("no place",)), r"checks\.prefix\.prefixes"),
        (lambda: PrefixOptions(shots=-1), r"checks\.prefix\.shots"),
    ],
)
def test_options_refuse(build: Any, option: str) -> None:
    with pytest.raises(UserError, match=option):
        build()


@pytest.mark.slow
def test_attacks_refuse_what_the_rows_do_not_allow(target: Any, template: Template) -> None:
    with pytest.raises(UserError, match=r"checks\.relearn\.rows = 16: there are 16 forget rows"):
        relearning.attacked_groups(FORGET, RETAIN, replace(RELEARN, rows=16))
    with pytest.raises(UserError, match=r"checks\.prefix\.shots = 13: there are 12 retain rows"):
        prefix.prefix_attack(target, template, FORGET, RETAIN, PrefixOptions(shots=13))
    with pytest.raises(UserError, match=r"checks\.prefix\.shots: row forget-\d+ has \d+ tokens .* takes 256"):
        prefix.prefix_attack(target, template, FORGET, RETAIN, PrefixOptions(prefixes=(), shots=12, generate=False))
    short = Template(tiny_tokenizer(), FormatConfig(max_length=4))
    with pytest.raises(UserError, match=r"row forget-0 has no answer token left") as caught:
        relearning.relearn(target, short, FORGET, RETAIN, RELEARN)
    assert FORGET[0].answer not in str(caught.value)


@pytest.mark.system
def test_options_need_no_torch() -> None:
    code = "import sys, ofmu_ray.config.robustness; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
