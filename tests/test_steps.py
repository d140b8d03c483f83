"""Measured steps of finite differences: estimates, error bounds, passes, resumption, notes."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from engine_models import tiny_model, token_batch

from ofmu_ray.algorithm import similarity_gradient
from ofmu_ray.algorithm.curvature import Curvature, Exact, FiniteDifference, MeasuredDifference
from ofmu_ray.algorithm.space import Vector, combine
from ofmu_ray.algorithm.steps import START, StepEstimate, Steps
from ofmu_ray.config import LoraConfig, ModelConfig, OptimizerConfig, UnlearnConfig
from ofmu_ray.engines import TorchEngine
from ofmu_ray.errors import UserError
from ofmu_ray.methods.ofmu import OFMU, OFMUConfig
from ofmu_ray.models.loading import add_lora

BATCHES = {"forget": token_batch([9, 14, 11], 0), "retain": token_batch([12, 10, 8], 1)}
SGD = OptimizerConfig(name="sgd", lr=0.3, clip=1.0)


def grad_sim(engine: TorchEngine, curvature: Curvature) -> Vector:
    """H_f u + H_r w."""
    g = [engine.gradient(BATCHES[kind], kind=kind)[0] for kind in ("forget", "retain")]  # type: ignore[arg-type]
    _, u, w = similarity_gradient(*g)
    norms = [math.sqrt(engine.dot((v, v))[0]) for v in (u, w)]  # type: ignore[arg-type]
    halves = [
        curvature.hessian_vector(BATCHES[kind], kind, base, list(v), norm)  # type: ignore[arg-type]
        for kind, base, v, norm in zip(BATCHES, g, (u, w), norms, strict=True)
    ]
    return combine(1.0, halves[0], 1.0, halves[1])


def fitted(lora: bool) -> torch.nn.Module:
    """A tiny Llama that knows its rows, so gradients are small and u and w large; LoRA's B is 0."""
    torch.manual_seed(0)
    engine = TorchEngine(tiny_model(), inner=OptimizerConfig(lr=1e-2))
    for _ in range(60):
        for batch in BATCHES.values():
            engine.apply(engine.gradient(batch)[0], "inner")
    module = copy.deepcopy(engine.module)
    return add_lora(module, LoraConfig(rank=2)) if lora else module


