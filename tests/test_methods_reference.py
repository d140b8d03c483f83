"""Methods that need the reference model, against plain loops with a resident one, and equal on every engine."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from engine_ranks import run_ranks
from reference_ranks import (
    LAYER,
    OPTIONS,
    ROUNDS,
    Case,
    activations,
    answer_logits,
    build_engine,
    known,
    reference_model,
    rounds,
    row_nll,
    trajectory,
)
from tiers import asked, tiered

from ofmu_ray import config
from ofmu_ray.engines.layers import layer_output, parameters_up_to
from ofmu_ray.errors import UserError
from ofmu_ray.methods import build_method

PLAIN = 1e-6
"""Of the distance covered, in float64 (Llama's norms and softmax stay fp32): measured at most 2e-7."""
WEIGHTS = 1e-4
"""Of the distance covered, in fp32: different orders of sums."""

VARIANTS = [*((variant, "llama") for variant in OPTIONS), ("rmu", "qwen2"), ("rmu", "neox"), ("dpo", "neox")]
TWO_RANKS = [Case(variant, stage, micro=1) for stage in (0, 3) for variant in OPTIONS] + [Case("rmu", 3, "neox")]


# ------------------------------------------------------------------------------------------------- plain PyTorch loops


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return -torch.log(1 + torch.exp(-x))


def token_nll(model: Any, micro: Any, prefix: str = "") -> torch.Tensor:
    return row_nll(model, micro, prefix).sum() / (micro[f"{prefix}labels"] >= 0).sum()


def kl(model: Any, reference: Any, micro: Any) -> torch.Tensor:
    p, q = (answer_logits(m, micro).log_softmax(1) for m in (reference, model))
    return (p.exp() * (p - q)).sum(1).mean()


def distance(model: Any, micro: Any, target: torch.Tensor) -> torch.Tensor:
    """Row by row; `target`: a vector, or activations of all positions."""
    sums, lengths = [], []
    for row, (hidden, labels) in enumerate(zip(activations(model, micro), micro["labels"], strict=True)):
        goal = target if target.dim() == 1 else target[row][labels >= 0]
        sums.append(((hidden[labels >= 0] - goal) ** 2).mean(1).sum())
        lengths.append(int((labels >= 0).sum()))
    return torch.stack([s / n for s, n in zip(sums, lengths, strict=True)]).mean()


def forget_loss(name: str, options: Any, model: Any, reference: Any, micro: Any, u: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        refused = name in ("idk", "dpo", "altpo")
        before, refusal_before = row_nll(reference, micro), row_nll(reference, micro, "refusal_") if refused else None
        z_ref = answer_logits(reference, micro)
    if name == "npo":
        return -2 / options.beta * log_sigmoid(options.beta * (row_nll(model, micro) - before)).mean()
    if name in ("dpo", "altpo"):
        refusal_gain = -row_nll(model, micro, "refusal_") + refusal_before
        answer_gain = -row_nll(model, micro) + before
        return -2 / options.beta * log_sigmoid(options.beta * (refusal_gain - answer_gain)).mean()
    if name == "idk":
        return token_nll(model, micro, "refusal_")
    if name == "undial":
        labels = micro["labels"][:, 1:][micro["labels"][:, 1:] >= 0]
        for at, label in enumerate(labels):
            z_ref[at, label] -= options.beta
        target = z_ref.exp() / z_ref.exp().sum(1, keepdim=True)
        return -(target * answer_logits(model, micro).log_softmax(1)).sum(1).mean()
    return distance(model, micro, u)


def retain_loss(name: str, options: Any, model: Any, reference: Any, micro: Any) -> torch.Tensor:
    if name == "rmu":
        with torch.no_grad():
            target = activations(reference, micro)
        return distance(model, micro, target)
    return kl(model, reference, micro) if options.retain_loss == "kl" else token_nll(model, micro)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "kind"), VARIANTS)
def test_rounds_are_the_plain_loop(variant: str, kind: str) -> None:
    case, name, options = Case(variant, model=kind), variant.partition("-")[0], OPTIONS[variant]
    method = build_method(options, ROUNDS)
    engine = build_engine(case, method, torch.float64)
    method.start(engine)
    model = reference_model(kind).double()
    reference = copy.deepcopy(model)  # the peer's second model
    optimizer = torch.optim.SGD(model.parameters(), lr=options.optimizer.lr)
    trained = dict(zip(engine.trainable_names, engine.parameters(), strict=True))
    for streams in rounds(case, 1, 0):
        optimizer.zero_grad()
        loss = forget_loss(name, options, model, reference, streams["forget"][0].micro[0], target(method))
        loss = options.forget_weight * loss
        if options.retain_weight:
            micro = streams["retain"][0].micro[0]
            loss = loss + options.retain_weight * retain_loss(name, options, model, reference, micro)
        loss.backward()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name not in trained and parameter.grad is not None:
                assert name == "rmu"
                if options.train_layers is None:
                    assert not parameter.grad.any(), f"{parameter_name} is frozen and has a gradient"
                parameter.grad = None
        optimizer.step()
        batches = {s: [known(reference, batch) for batch in stream] for s, stream in streams.items()}
        method.round(engine, iter(batches["forget"]), iter(batches["retain"]))
    plain, start = dict(model.named_parameters()), dict(reference.named_parameters())
    moved = math.dist(flat(plain[n] for n in trained), flat(start[n] for n in trained))
    assert math.dist(flat(trained.values()), flat(plain[n] for n in trained)) < PLAIN * moved
    assert moved > 1e-3


