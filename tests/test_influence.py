"""Influence unlearning against matrices inverted explicitly, and against the optimum without the forget rows.

Engines, ranks and resumption: tests/test_methods.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional

from ofmu_ray.config import METHODS, UnlearnConfig
from ofmu_ray.engines import TorchEngine
from ofmu_ray.engines.reshard import reshard
from ofmu_ray.errors import UserError
from ofmu_ray.methods import build_method

Rows = tuple[torch.Tensor, torch.Tensor]
"""Inputs [rows, features] and labels [rows]."""


def logistic(module: Any, rows: Rows) -> tuple[torch.Tensor, int]:
    inputs, labels = rows
    return functional.binary_cross_entropy_with_logits(module(inputs)[:, 0], labels, reduction="sum"), len(labels)


def drawn_rows(count: int, features: int, seed: int) -> Rows:
    """Rows of a logistic model with the weights 1, 2, ..."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, features, generator=random, dtype=torch.float64)
    chances = (inputs @ torch.arange(1.0, features + 1, dtype=torch.float64)).sigmoid()
    return inputs, (torch.rand(count, generator=random, dtype=torch.float64) < chances).double()


def each(rows: Rows) -> list[Rows]:
    return [(rows[0][at : at + 1], rows[1][at : at + 1]) for at in range(len(rows[1]))]


def linear(weights: torch.Tensor) -> torch.nn.Linear:
    module = torch.nn.Linear(len(weights), 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(weights)
    return module


def gradient(weights: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Of the mean loss."""
    inputs, labels = rows
    return ((inputs @ weights).sigmoid() - labels) @ inputs / len(labels)


def unlearned(weights: torch.Tensor, forget: Sequence[Rows], retain: Sequence[Rows], **options: Any) -> torch.Tensor:
    """Weights after as many rounds as there are retain batches."""
    config = METHODS["influence"](**options)
    module, (inner, outer) = linear(weights), config.optimizers
    engine, method = TorchEngine(module, logistic, inner=inner, outer=outer), build_method(config)
    method.start(engine)
    for number, batch in enumerate(retain):
        method.round(engine, [forget[number % len(forget)]], [batch])
    assert engine.account.gradient_passes == {"forget": len(retain), "retain": len(retain)}
    return module.weight.detach()[0]


def recursion(vector: torch.Tensor, gradients: Sequence[torch.Tensor], damping: float) -> torch.Tensor:
    """WoodFisher's (arXiv 2004.14340): the inverse, updated by Sherman and Morrison's formula."""
    inverse, count = torch.eye(len(vector), dtype=torch.float64) / damping, len(gradients)
    for g in gradients:
        inverse = inverse - torch.outer(inverse @ g, inverse @ g) / (count + g @ inverse @ g)
    return inverse @ vector


@pytest.mark.parametrize("features", [2, 6])
def test_the_step_is_that_of_the_inverted_fisher_matrix(features: int) -> None:
    """Two and six parameters, three kept gradients of five: fewer and more than parameters."""
    weights = torch.linspace(-1, 1, features, dtype=torch.float64)
    forget, retain = each(drawn_rows(4, features, 1)), each(drawn_rows(5, features, 2))
    found = unlearned(weights, forget, retain, alpha=0.7, damping=0.05, gradients=3, forget_share=0.4)
    kept = [gradient(weights, rows) for rows in retain[:3]]
    ascents = [gradient(weights, forget[number % 4]) - gradient(weights, retain[number]) for number in range(5)]
    fisher = 0.05 * torch.eye(features, dtype=torch.float64) + sum(torch.outer(g, g) for g in kept) / 3
    step = torch.linalg.inv(fisher) @ (sum(ascents) / 5)
    torch.testing.assert_close(found, weights + 0.7 * 0.4 * step, rtol=0, atol=1e-12)
    torch.testing.assert_close(step, recursion(sum(ascents) / 5, kept, 0.05), rtol=0, atol=1e-12)
    assert step.norm() > 1


def optimum(rows: Rows, weights: torch.Tensor) -> torch.Tensor:
    """By Newton's method."""
    for _ in range(30):
        p = (rows[0] @ weights).sigmoid()
        hessian = (rows[0].T * (p * (1 - p))) @ rows[0] / len(p)
        weights = weights - torch.linalg.solve(hessian, gradient(weights, rows))
    assert gradient(weights, rows).norm() < 1e-12
    return weights


def test_alpha_1_leads_to_the_optimum_without_the_forget_rows() -> None:
    """From that of all rows, a tenth of them mislabelled: the influence of these is what refitting changes."""
    forget, retain = drawn_rows(10, 2, 5), drawn_rows(90, 2, 6)
    forget = forget[0], torch.zeros(10, dtype=torch.float64)
    target = optimum((torch.cat([forget[0], retain[0]]), torch.cat([forget[1], retain[1]])), torch.zeros(2).double())
    without = optimum(retain, target)
    options = {"alpha": 1.0, "gradients": 90, "forget_share": 0.1}
    found = unlearned(target, each(forget), each(retain), damping=1e-6, **options)
    ascent = unlearned(target, each(forget), each(retain), damping=1.0, **options)
    far = float((target - without).norm())
    assert float((found - without).norm()) < 0.15 * far
    assert float((ascent - without).norm()) > 0.9 * far  # H is nearly I there: a gradient step of the same length


@pytest.mark.parametrize("before", [(2, 3), (1, 5)])
def test_kept_vectors_are_resharded_with_the_weights(before: tuple[int, int]) -> None:
    """From two ranks to one and back; rank 1's share of five elements ends with padding."""
    workers, share = before

    def layout(workers: int, rank: int) -> dict[str, Any]:
        size = -(-5 // workers)
        return {"pieces": [(5, size)], "shards": [size], "rank": rank, "layout": "zero 3", "workers": workers}

    whole = torch.cat([torch.arange(1.0, 6.0), torch.zeros(workers * share - 5)])
    states = [
        {
            "layout": layout(workers, rank),
            "masters": [whole[rank * share : (rank + 1) * share]],
            "optimizers": {},
            "kept": {"difference": [-whole[rank * share : (rank + 1) * share]]},
        }
        for rank in range(workers)
    ]
    after = 3 - workers
    parts = [reshard(states, layout(after, rank)) for rank in range(after)]
    for name, sign in (("masters", 1), ("kept", -1)):
        found = torch.cat([(part[name] if name == "masters" else part[name]["difference"])[0] for part in parts])
        assert found[:5].tolist() == [sign * value for value in (1, 2, 3, 4, 5)]


def test_options() -> None:
    for wrong in ({"alpha": 0.0}, {"damping": 0.0}, {"gradients": 0}, {"forget_share": 0.0}, {"forget_share": 1.5}):
        (name,) = wrong
        with pytest.raises(UserError, match=rf"influence\.{name} = "):
            UnlearnConfig(influence=METHODS["influence"](**wrong))


def test_the_share_is_counted() -> None:
    class Stream:
        def __init__(self, rows: int):
            self.used_rows = rows

    class Prepared:
        streams: ClassVar = {"forget": Stream(30), "retain": Stream(70), "test": Stream(500)}

    options: Any = METHODS["influence"]
    for given, used in ((None, 0.3), (0.5, 0.5)):
        assert options(forget_share=given).completed(Prepared(), None, "").forget_share == used
