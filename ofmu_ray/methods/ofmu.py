"""OFMU: bi-level unlearning by a penalty (Asif and Amiri, arXiv 2509.22483, Algorithm 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.schedules import learning_rate
from ofmu_ray.algorithm.two_loop import batches_per_round, two_loop_round
from ofmu_ray.config import OFMUConfig
from ofmu_ray.engines.protocol import DEFAULT_RELATIVE_STEP, Engine, Loop, Vector
from ofmu_ray.errors import UserError
from ofmu_ray.methods.protocol import Batches, Need, drawn


class OFMU:
    """T ascent steps on Phi = L_f - beta Sim(g_f, g_r), then a descent step on L_r + rho_k |grad Phi|^2.

    The loops have an optimiser each; the engine holds both. State: k, the rounds done, which gives rho_k.
    """

    name = "ofmu"

    def __init__(self, config: OFMUConfig | None = None, rounds: int | None = None):
        """`rounds` of the whole run, for the courses of the learning rates; None: the engine's rates, as they are."""
        self.config, self.rounds = config or OFMUConfig(), rounds
        self.rounds_done = 0

    @property
    def needs(self) -> tuple[Need, ...]:
        return ()

    def freeze(self, module: torch.nn.Module) -> None:
        """Nothing: all weights are trained."""

    def start(self, engine: Engine) -> None:
        """Nothing to keep of the untouched weights."""

    @property
    def rho(self) -> float:
        """rho_k = rho_0 gamma^k of the next round."""
        return self.config.rho * self.config.rho_growth**self.rounds_done

    def batches_per_round(self) -> dict[str, int]:
        return batches_per_round(self.config, penalise=self.config.rho > 0)

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """One round; `forget_batches` and `retain_batches` give `batches_per_round()` batches (lists are cycled).

        Returns the figures of `RoundStats` (without absent ones), `rho`, and both learning rates.

        Raises:
            UserError: curvature `exact` on an engine without double backward; too few batches.
        """
        config = self.config
        if config.curvature == "exact" and not engine.offers_exact:
            raise UserError(
                f"ofmu.curvature = exact: {type(engine).__name__} has no double backward; use the torch engine or "
                "ofmu.curvature = finite_difference"
            )
        step = config.relative_step or DEFAULT_RELATIVE_STEP[engine.precision, config.difference]
        rho = self.rho
        inner_lr = learning_rate(config.inner, self.rounds_done, self.rounds)
        outer_lr = learning_rate(config.outer, self.rounds_done, self.rounds)
        if self.rounds is not None:  # on its own, a round leaves the engine's rates as they are
            engine.set_learning_rate("inner", inner_lr)
            engine.set_learning_rate("outer", outer_lr)
        stats = two_loop_round(
            _Shared(engine, inner_lr, outer_lr) if config.shared_optimizer else engine,
            drawn(forget_batches, "forget"),
            drawn(retain_batches, "retain"),
            config,
            rho=rho,
            relative_step=step,
        )
        self.rounds_done += 1
        figures = dataclasses.asdict(stats)
        norms = figures.pop("inner_gradient_norms")
        figures["inner_gradient_norm"] = sum(norms) / len(norms)
        figures.update(rho=rho, inner_lr=inner_lr, outer_lr=outer_lr)
        return {name: float(value) for name, value in figures.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        return {"rounds_done": self.rounds_done, "rho": self.rho}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds_done = int(state["rounds_done"])


class _Shared:
    """The engine with one optimiser for both loops, stepped at the learning rate of whichever loop asks."""

    def __init__(self, engine: Engine, inner_lr: float, outer_lr: float):
        self._engine = engine
        self._rates: dict[Loop, float] = {"inner": inner_lr, "outer": outer_lr}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def apply(self, vector: Vector, loop: Loop) -> float:
        self._engine.set_learning_rate("inner", self._rates[loop])
        return self._engine.apply(vector, "inner")
