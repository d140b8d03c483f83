"""What each pass of a round runs in: differences in fp32, everything else as model.precision says."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_models import tiny_model, token_batch

from ofmu_ray.algorithm import similarity_gradient
from ofmu_ray.algorithm.curvature import Exact, MeasuredDifference
from ofmu_ray.algorithm.space import Vector, combine
from ofmu_ray.algorithm.steps import Steps
from ofmu_ray.config import LoraConfig, OptimizerConfig
from ofmu_ray.engines import TorchEngine
from ofmu_ray.engines.products import fp32_products
from ofmu_ray.methods.ofmu import OFMU, OFMUConfig
from ofmu_ray.models.loading import add_lora

SGD = OptimizerConfig(name="sgd", lr=1e-3, clip=None)
BATCHES = {"forget": token_batch([9, 12], seed=0), "retain": token_batch([11, 8], seed=1)}
BF16_FP32 = {
    ("first_order", "forward"): (11, 0),
    ("lite", "forward"): (4, 6),  # 3 inner and the outer gradient; both ends of three differences
    ("lite", "central"): (4, 9),  # and the middle of each, which gives its direction
    ("full", "forward"): (0, 28),
    ("full", "central"): (0, 48),
}
"""Passes of a round with T = 5 (first_order: 3 + 8)."""


def watched(module: Any) -> list[str]:
    """What the matrix products of each forward pass from now on are in."""
    seen: list[str] = []

    def look(*_: Any) -> None:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        fp32 = {"highest": "fp32", "high": "tf32"}[torch.get_float32_matmul_precision()]
        seen.append("bf16" if product.dtype == torch.bfloat16 else fp32)
        assert torch.backends.cudnn.allow_tf32 == (fp32 == "tf32")

    module.model.layers[0].register_forward_pre_hook(look)
    return seen


def round_of(engine: TorchEngine, method: OFMU) -> None:
    method.round(engine, [BATCHES["forget"]], [BATCHES["retain"]])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16_autocast", "tf32"])
@pytest.mark.parametrize(("preset", "difference"), BF16_FP32)
def test_passes_of_a_preset_by_precision(preset: Any, difference: Any, precision: Any) -> None:
    """In the account, and as the model sees them, in a round without checks of steps (the second)."""
    low = precision.removesuffix("_autocast")
    engine = TorchEngine(tiny_model(), inner=SGD, outer=SGD, precision=precision)
    level = 50.0 if preset == "first_order" else None
    method = OFMU(OFMUConfig.from_preset(preset, difference=difference, forget_level=level))
    round_of(engine, method)  # checks steps
    before, seen = Counter(engine.account.precisions), watched(engine.module)
    round_of(engine, method)
    expected = +Counter(dict(zip((low, "fp32"), BF16_FP32[preset, difference], strict=True)))
    assert Counter(engine.account.precisions) - before == expected
    assert Counter(seen) == expected
    saved = engine.account.state()
    engine.account.load({name: value for name, value in saved.items() if name != "precisions"})  # an older checkpoint
    assert engine.account.precisions == {}
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", True)


@pytest.mark.parametrize("number", range(4))
def test_products_are_pinned_where_a_program_uses_torchs_newer_options(number: int) -> None:
    """torch then refuses to say what its earlier options are."""
    backends: Any = torch.backends
    places = [backends, backends.cudnn, backends.cudnn.conv, backends.cuda.matmul]
    chosen, fresh = places[number], places[number].fp32_precision
    chosen.fp32_precision = "tf32"
    before = [place.fp32_precision for place in places]
    try:
        for exact in (True, False):
            with fp32_products("tf32", exact=exact):
                assert [place.fp32_precision == "tf32" for place in places[2:]] == [not exact] * 2
            assert [place.fp32_precision for place in places] == before
    finally:
        chosen.fp32_precision = fresh


@pytest.mark.parametrize("difference", ["forward", "central"])
def test_grad_sim_under_autocast_is_that_of_fp32_to_the_bit(difference: Any) -> None:
    """At a check, between checks and at one that |g| asks for; rounded directions were 8 % off on SmolLM2-135M."""
    found = {}
    for precision in ("fp32", "bf16_autocast"):
        engine, steps = TorchEngine(tiny_model(), precision=precision), Steps(difference, check_every=100)
        curvature, products = MeasuredDifference(engine, steps), []
        for _ in range(3):
            products.append(grad_sim(engine, curvature)[0])
            if len(products) == 2:
                steps.products["forget"].gradient *= 10
        found[precision] = products, engine.account.gradient_passes
    assert all(torch.equal(one, other) for one, other in zip(found["fp32"][0], found["bf16_autocast"][0], strict=True))
    assert found["fp32"][1] == found["bf16_autocast"][1]


def grad_sim(engine: TorchEngine, curvature: Any) -> Vector:
    """grad Sim as a round computes it."""
    products: list[Vector] = []
    g_f, g_r = (
        engine.gradient(BATCHES[kind], kind=kind, differenced=curvature.differences)[0] for kind in ("forget", "retain")
    )
    _, u, w = similarity_gradient(g_f, g_r)
    for kind, base, direction in (("forget", g_f, u), ("retain", g_r, w)):
        norm = math.sqrt(engine.dot((direction, direction))[0])
        products.append(curvature.hessian_vector(BATCHES[kind], kind, base, list(direction), norm))
    return combine(1.0, products[0], 1.0, products[1])


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_grad_sim_keeps_its_bound_under_autocast(difference: Any, adapted: bool) -> None:
    """Between checks, against double backward in float64."""
    module = tiny_model()
    if adapted:
        module = add_lora(module, LoraConfig(rank=2))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    exact = TorchEngine(copy.deepcopy(module).double())
    expected = grad_sim(exact, Exact(exact, "cosine"))[0]
    for precision, bound in (("fp32", 0.02), ("bf16_autocast", 0.05)):
        engine = TorchEngine(copy.deepcopy(module), precision=precision)  # type: ignore[arg-type]
        curvature = MeasuredDifference(engine, Steps(difference))
        grad_sim(engine, curvature)
        found = grad_sim(engine, curvature)[0]
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < bound, (precision, error)


@pytest.mark.parametrize("adapted", [False, True])
def test_adapters_stay_fp32_beside_bf16_weights(adapted: bool) -> None:
    make: Callable[[], torch.nn.Module] = lambda: tiny_model().bfloat16()  # noqa: E731
    module = add_lora(make(), LoraConfig(rank=2)) if adapted else make()
    engine = TorchEngine(module, precision="bf16")
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in engine.module.parameters()}
    assert dtypes == ({True: torch.float32, False: torch.bfloat16} if adapted else {True: torch.bfloat16})
    assert engine.weights()[0].dtype == torch.float32
    start = engine.weights()[0]
    gradient, _ = engine.gradient(BATCHES["forget"])
    assert float(gradient[0].norm()) > 0
    # a step too small for bf16 reaches the weights that the passes read
    with engine.displaced([torch.ones_like(start)], 1e-6):
        read = torch.cat([p.detach().reshape(-1) for p in engine.module.parameters() if p.requires_grad])
        moved = read.float() - start
        assert bool((moved != 0).all()) == adapted
