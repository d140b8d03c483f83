"""The baselines' rounds: against plain PyTorch loops, and the same on every engine.

The losses themselves: tests/test_losses.py.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from typing import Any

import loss_formulas
import pytest
import torch
from engine_ranks import run_ranks
from invariant_ranks import seeded_model
from method_ranks import OPTIONS, ROUNDS, Case, batches, run, trajectory
from tiers import asked, tiered

from ofmu_ray import config
from ofmu_ray.config import UnlearnConfig
from ofmu_ray.engines import TorchEngine
from ofmu_ray.errors import UserError
from ofmu_ray.methods import build_method
from ofmu_ray.models.loading import add_lora

WEIGHTS = 2e-4
"""Of the distance from start to end: different orders of fp32 sums; measured at most 2e-5."""
PLAIN = 1e-6
"""The same, in float64 (in which Llama's norms and softmax stay fp32) against the plain loop; measured at most 2e-7."""
FIGURES = 1e-3
"""Of each metric of each round."""

ALONE = [Case(variant, micro=1, resume=True) for variant in OPTIONS]
ONE_ENGINE_WILL_DO = {"grad_diff-no_retain", "blur-nll"}  # their siblings make the same calls
TWO_RANKS = [
    *(Case(variant, 0, micro=1) for variant in OPTIONS if "-sgd" not in variant and variant not in ONE_ENGINE_WILL_DO),
    *(
        Case(variant, 3, micro=1, resume=variant in ("task_arithmetic", "pdu", "dualoptim", "influence"))
        for variant in OPTIONS
        if variant not in ONE_ENGINE_WILL_DO
    ),
    *(Case(variant, 1, micro=1) for variant in ("grad_diff-kl", "pdu", "simnpo")),
    *(Case(variant, 2, resume=True) for variant in ("task_arithmetic", "blur", "ceu")),
]


# ------------------------------------------------------------------------------------------------- plain PyTorch loops


class Plain:
    """A method in its simplest form: one process, global batches, float64, torch.optim."""

    def __init__(self, variant: str):
        self.name, self.options = variant.partition("-")[0], OPTIONS[variant]
        self.differences: list[torch.Tensor] = []
        self.fisher: list[torch.Tensor] = []
        self.module = seeded_model("llama").double()
        self.parameters = list(self.module.parameters())
        self.start = [p.detach().clone() for p in self.parameters]
        rule = self.options.optimizers[1]
        if rule.name == "adamw":
            settings = {"lr": rule.lr, "eps": rule.eps, "weight_decay": rule.weight_decay}
            self.optimizer: Any = torch.optim.AdamW(self.parameters, **settings)
        else:
            self.optimizer = torch.optim.SGD(self.parameters, lr=rule.lr, momentum=rule.momentum)
        self.forgetting = torch.optim.AdamW(self.parameters, **settings) if self.name == "dualoptim" else None
        self.moments: dict[str, Any] = {}
        self.dual, self.bound = getattr(self.options, "dual_start", 0.0), getattr(self.options, "retain_bound", None)

    def gradient(self, formula: Any, batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        (micro,) = batch.micro
        logits = self.module(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits
        loss = formula(logits, micro, self.options)
        return loss, list(torch.autograd.grad(loss, self.parameters))

    def turn(self, formula: Any, batch: Any, kind: str) -> None:
        """One step of DualOptim's forget or retain turn; with a common state, by the formulas of the paper's code."""
        options: Any = self.options
        weight, ratio = (options.forget_weight, options.forget_lr_ratio) if kind == "forget" else (1.0, 1.0)
        _, gradient = self.gradient(formula, batch)
        for parameter, part in zip(self.parameters, gradient, strict=True):
            parameter.grad = weight * part
        torch.nn.utils.clip_grad_norm_(self.parameters, options.optimizer.clip)
        if not options.shared_base:
            optimizer: Any = self.forgetting if kind == "forget" else self.optimizer
            optimizer.step()
            return
        rule, counts = options.optimizer, self.moments.setdefault("counts", {"forget": 0, "retain": 0})
        before, counts[kind] = sum(counts.values()), counts[kind] + 1
        with torch.no_grad():
            for index, p in enumerate(self.parameters):
                g, moments = p.grad, self.moments.setdefault(str(index), {})
                base1, base2 = moments.get("base", (0 * p, 0 * p))
                m, v = moments.get(kind, (0 * p, 0 * p))
                b = base1 / (1 - options.base_beta1**before) if before else base1
                c = base2 / (1 - options.base_beta2**before) if before else base2
                m = rule.beta1 * m + (1 - rule.beta1) * (g - b)
                v = rule.beta2 * v + (1 - rule.beta2) * (g**2 - c)
                first = m / (1 - rule.beta1 ** counts[kind]) + b
                second = v / (1 - rule.beta2 ** counts[kind]) + c
                p *= 1 - ratio * rule.lr * rule.weight_decay
                p -= ratio * rule.lr * first / (second.abs().sqrt() + rule.eps)
                moments["base"] = (
                    options.base_beta1 * base1 + (1 - options.base_beta1) * g,
                    options.base_beta2 * base2 + (1 - options.base_beta2) * g**2,
                )
                moments[kind] = m, v

    def influence(self, forget: Any, retain: Any) -> None:
        """A round at theta_0; H is inverted by Sherman and Morrison's formula, on vectors of all parameters."""
        options: Any = self.options
        with torch.no_grad():
            for p, start in zip(self.parameters, self.start, strict=True):
                p.copy_(start)
        f, g = (
            torch.cat([part.ravel() for part in self.gradient(loss_formulas.nll, batch)[1]])
            for batch in (forget, retain)
        )
        self.differences.append(f - g)
        self.fisher = [*self.fisher, g][: options.gradients]

        def solved(vector: torch.Tensor, terms: int) -> torch.Tensor:
            if not terms:
                return vector / options.damping
            g = self.fisher[terms - 1]
            along = solved(g, terms - 1)
            return solved(vector, terms - 1) - along * (along @ vector) / (len(self.fisher) + g @ along)

        step = solved(sum(self.differences) / len(self.differences), len(self.fisher))  # type: ignore[arg-type]
        at = 0
        with torch.no_grad():
            for p in self.parameters:
                p += options.alpha * options.forget_share * step[at : at + p.numel()].view_as(p)
                at += p.numel()

    def round(self, number: int, streams: Any) -> None:
        options: Any = self.options
        if self.name == "dualoptim":
            self.turn(loss_formulas.dualoptim, streams["forget"][0], "forget")
            for batch in streams["retain"]:
                self.turn(loss_formulas.nll, batch, "retain")
            return
        forget, retain = (next(iter(streams[name]), None) for name in ("forget", "retain"))
        if self.name == "influence":
            self.influence(forget, retain)
            return
        if self.name == "task_arithmetic":
            _, total = self.gradient(loss_formulas.nll, forget)
        elif self.name == "retain_finetune":
            _, total = self.gradient(loss_formulas.nll, retain)
        else:
            _, forget_part = self.gradient(loss_formulas.FORGET[self.name], forget)
            total = [getattr(options, "forget_weight", 1.0) * g for g in forget_part]
        if isinstance(options, config.WeightedConfig) and options.retain_weight:
            formula = loss_formulas.kl if options.retain_loss == "kl" else loss_formulas.nll
            _, part = self.gradient(formula, retain)
            total = [t + options.retain_weight * g for t, g in zip(total, part, strict=True)]
        if self.name == "blur":
            _, part = self.gradient(loss_formulas.nll, retain)
            f, g = (torch.cat([tensor.ravel() for tensor in tensors]) for tensors in (forget_part, part))
            along = f @ g / (f @ f)
            total = [t + g - along * f for t, g, f in zip(total, part, forget_part, strict=True)]
        if self.name == "pdu":
            loss, part = self.gradient(loss_formulas.nll, retain)
            self.bound = self.bound or (1 + options.tolerance) * float(loss)
            total = [t + self.dual * g for t, g in zip(total, part, strict=True)]
            if number >= options.warmup_rounds:
                self.dual = max(0.0, self.dual + options.dual_rate * (float(loss) - self.bound))
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.parameters, options.optimizer.clip)
        for group in self.optimizer.param_groups:  # linear: down to a tenth at the last of the rounds
            course = 1 - 0.9 * number / (ROUNDS - 1) if options.optimizer.decay == "linear" else 1.0
            group["lr"] = options.optimizer.lr * course
        self.optimizer.step()

    def weights(self) -> list[torch.Tensor]:
        if self.name != "task_arithmetic":
            return [p.detach() for p in self.parameters]
        scale = self.options.scale  # type: ignore[attr-defined]
        return [start - scale * (p.detach() - start) for start, p in zip(self.start, self.parameters, strict=True)]


@pytest.mark.parametrize("variant", OPTIONS)
def test_rounds_are_the_plain_loop(variant: str) -> None:
    module = seeded_model("llama").double()
    inner, outer = OPTIONS[variant].optimizers
    engine, method = TorchEngine(module, inner=inner, outer=outer), build_method(OPTIONS[variant], ROUNDS)
    method.start(engine)
    plain = Plain(variant)
    rounds = batches(variant, 1, 0, None, torch.float64)
    for number, streams in enumerate(rounds):
        plain.round(number, streams)
        list(run(method, engine, [streams]))
        moved = math.dist(flat(plain.weights()), flat(plain.start))
        assert math.dist(flat(module.parameters()), flat(plain.weights())) < PLAIN * moved, f"round {number}"
    if variant == "pdu":
        assert method.state_dict()["dual"] == pytest.approx(plain.dual)
        assert plain.dual not in (0.0, 1.0), "the dual variable never moved"


def flat(tensors: Any) -> list[float]:
    return torch.cat([tensor.detach().double().ravel() for tensor in tensors]).tolist()


# ---------------------------------------------------------------------------------------------------- the same anywhere


@functools.cache
def single_process(variant: str) -> dict[str, Any]:
    return trajectory(Case(variant), 0, 1)


@pytest.fixture(scope="module")
def two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_ranks(2, asked(request, "test_two_ranks"), tmp_path_factory.mktemp("methods"), trajectory)


def judge(case: Case, result: Mapping[str, Any]) -> None:
    expected = single_process(case.variant)
    off, moved = (
        math.dist(flat(result["weights"].values()), flat(expected["weights"].values())),
        math.dist(flat(expected["start"].values()), flat(expected["weights"].values())),
    )
    assert off <= WEIGHTS * moved
    for number, (metrics, like) in enumerate(zip(result["figures"], expected["figures"], strict=True)):
        close = {name: pytest.approx(value, rel=FIGURES, abs=FIGURES) for name, value in like.items()}
        assert metrics == close, f"round {number}"
    assert result["account"] == expected["account"]
    assert all(state == result["states"][0] for state in result["states"]), "ranks disagree"
    assert result.get("resumed", True), "a resumed run ends with other weights"


@pytest.mark.slow
@pytest.mark.parametrize("case", ALONE, ids=str)
def test_micro_batches_and_resumption(case: Case) -> None:
    judge(case, trajectory(case, 0, 1))


@pytest.mark.system
@pytest.mark.parametrize("case", tiered(TWO_RANKS, lambda case: case.stage > 1), ids=str)
def test_two_ranks(case: Case, two_ranks: dict[str, dict[str, Any]]) -> None:
    judge(case, two_ranks[str(case)])


def test_passes() -> None:
    """A weight of 0 costs no pass, nor does a stream that a method does not use."""
    passes = {variant: single_process(variant)["account"]["gradient_passes"] for variant in OPTIONS}
    forget_only = {"gradient_ascent", "grad_diff-no_retain", "ceu", "task_arithmetic", "task_arithmetic-sgd"}
    for variant, counts in passes.items():
        assert counts == {
            "forget": ROUNDS * (variant != "retain_finetune"),
            "retain": ROUNDS * (variant not in forget_only) * (2 if variant.startswith("dualoptim") else 1),
        }


# ------------------------------------------------------------------------------------------------ one method at a time


def test_needs() -> None:
    needs = {variant: [(n.stream, n.feature.name) for n in build_method(o).needs] for variant, o in OPTIONS.items()}
    assert {variant: needed for variant, needed in needs.items() if needed} == {
        "grad_diff-kl": [("retain", "logits")],
        "blur": [("forget", "nll")],
        "dualoptim-apart": [("forget", "nll")],
    }


def test_blur_forgets_at_the_same_rate_whatever_the_retain_gradient() -> None:
    """<direction, g_f> = gamma |g_f|^2, even if the retain gradient points the other way."""
    method: Any = build_method(config.METHODS["blur"](forget_weight=0.3))
    engine = TorchEngine(seeded_model("llama"))
    torch.manual_seed(0)
    forget = [torch.randn_like(master) for master in engine.weights()]
    for retain in ([torch.randn_like(f) for f in forget], [-5 * f for f in forget]):
        direction = method.direction(engine, forget, copy.deepcopy(retain), {})
        along, square = engine.dot((direction, forget), (forget, forget))
        assert along == pytest.approx(0.3 * square, rel=1e-4)


def test_pdu_bound_and_dual_survive_a_checkpoint() -> None:
    method = build_method(config.METHODS["pdu"](tolerance=0.5, dual_rate=2.0, dual_start=1.0))
    engine = TorchEngine(seeded_model("llama"))
    vector = engine.weights()
    for loss, excess in ((2.0, -1.0), (4.0, 1.0)):  # the first batch's 2.0 gives the bound 3.0
        metrics = {"retain_loss": loss}
        method.direction(engine, copy.deepcopy(vector), copy.deepcopy(vector), metrics)  # type: ignore[attr-defined]
        assert metrics["retain_excess"] == excess
    assert method.state_dict() == {"rounds_done": 0, "dual": 2.0, "bound": 3.0}  # 1 -> max(0, -1) = 0 -> 2
    other = build_method(config.METHODS["pdu"]())
    other.load_state_dict(method.state_dict())
    assert other.state_dict() == method.state_dict()


def test_task_arithmetic_takes_no_weight_decay() -> None:
    optimizer = config.OptimizerConfig(weight_decay=0.01)
    with pytest.raises(UserError, match=r"task_arithmetic\.optimizer\.weight_decay"):
        UnlearnConfig(task_arithmetic=config.METHODS["task_arithmetic"](optimizer=optimizer))


@pytest.mark.parametrize("variant", ["task_arithmetic", "task_arithmetic-sgd"])
def test_task_arithmetic_negates_the_product_of_adapters(variant: str) -> None:
    """B A against -s times that of a plain fit: mirrored factors alone would be 57 to 123 % off."""
    options: Any = OPTIONS[variant]
    deltas = {}
    for name, chosen in (("fit", config.FinetuneConfig(optimizer=options.optimizer)), ("negated", options)):
        torch.manual_seed(0)
        module = add_lora(seeded_model("llama"), config.LoraConfig(rank=2)).double()
        build_method(options).freeze(module)
        engine = TorchEngine(module, inner=options.optimizer, outer=options.optimizer)
        method = build_method(chosen, ROUNDS)
        method.start(engine)
        for streams in batches(variant, 1, 0, None, torch.float64):
            method.round(engine, iter(streams["forget"]), iter(streams["forget"]))
        layers = [part for part in module.modules() if hasattr(part, "get_delta_weight")]
        deltas[name] = torch.cat([layer.get_delta_weight("default").detach().ravel() for layer in layers])
    size = float((options.scale * deltas["fit"]).norm())
    assert size > 1e-3
    assert float((deltas["negated"] + options.scale * deltas["fit"]).norm()) < 1e-6 * size


def test_ceu_without_any_token_says_so() -> None:
    options = config.METHODS["ceu"](skip_tokens=1000)
    engine, method = TorchEngine(seeded_model("llama")), build_method(options)
    with pytest.raises(UserError, match="no token"):
        list(run(method, engine, batches("ceu", 1, 0, None)[:1]))
