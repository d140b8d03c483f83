"""Options shared by all methods, and options shared by methods with one update per round.

Defaults are OpenUnlearning's (locuslab/open-unlearning, December 2025) unless a field says otherwise. The learning
rates are its defaults for 7 B parameters, and larger for smaller models (`ofmu_ray.config.optimizers.rate_for`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from ofmu_ray.config.optimizers import LARGE, OptimizerConfig, rate_for
from ofmu_ray.config.ranges import not_negative, require
from ofmu_ray.errors import UserError

if TYPE_CHECKING:
    from ofmu_ray.config import ModelConfig, UnlearnConfig

MYPY = False
"""mypy's other name for typing.TYPE_CHECKING. jsonargparse executes TYPE_CHECKING blocks to read annotations, which
would import torch before any command line is parsed."""

Ranges = dict[str, tuple[str, str]]
"""A method's search space: option -> (prior, as in YAML; source of the range)."""

RATE = ("loguniform(3e-6, 1e-4)", "half a decade below OpenUnlearning's default of 1e-05 and a decade above")
"""Prior of a learning rate, the same for every method."""
RETAIN_WEIGHT = (
    "loguniform(0.5, 10)",
    "from half to ten times the weight of the forget loss (OpenUnlearning: 1)",
)
"""Prior of the weight of a retain loss."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options of a method, in the section of its name."""

    @classmethod
    def default(cls) -> Self:
        """The section with its default values."""
        return cls()

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Optimisers of the inner and the outer loop."""
        raise NotImplementedError

    @property
    def optimizer_fields(self) -> list[str]:
        """The fields with options of an optimiser."""
        return [entry.name for entry in fields(self) if isinstance(getattr(self, entry.name), OptimizerConfig)]

    @property
    def without_rate(self) -> list[str]:
        """Those of `optimizer_fields` whose learning rate follows from the size of the model."""
        return [name for name in self.optimizer_fields if getattr(self, name).lr is None]

    @property
    def streams(self) -> frozenset[str]:
        """The streams of rows that the method reads; `data` may have more."""
        return frozenset({"forget", "retain"})

    @property
    def models(self) -> dict[str, str]:
        """Option -> path of each model that the method reads besides the one to change."""
        return {}

    def for_sequence(self, first: str) -> Self:
        """The options for one of many runs, each on the model of the one before; `first`: path of the first's model."""
        return self

    def check(self, section: str) -> None:
        """Checks ranges. UnlearnConfig calls it with the section's name. Raises UserError."""

    def check_run(self, config: UnlearnConfig) -> None:
        """Checks the other sections, if this method is chosen. Raises UserError."""

    def check_rates(self, section: str) -> None:
        """Raise UserError for SGD without a learning rate. For a run: the base of a benchmark may lack it."""
        for name in self.without_rate:
            if getattr(self, name).name != "adamw":
                raise UserError(
                    f"{section}.{name}.lr: give a learning rate; only AdamW's follows from the model's size"
                )

    def sized(self, section: str, trained: Callable[[], int | None]) -> tuple[Self, str | None]:
        """The options with learning rates as numbers, and a remark on those that `trained`, the number of trained
        parameters, gave (None: unknown, taken for 7 B).

        Raises UserError as `check_rates`.
        """
        self.check_rates(section)
        unsized = {name: getattr(self, name) for name in self.without_rate}
        if not unsized:
            return self, None
        count = trained()
        rate = rate_for(LARGE if count is None else count)
        options = replace(self, **{name: replace(optimizer, lr=rate) for name, optimizer in unsized.items()})
        size = "an unknown number of" if count is None else f"{count:,}"
        names = ", ".join(f"{section}.{name}.lr" for name in unsized)
        return options, f"{rate:g} ({names}), for {size} trained parameters"

    def completed(self, prepared: Any, model: ModelConfig, cache: str, left: list[Any] | None = None) -> Self:
        """The options, completed with values that depend on the rows and the model before any step.

        `prepared`: the rows, an ofmu_ray.data.prepare.PreparedData; `cache`: folder of the storage's caches; `left`:
        receives what the run's workers have to compute first (ofmu_ray.features.value_tables.Missing), for
        `Method.measured`.
        """
        return self

    @property
    def remarks(self) -> dict[str, str]:
        """Remarks on completed options for the terminal, before the first round: short word -> text."""
        return {}


def peer_optimizer(lr: float | None = None) -> OptimizerConfig:
    """OpenUnlearning's optimiser: AdamW, weight decay 0.01, one warm-up epoch of ten, then linear decay."""
    return OptimizerConfig(lr=lr, weight_decay=0.01, warmup_fraction=0.1, decay="linear")


@dataclass(frozen=True, kw_only=True)
class OneLoopConfig(MethodConfig):
    """Options of a method with one update per round."""

    optimizer: OptimizerConfig = field(default_factory=peer_optimizer)
    """The optimiser."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Optimisers of the inner and the outer loop (only the outer one steps)."""
        return self.optimizer, self.optimizer

    def check(self, section: str) -> None:
        self.optimizer.check(f"{section}.optimizer")


@dataclass(frozen=True, kw_only=True)
class WeightedConfig(OneLoopConfig):
    """forget_weight * forget loss + retain_weight * retain loss."""

    forget_weight: float = 1.0
    """gamma, weight of the forget loss."""
    retain_weight: float = 1.0
    """alpha, weight of the retain loss; 0: no retain pass."""
    retain_loss: Literal["nll", "kl"] = "nll"
    """nll: mean token NLL of retain answers; kl: KL(reference model || model) at the tokens of retain answers."""

    def check(self, section: str) -> None:
        super().check(section)
        not_negative(section, self, "forget_weight", "retain_weight")
        require(self.forget_weight + self.retain_weight > 0, f"{section}.forget_weight", 0, "more, or retain_weight")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(OneLoopConfig):
    """Plain training on a data set (`ofmu train`)."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-3, weight_decay=0.01, warmup_fraction=0.05, decay="cosine")
    )
    """The optimiser."""