def error_of(engine: TorchEngine, curvature: Curvature) -> float:
    reference = TorchEngine(copy.deepcopy(engine.module).double())
    expected = grad_sim(reference, Exact(reference, "cosine"))[0]
    return float((grad_sim(engine, curvature)[0].double() - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_measured_steps_keep_the_bound_and_know_their_error(lora: bool) -> None:
    """2 % at the start and after 30 updates, at a check and after it; the former fixed step misses it with LoRA."""
    engine = TorchEngine(fitted(lora), inner=SGD, outer=SGD)
    method = OFMU(OFMUConfig.from_preset("lite", rho=0.0))
    fixed, measured = [], []
    for _ in range(2):
        steps = copy.deepcopy(method.steps)
        steps.round = method.rounds_done
        fixed.append(error_of(engine, FiniteDifference(engine, "forward", 1e-5)))
        for _ in range(2):
            curvature = MeasuredDifference(engine, steps)
            measured.append(error_of(engine, curvature))
            error = math.hypot(*(curvature.error(kind) or 0.0 for kind in ("forget", "retain")))  # type: ignore[arg-type]
            sim = float(grad_sim(engine, curvature)[0].norm())
            assert measured[-1] / 10 < error / sim < 10 * max(measured[-1], 1e-3)
        for _ in range(5):
            method.round(engine, [BATCHES["forget"]], [BATCHES["retain"]])
    assert engine.account.updates == 60
    assert max(measured) < 0.02, (measured, fixed)
    if lora:
        assert fixed[0] > 0.02


class Known(torch.nn.Module):
    """Gradient g + h Hv + h^2 A/2 + h^3 B/6 along v, by a polynomial in one number; noise by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("sigma", [1e-9, 1e-6])
def test_an_estimate_finds_noise_and_curvature(sigma: float) -> None:
    torch.manual_seed(0)
    n, h = 4000, 1e-2
    product, second, third = (torch.randn(n, dtype=torch.float64) for _ in range(3))
    unit = sigma / math.sqrt(n)

    def gradient(x: float) -> torch.Tensor:
        return x * product + x**2 / 2 * second + x**3 / 6 * third + unit * torch.randn(n, dtype=torch.float64)

    base = gradient(0.0)
    pairs = [(gradient(x), gradient(-x)) for x in (h, h / 4)]
    (s, d), (x, y) = ((plus + minus - 2 * base, plus - minus) for plus, minus in pairs)
    sums = [float(a @ b) for a, b in ((s, s), (s, x), (x, x), (d, d), (d, y), (y, y))]
    estimate = StepEstimate.of(h, sums, float(base.norm()), 1e-16)
    assert estimate.sigma == pytest.approx(sigma, rel=0.05)
    assert estimate.product == pytest.approx(float(product.norm()), rel=0.01)
    assert estimate.first == pytest.approx(float(second.norm()) / 2, rel=0.05)
    assert estimate.second == pytest.approx(float(third.norm()) / 6, rel=0.05)
    for central in (False, True):
        best = estimate.best(central)
        assert estimate.error(central, best) <= min(estimate.error(central, factor * best) for factor in (0.8, 1.25))


@pytest.mark.parametrize("frequency", [2e3, 8e3])
def test_a_step_far_beyond_the_curvature_is_not_taken_for_noise(frequency: float) -> None:
    """Along a few weights the gradient goes round once or more within the first step, or within a quarter of it."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4000, 1, bias=False)
    torch.nn.init.uniform_(module.weight, -1, 1)

    def loss(module: torch.nn.Module, batch: Any) -> torch.Tensor:
        return (torch.sin(frequency * module.weight) / frequency).sum()  # type: ignore[operator]

    engine, steps = TorchEngine(module, loss), Steps()
    direction = torch.zeros(4000)
    direction[:40] = 1.0
    expected = -frequency * torch.sin(frequency * module.weight.detach().double().flatten()) * direction
    g, norm = engine.gradient(None)[0], math.sqrt(40)
    for _ in range(2):  # by the check, and by the step that it chose
        curvature = MeasuredDifference(engine, steps)
        product = curvature.hessian_vector(None, "forget", g, [direction.clone()], norm)[0]
        error = float((product.double() - expected).norm())
        assert error < 0.02 * float(expected.norm())
        assert error / 10 < (curvature.error("forget") or 0.0) < 10 * error
    assert steps.products["forget"].probe <= START / 16


def test_curvature_that_grows_between_checks_asks_for_one() -> None:
    """|g| stays as it is; only the two ends and the middle of a central difference show that its step is too long."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4000, 1, bias=False)
    torch.nn.init.uniform_(module.weight, -1, 1)
    frequency = 20.0

    def loss(module: torch.nn.Module, batch: Any) -> torch.Tensor:
        return (torch.sin(frequency * module.weight) / frequency).sum()  # type: ignore[operator]

    engine, steps = TorchEngine(module, loss), Steps("central", check_every=100)
    passes, errors, checked, chosen = [], [], [], []
    for steps.round, frequency in enumerate([20.0, 20.0, 6e3, 6e3]):
        direction = torch.zeros(4000)
        direction[:400] = 1.0
        expected = -frequency * torch.sin(frequency * module.weight.detach().double().flatten()) * direction
        g = engine.gradient(None)[0]
        before = engine.account.gradient_passes["forget"]
        curvature = MeasuredDifference(engine, steps)
        product = curvature.hessian_vector(None, "forget", g, [direction.clone()], 20.0)[0]
        passes.append(engine.account.gradient_passes["forget"] - before)
        errors.append(float((product.double() - expected).norm() / expected.norm()))
        checked.append(steps.products["forget"].round)
        chosen.append(steps.products["forget"].relative)
    assert checked == [0, 0, 2, 2]
    assert passes[1] == passes[3] == 2
    assert passes[2] > 2 + 4, "the difference that is too long, and a check"
    assert max(errors) < 0.02
    old = FiniteDifference(engine, "central", chosen[0]).hessian_vector(None, "forget", g, [direction.clone()], 20.0)[0]
    assert float((old.double() - expected).norm() / expected.norm()) > 0.02


def test_noise_that_does_not_fall_with_the_step_is_noise() -> None:
    """At a stationary point any rounding is more than the gradient; shorter steps would only make it worse."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4000, 1, bias=False)
    optimum = module.weight.detach().clone()

    def loss(module: torch.nn.Module, batch: Any) -> torch.Tensor:
        noise = 1e-6 * torch.randn_like(optimum)
        return ((module.weight - optimum).square() / 2 + noise * module.weight).sum()  # type: ignore[operator]

    engine, steps = TorchEngine(module, loss), Steps()
    direction = torch.randn(4000)
    g, norm = engine.gradient(None)[0], float(direction.norm())
    product = MeasuredDifference(engine, steps).hessian_vector(None, "forget", g, [direction.clone()], norm)[0]
    assert float((product - direction).norm()) < 0.02 * norm
    assert steps.products["forget"].relative > START


def test_passes_of_checks_are_in_the_account() -> None:
    """Four passes per product and two per move of the pair, in round 1 and every n; no more batches."""
    engine = TorchEngine(tiny_model(), inner=OptimizerConfig(lr=1e-30), outer=OptimizerConfig(lr=1e-30))
    passes = []
    for every in (2, 100):
        method = OFMU(OFMUConfig.from_preset("lite", inner_steps=3, difference="forward", step_check_every=every))
        assert method.batches_per_round() == {"forget": 3, "retain": 2}
        for _ in range(5):
            before = dict(engine.account.gradient_passes)
            method.round(engine, [BATCHES["forget"]], [BATCHES["retain"]])
            after = engine.account.gradient_passes
            passes.append({kind: after[kind] - before[kind] for kind in after})
    plain = {"forget": 5, "retain": 3}
    assert [one == plain for one in passes] == [False, True, False, True, False, False, True, True, True, True]
    assert passes[2] == {"forget": 3 + 4 + 4, "retain": 2 + 4}, "a check that finds what the last one found"
    for kind, least in (("forget", 11), ("retain", 6)):
        assert least <= passes[0][kind] <= least + 8 * (1 + (kind == "forget"))
        assert (passes[0][kind] - least) % 2 == 0


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["lite", "full"])
def test_a_resumed_run_takes_the_same_steps(preset: Any) -> None:
    config = OFMUConfig.from_preset(preset, inner_steps=2, step_check_every=3, beta=1.0, rho=0.01)

    def run(engine: TorchEngine, method: OFMU, rounds: int) -> None:
        for _ in range(rounds):
            method.round(engine, [BATCHES["forget"]], [BATCHES["retain"]])

    engine, method = TorchEngine(tiny_model(), inner=SGD, outer=SGD), OFMU(config)
    run(engine, method, 2)
    saved = engine.state_dict(), json.loads(json.dumps(method.state_dict()))
    run(engine, method, 3)
    other, resumed = TorchEngine(tiny_model(), inner=SGD, outer=SGD), OFMU(config)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(other, resumed, 3)
    assert torch.equal(engine.weights()[0], other.weights()[0])
    assert engine.account == other.account
    assert method.state_dict() == resumed.state_dict()
    assert {step.round for step in method.steps.products.values()} == {3}


def test_a_gradient_of_another_size_asks_for_a_check() -> None:
    engine, steps = TorchEngine(tiny_model()), Steps(check_every=100)
    assert steps.due("forget", 1.0)
    grad_sim(engine, MeasuredDifference(engine, steps))
    size = steps.products["forget"].gradient
    due = [steps.due("forget", factor * size) for factor in (0.2, 0.5, 1.0, 2.0, 5.0)]
    assert due == [True, False, False, False, True]
    assert not steps.due("forget", math.nan)


def test_a_gradient_that_is_not_finite_ends_a_check() -> None:
    def loss(module: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.nan * sum(p.sum() for p in module.parameters())  # type: ignore[return-value]

    engine, steps = TorchEngine(torch.nn.Linear(2, 2), loss), Steps()
    direction = [torch.ones(6)]
    product = MeasuredDifference(engine, steps).hessian_vector(None, "forget", engine.gradient(None)[0], direction, 2.4)
    assert bool(product[0].isnan().all())
    assert steps.products["forget"].probe == START, "the next check begins anew"


def test_notes_of_a_rough_difference_and_a_heavy_penalty_come_once() -> None:
    engine = TorchEngine(tiny_model(), inner=SGD, outer=SGD)
    heavy = OFMU(OFMUConfig.from_preset("lite", beta=1e6, rho=10.0, rho_max=10.0, step_check_every=1))
    rounds = []
    for _ in range(2):
        metrics = heavy.round(engine, [BATCHES["forget"]], [BATCHES["retain"]])
        rounds.append(list(heavy.notes))
    assert metrics["penalty_ratio"] > 1
    assert metrics["difference_error"] > 0.1
    assert [len(notes) for notes in rounds] == [2, 0]
    assert "round 1: beta times the estimated error" in rounds[0][0]
    assert "ofmu.rho_max" in rounds[0][1]
    light = OFMU(OFMUConfig.from_preset("lite", beta=1e-6, rho=1e-9))
    metrics = light.round(engine, [BATCHES["forget"]], [BATCHES["retain"]])
    assert list(light.notes) == []
    assert metrics["difference_error"] < 1e-3
    assert metrics["penalty_ratio"] < 1e-3
    assert 0 < metrics["similarity_error"] < 0.05


def test_rho_is_bounded() -> None:
    for config, bound in ((OFMUConfig(rho=0.001), 0.01), (OFMUConfig(rho=0.5, rho_max=0.7, rho_growth=3.0), 0.7)):
        method = OFMU(config)
        rhos = []
        for method.rounds_done in (0, 1, 2000, 10**6):
            rhos.append(method.rho)
        assert rhos == [config.rho, min(bound, config.rho * config.rho_growth), bound, bound]
    falling = OFMU(OFMUConfig(rho=0.5, rho_growth=0.5))
    falling.rounds_done = 10**6
    assert falling.rho == 0.0
    with pytest.raises(UserError, match=r"ofmu\.rho_max"):
        OFMUConfig(rho=0.5, rho_max=0.1)


def test_bf16_weights_are_refused_where_something_is_differenced() -> None:
    bf16 = ModelConfig(precision="bf16")
    for options in ({}, {"beta": 0.0}, {"rho": 0.0}):
        with pytest.raises(UserError, match=r"model\.precision = bf16.*bf16_autocast.*--ofmu\.beta 0 --ofmu\.rho 0"):
            UnlearnConfig(model=bf16, ofmu=OFMUConfig(**options))
    assert UnlearnConfig(model=bf16, ofmu=OFMUConfig(beta=0.0, rho=0.0)).model is bf16
    assert UnlearnConfig(model=bf16, ofmu=OFMUConfig(beta=0.0, penalty_curvature="none")).model is bf16
    assert UnlearnConfig(model=bf16, method="npo").model is bf16
    assert UnlearnConfig(model=ModelConfig(precision="bf16_autocast"), ofmu=OFMUConfig()).ofmu.beta > 0
    assert UnlearnConfig(model=bf16).ofmu.preset == "first_order"  # no difference is taken
