"""Scoring and generation against plain computations, on tiny random models of several architectures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from evaluation_models import ARCHITECTURES, tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from ofmu_ray.config import FormatConfig
from ofmu_ray.data.template import Template
from ofmu_ray.evaluation import generation, row_pass, scoring
from ofmu_ray.evaluation.scorer import Scorer
from ofmu_ray.evaluation.units import Unit
from ofmu_ray.metrics.rouge import rouge_l_recall
from ofmu_ray.models import room, tree

pytestmark = pytest.mark.slow

QUESTIONS = [f"{'who is ' * (1 + index % 5)}person {index}?" for index in range(23)]
ANSWERS = [f"the answer {'is long ' * (index % 7)}{index}" for index in range(23)]


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(tiny_tokenizer(), FormatConfig())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


_TREE_MODELS = ["llama", "qwen2", "gpt_neox", "gpt2"]


@pytest.fixture(scope="module", params=_TREE_MODELS)
def tree_model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def _plain_nll(model: Any, ids: list[int], prompt: int) -> float:
    """One text alone, all logits, probabilities written out."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    log_probabilities = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    answer = range(prompt, len(ids))
    return -sum(float(log_probabilities[position - 1, ids[position]]) for position in answer) / len(answer)


def test_mean_nll_equals_a_plain_computation(model: Any, template: Template) -> None:
    expected = [
        _plain_nll(model, *template.encode(question, answer))
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    scorer = Scorer(model, template.tokenizer, template)
    for batch_size in (1, 4, 64):
        assert scorer.mean_nll(QUESTIONS, ANSWERS, batch_size) == pytest.approx(expected, rel=1e-5)


def test_mean_nll_counts_eos(template: Template) -> None:
    ids, prompt = template.encode("who?", "me")
    assert ids[-1] == template.eos
    model = tiny_model("llama")
    with torch.no_grad():
        log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    tokens = [-float(log_probabilities[position - 1, ids[position]]) for position in range(prompt, len(ids))]
    losses = scoring.mean_nll(model, [(ids, prompt)], batch_size=1)
    assert losses == pytest.approx([np.mean(tokens)], rel=1e-5)
    assert losses != pytest.approx([np.mean(tokens[:-1])], rel=1e-3)


def test_token_scores_equal_a_plain_computation(model: Any, template: Template) -> None:
    texts = [template.encode(question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    for (ids, prompt), scores in zip(texts, scoring.token_scores(model, texts, batch_size=8), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, prompt - 1 : -1].double().numpy()
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        taken = log_p[np.arange(len(log_p)), ids[prompt:]]
        mean = (np.exp(log_p) * log_p).sum(axis=1)
        variance = (np.exp(log_p) * log_p**2).sum(axis=1) - mean**2
        assert scores.logprobs == pytest.approx(taken, rel=1e-5, abs=1e-5)
        assert scores.zscores == pytest.approx((taken - mean) / np.sqrt(np.maximum(variance, 1e-6)), rel=1e-4, abs=1e-4)
        assert scores.matches == [
            int(token) == best for token, best in zip(ids[prompt:], logits.argmax(1), strict=True)
        ]


def test_tokens_that_a_model_excludes_leave_scores_finite() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [50.0, -50.0, -torch.inf]])
    log_p, matches, zscores = scoring.standardised(logits, torch.tensor([0, 0]))
    p = torch.tensor([1.0, 2.0]).softmax(dim=0).double().numpy()
    mean = (p * np.log(p)).sum()
    expected = (np.log(p[0]) - mean) / np.sqrt((p * np.log(p) ** 2).sum() - mean**2)
    assert zscores.tolist() == pytest.approx([expected, 0.0], abs=1e-5)  # certain: the variance's floor of 1e-6
    assert log_p[1] == 0
    assert matches.tolist() == [False, True]


def test_batches_with_many_logits_are_halved(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    texts = [template.encode(question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    whole = scoring.batch_nll(model, texts)
    passes: list[int] = []
    plain = scoring._nll
    monkeypatch.setattr(scoring, "_nll", lambda model, part: passes.append(len(part)) or plain(model, part))
    monkeypatch.setattr(room, "CPU_LOGITS", 40 * model.config.vocab_size)
    assert scoring.batch_nll(model, texts) == pytest.approx(whole, rel=1e-5)
    assert len(passes) > 2
    assert sum(passes) == len(texts)


def test_the_head_sees_answer_positions_only(template: Template) -> None:
    model = tiny_model("llama")
    texts = [template.encode(question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    shapes: list[torch.Size] = []
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    scoring.batch_nll(model, texts)
    handle.remove()
    assert shapes == [torch.Size([sum(len(ids) - prompt for ids, prompt in texts), model.config.vocab_size])]
    assert not model.lm_head._forward_pre_hooks  # the selection ends with the call


def _reference_generation(model: Any, prompt: list[int], limit: int, stop: frozenset[int]) -> list[int]:
    """model.generate on one prompt, cut at the first stop token."""
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=sorted(stop),
        pad_token_id=min(stop),
    )
    new = output[0, len(prompt) :].tolist()
    ends = [position for position, token in enumerate(new) if token in stop]
    return new[: ends[0]] if ends else new


def test_generation_equals_transformers_at_any_batch_size(model: Any, template: Template) -> None:
    prompts = [template.encode_prompt(question) for question in QUESTIONS]
    # a random model repeats itself and rarely says EOS: stop at a token that many of its texts contain
    free = generation.generate(model, prompts, max_new_tokens=40, stop=frozenset({template.eos}), batch_size=64)
    ends = {token: {text.index(token) for text in free if token in text} for text in free for token in text}
    stop = frozenset({template.eos, max(ends, key=lambda token: len(ends[token]))})
    expected = [_reference_generation(model, prompt, 40, stop) for prompt in prompts]
    lengths = {len(text) for text in expected}
    assert len(lengths) > 1  # rows end at different steps, so finished rows do leave batches
    for batch_size in (1, 5, 64):
        generated = generation.generate(model, prompts, max_new_tokens=40, stop=stop, batch_size=batch_size)
        assert generated == expected


def test_generation_ends_where_the_models_positions_end(template: Template) -> None:
    model = tiny_model("gpt2")  # learned positions: one more would fail
    room = model.config.max_position_embeddings
    prompts = [template.encode_prompt("who is person 1?"), [5] * (room - 3), [5] * room]
    generated = generation.generate(model, prompts, max_new_tokens=500, stop=frozenset(), batch_size=4)
    assert [len(text) for text in generated] == [room - len(prompts[0]), 3, 0]


def test_stop_tokens_come_from_tokenizer_and_generation_config(template: Template) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [7, 9]
    assert generation.stop_ids(model, template.tokenizer) == {template.eos, 7, 9}


# ------------------------------------------------------------------------------------------------------------- trees


def test_which_models_take_trees() -> None:
    takes = {name: tree.takes_trees(tiny_model(name)) for name in ARCHITECTURES}
    assert takes == {name: name in _TREE_MODELS for name in ARCHITECTURES}  # the others have sliding windows
    assert tree.takes_trees(tiny_model("gemma2_softcap", layer_types=["full_attention"] * 2))
    deaf = tiny_model("llama")
    deaf.register_forward_pre_hook(
        lambda _module, args, options: (args, options | {"attention_mask": None}), with_kwargs=True
    )
    assert not tree.takes_trees(deaf)  # only a trial shows it


_TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(prompt=_TOKENS, answers=st.lists(_TOKENS, min_size=1, max_size=5))
def test_a_tree_holds_its_texts_and_every_beginning_once(prompt: list[int], answers: list[list[int]]) -> None:
    made = tree.tree_of([(prompt + answer, len(prompt)) for answer in answers])
    for number, answer in enumerate(answers):
        assert [made.tokens[node] for node in made.paths[number]] == answer[:-1]
        assert [made.depths[node] for node in made.paths[number]] == [len(prompt) + at for at in range(len(answer) - 1)]
        assert made.answers[number] == answer
    beginnings = {tuple(answer[:end]) for answer in answers for end in range(1, len(answer))}
    assert len(made.tokens) == len(prompt) + len(beginnings)
    assert sum(made.fresh) == len(beginnings)


@pytest.mark.parametrize("nodes", [1, 100, 2048])
def test_trees_give_what_single_texts_give(
    tree_model: Any, template: Template, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_pass, "_NODES", {"cpu": nodes})
    endings = ("", " or so", "", ", is long")
    rows = [
        [template.encode(question, answer + ending) for ending in endings]
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    values = row_pass.row_values(tree_model, [tree.tree_of(texts) for texts in rows], frozenset(), 0)
    for texts, values_of_row in zip(rows, values, strict=True):
        alone = scoring.token_scores(tree_model, texts[:1], batch_size=1)[0]
        assert values_of_row.answer.logprobs == pytest.approx(alone.logprobs, rel=1e-4, abs=1e-5)
        assert values_of_row.answer.zscores == pytest.approx(alone.zscores, rel=1e-3, abs=1e-4)
        assert values_of_row.answer.matches == alone.matches
        assert values_of_row.other_nll == pytest.approx([_plain_nll(tree_model, *text) for text in texts[1:]], rel=1e-4)
        assert (values_of_row.generated, values_of_row.complete) == ([], True)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_generations_that_start_from_trees_are_the_same(tree_model: Any, template: Template, batch_size: int) -> None:
    """Answers that the model would generate itself, partly or completely, save steps and change nothing."""
    prompts = [template.encode_prompt(question) for question in QUESTIONS]
    free = generation.generate(tree_model, prompts, max_new_tokens=24, stop=frozenset(), batch_size=64)
    stop = frozenset({free[0][12]})
    expected = [text[: text.index(min(stop))] if min(stop) in text else text for text in free]
    rows = []
    for number, (prompt, text) in enumerate(zip(prompts, free, strict=True)):
        own = [*text[: number % 30], template.eos]  # from nothing up to the complete generation
        rows.append([([*prompt, 7, template.eos], len(prompt)), (prompt + own, len(prompt))])
    values = row_pass.row_values(tree_model, [tree.tree_of(texts) for texts in rows], stop, 24)
    known = [len(each.generated) for each in values]
    assert known == [min(number % 30 + 1, len(text)) for number, text in enumerate(expected)]
    scorer = Scorer(tree_model, template.tokenizer, template, max_new_tokens=24)
    scorer.stop = stop
    assert scorer.shares_prompts
    unit = Unit("set", range(len(rows)), rows, [False] * len(rows), [""] * len(rows), batch_size=batch_size)
    result = scorer.run(unit)
    assert [result[row]["generated_tokens"] for row in range(len(rows))] == [len(text) for text in expected]
    decoded = [template.tokenizer.decode(text, skip_special_tokens=True).strip() for text in expected]
    assert [result[row]["generated"] for row in range(len(rows))] == decoded


def test_generation_is_greedy_whatever_the_models_own_configuration_says(template: Template) -> None:
    model = tiny_model("llama")
    prompts = [template.encode_prompt(question) for question in QUESTIONS[:3]]
    plain = generation.generate(model, prompts, max_new_tokens=24, stop=frozenset(), batch_size=3)
    model.generation_config.repetition_penalty = 5.0
    assert generation.generate(model, prompts, max_new_tokens=24, stop=frozenset(), batch_size=3) == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_texts_that_ended_leave_the_batch(template: Template) -> None:
    model = tiny_model("llama")
    prompts = [template.encode_prompt(question) for question in QUESTIONS]
    most = [3 + 2 * (index % 5) for index in range(len(prompts))]
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, options: sizes.append(len(options["input_ids"])), with_kwargs=True
    )
    generated = generation.generate(model, prompts, max_new_tokens=most, stop=frozenset(), batch_size=64)
    assert [len(text) for text in generated] == most
    assert sizes[0] == len(prompts)
    assert sum(sizes) < 1.4 * sum(most)


# ------------------------------------------------------------------------------------------------------------- ROUGE

_WORDS = st.lists(st.sampled_from(["a", "Running", "runs", "ran,", "naïve", "2nd", "the", "..."]), max_size=70).map(
    " ".join
)


@given(reference=_WORDS, text=_WORDS)
def test_rouge_is_the_librarys(reference: str, text: str) -> None:
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(target=reference, prediction=text)["rougeL"].recall
    assert rouge_l_recall([reference], [text]) == [expected]