def target(method: Any) -> torch.Tensor:
    return method.target.double() if hasattr(method, "target") else torch.empty(0)


def flat(tensors: Any) -> list[float]:
    return torch.cat([tensor.detach().double().ravel() for tensor in tensors]).tolist()


# ---------------------------------------------------------------------------------------------------- the same anywhere


@functools.cache
def single_process(variant: str, model: str) -> dict[str, Any]:
    return trajectory(Case(variant, model=model), 0, 1)


def judge(case: Case, result: dict[str, Any]) -> None:
    expected = single_process(case.variant, case.model)
    start = dict(reference_model(case.model).named_parameters())
    names = sorted(start)
    off = math.dist(flat(result["weights"][n] for n in names), flat(expected["weights"][n] for n in names))
    moved = math.dist(flat(start[n] for n in names), flat(expected["weights"][n] for n in names))
    assert off <= WEIGHTS * moved
    for metrics, like in zip(result["figures"], expected["figures"], strict=True):
        assert metrics == {name: pytest.approx(value, rel=1e-3, abs=1e-3) for name, value in like.items()}
    assert result["account"] == {**expected["account"], "flops": pytest.approx(expected["account"]["flops"])}
    assert result["state"] == expected["state"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", OPTIONS)
def test_micro_batches(variant: str) -> None:
    judge(Case(variant), trajectory(Case(variant, micro=1), 0, 1))


@pytest.fixture(scope="module")
def two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_ranks(2, asked(request, "test_two_ranks"), tmp_path_factory.mktemp("reference"), trajectory)


@pytest.mark.system
@pytest.mark.parametrize("case", tiered(TWO_RANKS, lambda case: case.stage == 3), ids=str)
def test_two_ranks(case: Case, two_ranks: dict[str, dict[str, Any]]) -> None:
    judge(case, two_ranks[str(case)])


# ----------------------------------------------------------------------------------------------------------------- cost


def test_account_counts_the_tokens_that_go_through() -> None:
    """IDK forgets on refusals only, DPO on both texts, the others on the answers."""
    for variant in ("npo", "idk", "dpo"):
        forwarded = {"npo": ["attention_mask"], "idk": ["refusal_attention_mask"]}
        forwarded["dpo"] = forwarded["npo"] + forwarded["idk"]
        tokens = 0
        for streams in rounds(Case(variant), 1, 0):
            forget, retain = streams["forget"][0].micro[0], streams["retain"][0].micro[0]
            tokens += sum(int(forget[name].sum()) for name in forwarded[variant]) + int(retain["attention_mask"].sum())
        assert single_process(variant, "llama")["account"]["tokens"] == tokens, variant


@pytest.mark.parametrize("kind", ["llama", "qwen2", "neox"])
def test_nothing_runs_above_the_layer(kind: str) -> None:
    module = reference_model(kind)
    (micro,) = rounds(Case("rmu"), 1, 0)[0]["forget"][0].micro
    ran: list[str] = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, part in module.named_modules()
    ]
    hidden = layer_output(module, micro, LAYER)
    for handle in handles:
        handle.remove()
    assert torch.equal(hidden, activations(module, micro))
    assert [name for name in ran if "layers.0" in name]
    assert not [name for name in ran if "layers.1" in name]
    assert answer_logits(module, micro).requires_grad, "the whole model is back"
    above = {id(p) for p in module.parameters()} - {id(p) for p in parameters_up_to(module, LAYER)}
    names = {name.rpartition("layers.")[2][:2] for name, p in module.named_parameters() if id(p) in above}
    assert "0." not in names
    assert "1." in names


def test_work_is_the_share_of_the_parameters_up_to_the_layer() -> None:
    module, counts = reference_model("llama"), single_process("rmu", "llama")["account"]
    above = sum(p.numel() for n, p in module.named_parameters() if "layers.1" in n or ".norm" in n or "lm_head" in n)
    whole_model = sum(p.numel() for p in module.parameters())
    assert counts["flops"] == pytest.approx(6 * (whole_model - above) * counts["tokens"])


def test_the_random_vector_is_the_seeds_and_survives_a_checkpoint() -> None:
    state = single_process("rmu", "llama")["state"]
    vector = torch.tensor(state["target"])
    assert float(vector.norm()) == pytest.approx(3.0)
    assert bool((vector >= 0).all())
    other = build_method(OPTIONS["rmu"])
    other.load_state_dict(state)
    assert torch.equal(other.target, vector)  # type: ignore[attr-defined]


def test_layers_that_are_not_there_are_named() -> None:
    for options, word in (
        (config.METHODS["rmu"](layer=9), r"rmu\.layer"),
        (config.METHODS["rmu"](train_layers=2), "train_layers"),
    ):
        with pytest.raises(UserError, match=word):
            build_method(options).freeze(reference_model("llama"))
