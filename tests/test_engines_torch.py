"""The single-process engine: closed forms, exact restoration, torch's optimisers, state, exports."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from engine_models import freeze, tiny_model, token_batch

from ofmu_ray.config import OptimizerConfig
from ofmu_ray.engines import Batch, DeepSpeedEngine, TorchEngine
from ofmu_ray.errors import UserError

QUADRATIC = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)


class Point(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=dtype))


def quadratic(module: Any, shift: torch.Tensor) -> torch.Tensor:
    d = module.x - shift
    return 0.5 * d @ QUADRATIC.to(d.dtype) @ d


def mlp(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).to(dtype)


def squares(module: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int]:
    x, y = batch
    return (module(x) - y).square().sum(), len(x)


def rows(n: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator).to(dtype), torch.randn(n, 2, generator=generator).to(dtype)


def test_quadratic_in_float64_matches_the_closed_form() -> None:
    engine = TorchEngine(Point(), quadratic)
    shift = torch.tensor([0.3, 0.1, -0.7], dtype=torch.float64)
    d = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) - shift
    (g,), value = engine.gradient(shift)
    assert g.dtype == torch.float64
    torch.testing.assert_close(g, QUADRATIC @ d, rtol=0, atol=1e-13)
    assert value == pytest.approx(float(0.5 * d @ QUADRATIC @ d), abs=1e-13)
    with engine.displaced([g], 0.25):  # the gradient of a quadratic is linear in the displacement
        (moved,), _ = engine.gradient(shift)
    torch.testing.assert_close(moved, g + 0.25 * QUADRATIC @ g, rtol=0, atol=1e-12)
    assert engine.dot(([g], [g]), ([g], [moved]))[1] == pytest.approx(float(g @ moved), abs=1e-12)
    assert engine.parameters_norm() == pytest.approx(math.sqrt(1 + 4 + 0.25), abs=1e-14)


def test_double_backward_matches_the_closed_form() -> None:
    engine = TorchEngine(Point(), quadratic)
    value, gradients = engine.graph_gradient(torch.zeros(3, dtype=torch.float64))
    half_square = 0.5 * sum((g * g).sum() for g in gradients)
    hessian_times_gradient = engine.as_vector(torch.autograd.grad(half_square, engine.parameters()))
    x = engine.parameters()[0].detach()
    torch.testing.assert_close(hessian_times_gradient[0], QUADRATIC @ QUADRATIC @ x, rtol=0, atol=1e-12)
    assert float(value.detach()) == pytest.approx(float(0.5 * x @ QUADRATIC @ x))
    assert engine.account.gradient_passes == {"forget": 1, "retain": 0}
    again = engine.as_tensors(engine.as_vector(gradients))
    assert [t.shape for t in again] == [p.shape for p in engine.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
def test_displacement_restores_to_the_bit_and_nests(precision: Any) -> None:
    engine = TorchEngine(tiny_model(), precision=precision)
    batch = token_batch([9, 12], seed=0)
    start = engine.state_dict()["masters"]
    u, _ = engine.gradient(batch, differenced=True)
    with engine.displaced(u, 0.3):
        once, value = engine.gradient(batch)
        with engine.displaced(once, -0.7):
            twice, other = engine.gradient(batch)
        assert other != value
        assert torch.equal(engine.gradient(batch)[0][0], once[0])
    assert all(map(torch.equal, start, engine.state_dict()["masters"]))
    assert torch.equal(engine.gradient(batch, differenced=True)[0][0], u[0])

    # a displacement after a step starts from the new weights, not from the copy of the old ones
    engine.apply(twice, "inner")
    moved = engine.state_dict()["masters"]
    assert not torch.equal(moved[0], start[0])
    with pytest.raises(KeyError), engine.displaced(u, 1.0):
        raise KeyError
    assert all(map(torch.equal, moved, engine.state_dict()["masters"]))


def test_only_differenced_passes_leave_autocast() -> None:
    batch = token_batch([9, 12], seed=0)
    exact = TorchEngine(tiny_model()).gradient(batch)[0]
    engine = TorchEngine(tiny_model(), precision="bf16_autocast")
    assert torch.equal(engine.gradient(batch, differenced=True)[0][0], exact[0])
    assert not torch.equal(engine.gradient(batch)[0][0], exact[0])
    with engine.displaced(exact, 0.0):
        assert torch.equal(engine.gradient(batch)[0][0], exact[0])


def test_running_statistics_move_in_plain_passes_only() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    engine = TorchEngine(module, squares)
    g, _ = engine.gradient(rows(8))
    after_one = copy.deepcopy(dict(module.named_buffers()))
    assert int(after_one["1.num_batches_tracked"]) == 1
    with engine.displaced(g, 0.1):
        engine.gradient(rows(8))
        with engine.displaced(g, 0.1):
            engine.gradient(rows(8, seed=2))
    assert all(torch.equal(after_one[name], buffer) for name, buffer in module.named_buffers())

    saved = engine.state_dict()
    engine.gradient(rows(8, seed=3))
    engine.load_state_dict(saved)
    assert all(torch.equal(after_one[name], buffer) for name, buffer in module.named_buffers())


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(name="sgd", lr=0.1, clip=None),
        OptimizerConfig(name="sgd", lr=0.1, clip=0.5, momentum=0.9),
        OptimizerConfig(name="adamw", lr=0.01, clip=None, weight_decay=0.1),
        OptimizerConfig(name="adamw", lr=0.01, clip=0.3, beta1=0.8),
    ],
)
def test_steps_equal_torch_optim(config: OptimizerConfig) -> None:
    reference = mlp(torch.float64)
    parameters = list(reference.parameters())
    optimizer: torch.optim.Optimizer
    if config.name == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum)
    else:
        betas = (config.beta1, config.beta2)
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    engine = TorchEngine(mlp(torch.float64), squares, inner=config, outer=OptimizerConfig(name="sgd"))
    for step in range(5):
        batch = rows(6, seed=step, dtype=torch.float64)
        optimizer.zero_grad()
        loss, count = squares(reference, batch)
        (loss / count).backward()
        expected = torch.nn.utils.clip_grad_norm_(parameters, config.clip or 1e9)
        if step == 3:
            engine.set_learning_rate("inner", 0.003)
            optimizer.param_groups[0]["lr"] = 0.003
        optimizer.step()
        g, _ = engine.gradient(batch)
        assert engine.apply(g, "inner") == pytest.approx(float(expected))
    torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in parameters]), engine.shards.masters[0])
    assert engine.account.updates == 5


def test_sgd_decays_weights_apart_from_the_gradient() -> None:
    engine = TorchEngine(Point(), quadratic, inner=OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.5, clip=None))
    engine.apply([torch.zeros(3, dtype=torch.float64)], "inner")
    expected = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) * (1 - 0.1 * 0.5)
    torch.testing.assert_close(engine.shards.masters[0], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("decays", [True, False])
def test_norms_and_biases_are_decayed_only_if_asked(rule: str, decays: bool) -> None:
    config = OptimizerConfig(name=rule, lr=0.1, weight_decay=0.5, clip=None)  # type: ignore[arg-type]
    module = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    engine = TorchEngine(module, inner=config, decay_norms=decays)
    engine.apply([torch.zeros_like(master) for master in engine.shards.masters], "inner")
    shrunk = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert shrunk == {name for name in before if decays or before[name].dim() > 1}
    assert any("norm" in name for name in before)
    for name in shrunk:
        torch.testing.assert_close(module.get_parameter(name).detach(), before[name] * (1 - 0.1 * 0.5))


def test_decay_without_norms_equals_torchs_parameter_groups() -> None:
    config = OptimizerConfig(name="adamw", lr=0.01, clip=None, weight_decay=0.3)
    reference = mlp(torch.float64)
    groups = [
        {"params": [p for p in reference.parameters() if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in reference.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    engine = TorchEngine(mlp(torch.float64), squares, inner=config, decay_norms=False)
    for step in range(3):
        batch = rows(6, seed=step, dtype=torch.float64)
        optimizer.zero_grad()
        loss, count = squares(reference, batch)
        (loss / count).backward()
        optimizer.step()
        engine.apply(engine.gradient(batch)[0], "inner")
    expected = torch.cat([p.detach().reshape(-1) for p in reference.parameters()])
    torch.testing.assert_close(engine.shards.masters[0], expected)


def test_loops_keep_their_own_moments() -> None:
    config = OptimizerConfig(name="sgd", lr=0.1, momentum=0.9, clip=None)
    one = [torch.ones(3, dtype=torch.float64)]
    engine = TorchEngine(Point(), quadratic, inner=config, outer=config)
    engine.apply(one, "inner")
    engine.apply(one, "outer")  # no inner momentum in it
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(engine.shards.masters[0], start - 0.2)


def test_a_vector_that_is_not_finite_changes_nothing() -> None:
    engine = TorchEngine(Point(), quadratic)
    before = engine.shards.masters[0].clone()
    assert math.isnan(engine.apply([torch.full((3,), float("nan"), dtype=torch.float64)], "inner"))
    assert torch.equal(engine.shards.masters[0], before)
    assert engine.account.updates == 0


def test_micro_batches_weigh_by_their_tokens_and_are_accounted() -> None:
    lengths = [6, 15, 9, 20]
    whole = token_batch(lengths, seed=3)
    parts = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(4)]
    a, b = TorchEngine(tiny_model()), TorchEngine(tiny_model())
    g, value = a.gradient(whole, kind="retain")
    h, other = b.gradient(Batch(parts), kind="retain")
    torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-6)
    assert value == pytest.approx(other, rel=1e-6)
    assert a.account == b.account
    assert a.account.gradient_passes == {"forget": 0, "retain": 1}
    assert a.account.tokens == sum(lengths)
    assert a.account.flops == 6.0 * a.numel * sum(lengths)


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_state_continues_to_the_bit(offload: str) -> None:
    def fresh() -> TorchEngine:
        config = OptimizerConfig(lr=0.01)
        return TorchEngine(tiny_model(), inner=config, outer=config, offload=offload)

    def two_steps(engine: TorchEngine) -> torch.Tensor:
        for loop in ("inner", "outer"):
            engine.apply(engine.gradient(token_batch([9, 12], seed=5))[0], loop)
        return engine.shards.masters[0].clone()

    engine = fresh()
    two_steps(engine)
    saved = engine.state_dict()
    expected = two_steps(engine)
    counts = engine.account.state()
    resumed = fresh()
    resumed.load_state_dict(saved)
    assert torch.equal(two_steps(resumed), expected)
    assert resumed.account.state() == counts
    with pytest.raises(UserError, match=r"same training\.engine, training\.zero_stage and model"):
        TorchEngine(mlp(), squares).load_state_dict(saved)


@pytest.mark.parametrize(
    ("earlier", "own"),
    [
        (OptimizerConfig(weight_decay=0.5, beta1=0.5), OptimizerConfig(weight_decay=0.0, beta1=0.9)),
        (OptimizerConfig(name="sgd", momentum=0.5), OptimizerConfig(name="sgd", momentum=0.9)),
    ],
)
def test_a_state_of_another_run_continues_with_the_options_of_this_one(
    earlier: OptimizerConfig, own: OptimizerConfig
) -> None:
    """As a sweep's trial that goes on from a better one's checkpoint."""
    first, second = TorchEngine(mlp(), squares, outer=earlier), TorchEngine(mlp(), squares, outer=own)
    first.apply(first.gradient(rows(6))[0], "outer")
    second.load_state_dict(first.state_dict())
    copied = TorchEngine(mlp(), squares, outer=own)
    copied.apply(copied.gradient(rows(6))[0], "outer")
    for engine in (second, copied):  # the same weights and moments, whoever made them
        engine.shards.masters[0].copy_(first.shards.masters[0])
        state, source = (e._optimizers["outer"]._optimizer.state for e in (engine, first))
        for name, value in next(iter(source.values())).items():
            next(iter(state.values()))[name].copy_(value)
        engine.apply(engine.gradient(rows(6, seed=2))[0], "outer")
    assert torch.equal(second.weights()[0], copied.weights()[0])


def test_tied_and_frozen_parameters() -> None:
    module = tiny_model(tie=True)
    freeze(module, r"layers\.0\.")
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    engine = TorchEngine(module, inner=OptimizerConfig(lr=0.1))
    assert engine.trainable_names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in engine.trainable_names
    for _ in range(2):
        engine.apply(engine.gradient(token_batch([9, 12], seed=0))[0], "inner")
    weights = engine.full_weights()
    assert weights is not None
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    assert all(torch.equal(weights[name], value) for name, value in frozen.items())
    assert set(weights) == set(module.state_dict())


def test_evaluate_runs_without_dropout_or_gradients() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(5, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 2))
    engine = TorchEngine(module, squares)

    def measure(part: torch.nn.Module, batch: Any) -> tuple[float, bool, bool]:
        out = part(batch[0])
        return float(out.sum()), out.requires_grad, part.training

    first, second = engine.evaluate(Batch([rows(4), rows(4)]), measure)
    assert first == second
    assert first[1:] == (False, False)
    assert module.training
    assert torch.equal(engine.gradient(rows(4))[0][0], engine.gradient(rows(4))[0][0])  # dropout is off in training


def test_mistakes_are_named() -> None:
    module = torch.nn.ModuleDict({"used": torch.nn.Linear(5, 2), "idle": torch.nn.Linear(5, 2)})
    with pytest.raises(UserError, match=r"idle\.weight, idle\.bias"):
        TorchEngine(module, lambda m, b: squares(m["used"], b)).gradient(rows(3))
    masked = token_batch([9], seed=0)
    masked["labels"].fill_(-100)
    with pytest.raises(UserError, match="all labels are masked"):
        TorchEngine(tiny_model()).gradient(masked)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="all are frozen"):
        TorchEngine(module, squares)
    with pytest.raises(UserError, match=r"torch\.distributed"):
        DeepSpeedEngine(mlp(), squares)
