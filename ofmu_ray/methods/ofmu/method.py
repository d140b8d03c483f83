"""OFMU: bi-level unlearning by a penalty (Asif and Amiri, arXiv 2509.22483, Algorithm 1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ofmu_ray.algorithm.schedules import learning_rate
from ofmu_ray.algorithm.steps import Steps
from ofmu_ray.errors import UserError
from ofmu_ray.features.builtin import NLL
from ofmu_ray.features.protocol import Need
from ofmu_ray.methods.npo import npo_loss
from ofmu_ray.methods.ofmu.options import PRESETS, SPACE, OFMUConfig
from ofmu_ray.methods.protocol import Batches, Method, drawn
from ofmu_ray.methods.simnpo import answer_sums

if TYPE_CHECKING:
    import torch

    from ofmu_ray.algorithm.losses import LossParts
    from ofmu_ray.algorithm.two_loop import RoundStats
    from ofmu_ray.engines.protocol import Engine, Kind, Loop, Loss, Vector
    from ofmu_ray.features.value_tables import Missing
    from ofmu_ray.models.answers import Answers


class OFMU(Method):
    """T ascent steps on Phi = L_f - beta Sim(g_f, g_r), then descent steps on L_r + rho_k |grad Phi|^2.

    L_f is the engine's loss or the one named by `forget_loss`. Its level is a number when the run starts
    (ofmu_ray.features.level); without a level there is no bound: the engine's loss.

    Each loop has its optimiser, kept by the engine. State: k, the number of rounds done, which gives rho_k; the steps
    of finite differences; the notes already shown to the user.
    """

    name = "ofmu"
    options = OFMUConfig
    space = SPACE
    presets = PRESETS

    def __init__(self, config: OFMUConfig | None = None, rounds: int | None = None):
        """`rounds`: of the complete run, for the learning rate schedules; None: keep the engine's rates."""
        self.config, self.rounds = config or OFMUConfig(), rounds
        self.rounds_done = 0
        self.steps = Steps(self.config.difference, self.config.step_check_every)
        self.notes: Sequence[str] = ()
        self._noted: list[str] = []

    @property
    def asks(self) -> frozenset[str]:
        return frozenset() if self.config.forget_loss == "nll" else frozenset({"answers"})

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("forget", NLL),) if self.config.forget_loss == "npo" else ()

    @property
    def level(self) -> float | None:
        """Largest value of the forget loss (nats per token); None: no bound."""
        return self.config.level

    def freeze(self, module: torch.nn.Module) -> None:
        """Nothing: all weights are trained."""

    def start(self, engine: Engine) -> None:
        """Nothing to save from the reference model."""

    def measured(self, references: Sequence[Missing]) -> None:
        """Takes the level from the losses of holdout rows."""
        from ofmu_ray.features.value_tables import ValueTable

        for table in references:
            if isinstance(table, ValueTable) and table.stream == "holdout":
                self.config = self.config.with_level(table.means())
                self.notes = [self.config.remarks["level"]]

    @property
    def rho(self) -> float:
        """rho_k = min(rho_max, rho_0 gamma^k) of the next round."""
        config = self.config
        if config.rho == 0.0:
            return 0.0
        limit = 10.0 * config.rho if config.rho_max is None else config.rho_max
        if self.rounds_done * math.log(config.rho_growth) >= math.log(limit / config.rho):
            return limit  # gamma^k may overflow
        return config.rho * config.rho_growth**self.rounds_done

    def batches_per_round(self) -> dict[str, int]:
        from ofmu_ray.algorithm.two_loop import batches_per_round

        return batches_per_round(self.config, penalise=self.config.rho > 0)

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """One round; `forget_batches` and `retain_batches` yield `batches_per_round()` batches (lists are cycled).

        Returns the values of `RoundStats` (except None), `rho`, and both learning rates.

        Raises:
            UserError: curvature `exact` on an engine without double backward; too few batches.
        """
        from ofmu_ray.algorithm.two_loop import two_loop_round

        config = self.config
        if config.curvature == "exact" and not engine.offers_exact:
            raise UserError(
                f"ofmu.curvature = exact: {type(engine).__name__} has no double backward; use the torch engine or "
                "ofmu.curvature = finite_difference"
            )
        rho, self.steps.round = self.rho, self.rounds_done
        inner_lr, outer_lr = (learning_rate(rate, self.rounds_done, self.rounds) for rate in config.optimizers)
        if self.rounds is not None:  # a single round keeps the engine's rates
            engine.set_learning_rate("inner", inner_lr)
            engine.set_learning_rate("outer", outer_lr)
        loss = forget_loss(config, self.level)
        space: Any = engine if loss is None else _ForgetLossEngine(engine, loss)
        stats = two_loop_round(
            _SharedOptimizer(space, inner_lr, outer_lr) if config.shared_optimizer else space,
            drawn(forget_batches, "forget"),
            drawn(retain_batches, "retain"),
            config,
            rho=rho,
            steps=config.relative_step or self.steps,
            level=self.level,
        )
        self.rounds_done += 1
        self._judge(stats)
        values = dataclasses.asdict(stats)
        norms = values.pop("inner_gradient_norms")
        values["inner_gradient_norm"] = sum(norms) / len(norms) if norms else 0.0
        values.update(rho=rho, inner_lr=inner_lr, outer_lr=outer_lr)
        return {name: float(value) for name, value in values.items() if value is not None}

    def _judge(self, stats: RoundStats) -> None:
        self.notes = ()
        if (stats.difference_error or 0.0) > 0.1:
            self._note(
                "difference_error",
                f"beta times the estimated error of grad Sim is {stats.difference_error:.2g} |g_f| (the error is "
                f"{stats.similarity_error:.1%} of grad Sim): lower ofmu.beta, or set ofmu.difference = central",
            )
        if (stats.penalty_ratio or 0.0) > 1.0:
            self._note(
                "penalty_ratio",
                f"the penalty is {stats.penalty_ratio:.2g} times the retain gradient, so outer steps follow it rather "
                "than the retain loss: lower ofmu.rho or ofmu.rho_max",
            )
        if stats.skipped_ascents == self.config.inner_steps:
            self._note(
                "skipped_ascents",
                f"all forget rows of the round are at their level of {self.level:.3g} nats: no ascent step taken",
            )

    def _note(self, value: str, sentence: str) -> None:
        """Once per run and value."""
        if value not in self._noted:
            self._noted.append(value)
            self.notes = [*self.notes, f"round {self.rounds_done}: {sentence}"]

    def state_dict(self) -> dict[str, Any]:
        return {
            "rounds_done": self.rounds_done,
            "rho": self.rho,
            "steps": self.steps.state_dict(),
            "told": list(self._noted),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds_done = int(state["rounds_done"])
        self.steps.load_state_dict(state["steps"])
        self._noted = list(state["told"])


def forget_loss(config: OFMUConfig, level: float | None) -> Loss | None:
    """The loss that the inner loop raises; None: the engine's loss."""
    from ofmu_ray.algorithm.losses import bounded_rows, bounded_tokens, simple_negative_preference, token_nll
    from ofmu_ray.models.answers import answers

    match config.forget_loss:
        case "bounded_token" if level is not None:
            return lambda module, micro: bounded_tokens(token_nll(*answers(module, micro)[:2]), level=level)
        case "bounded_row" if level is not None:
            return lambda module, micro: bounded_rows(*answer_sums(module, micro), level=level)
        case "matched_row" if level is not None:
            return lambda module, micro: _matched(answers(module, micro), level)
        case "npo":
            return lambda module, micro: _negated(npo_loss(module, micro, config.forget_beta))
        case "simnpo":
            beta = config.forget_beta
            return lambda module, micro: _negated(
                simple_negative_preference(*answer_sums(module, micro), beta=beta, delta=0.0)
            )
    return None


def _matched(parts: Answers, level: float) -> LossParts:
    from ofmu_ray.algorithm.losses import matched_rows, token_nll

    return matched_rows(token_nll(parts.logits_tv, parts.labels_t), parts.rows_t, parts.rows, level=level)


def _negated(parts: LossParts) -> LossParts:
    return -parts[0], parts[1]


class _ForgetLossEngine:
    """The engine with another loss on forget batches."""

    def __init__(self, engine: Engine, loss: Loss):
        self._engine, self._loss = engine, loss

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def gradient(self, batch: Any, *, kind: Kind, differenced: bool = False) -> tuple[Vector, float]:
        loss = self._loss if kind == "forget" else None
        return self._engine.gradient(batch, loss, kind=kind, differenced=differenced)

    def graph_gradient(self, batch: Any, *, kind: Kind) -> Any:
        engine: Any = self._engine  # engines with double backward take a loss
        return engine.graph_gradient(batch, self._loss if kind == "forget" else None, kind=kind)


class _SharedOptimizer:
    """The engine with one optimiser for both loops, stepped at the learning rate of the calling loop."""

    def __init__(self, engine: Engine, inner_lr: float, outer_lr: float):
        self._engine = engine
        self._rates: dict[Loop, float] = {"inner": inner_lr, "outer": outer_lr}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def apply(self, vector: Vector, loop: Loop) -> float:
        self._engine.set_learning_rate("inner", self._rates[loop])
        return self._engine.apply(vector, "inner")
