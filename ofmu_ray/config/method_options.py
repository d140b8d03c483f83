"""What options of methods share, and finding methods by the name of their folder (ofmu_ray/methods/NAME).

Defaults are those of OpenUnlearning (locuslab/open-unlearning, December 2025) unless a field says otherwise; the
learning rates are for models of 1 B parameters and more, small models need larger ones.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ofmu_ray.config.optimizers import OptimizerConfig
from ofmu_ray.config.ranges import not_negative, require

if TYPE_CHECKING:
    from ofmu_ray.config.spaces import Space

_METHODS = "ofmu_ray.methods"


class MethodConfig(Protocol):
    """Options of any method."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Of the inner and of the outer loop."""


def peer_optimizer(lr: float) -> OptimizerConfig:
    """OpenUnlearning's: AdamW, weight decay 0.01, one warm-up epoch of ten, then linear decay."""
    return OptimizerConfig(lr=lr, weight_decay=0.01, warmup_fraction=0.1, decay="linear")


@dataclass(frozen=True, kw_only=True)
class OneLoopConfig:
    """What these methods share."""

    optimizer: OptimizerConfig = field(default_factory=lambda: peer_optimizer(1e-5))
    """The optimiser."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Of the inner and of the outer loop (only the outer one is stepped)."""
        return self.optimizer, self.optimizer

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        self.optimizer.check(f"{section}.optimizer")


@dataclass(frozen=True, kw_only=True)
class WeightedConfig(OneLoopConfig):
    """forget_weight * forget loss + retain_weight * retain loss."""

    forget_weight: float = 1.0
    """gamma, weight of the forget loss."""
    retain_weight: float = 1.0
    """alpha, weight of the retain loss; 0: no retain pass at all."""
    retain_loss: Literal["nll", "kl"] = "nll"
    """nll: mean token NLL of retain answers; kl: KL(untouched model || model) at the tokens of retain answers."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        not_negative(section, self, "forget_weight", "retain_weight")
        require(self.forget_weight + self.retain_weight > 0, f"{section}.forget_weight", 0, "more, or retain_weight")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Plain fitting of a data set (`ofmu train`)."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-3, weight_decay=0.01, warmup_fraction=0.05, decay="cosine")
    )
    """Optimiser of the fit."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Of the inner and of the outer loop (only the outer one is stepped)."""
        return self.optimizer, self.optimizer

    def __post_init__(self) -> None:
        self.optimizer.check("finetune.optimizer")


# ------------------------------------------------------------------------------------------------------- discovery


def _methods() -> Any:
    return importlib.import_module(_METHODS)  # by name, because methods know config and not the other way round


@functools.cache
def method_names() -> tuple[str, ...]:
    """All methods, OFMU first; a folder without a SPACE is none."""
    folders = sorted(module.name for module in iter_modules(_methods().__path__) if module.ispkg)
    return tuple(sorted((name for name in folders if hasattr(_folder(name), "SPACE")), key=lambda name: name != "ofmu"))


def _folder(name: str) -> Any:
    return importlib.import_module(f"{_METHODS}.{name}")


def options_of(name: str) -> type[Any]:
    """The dataclass of a method's options."""
    options: type[Any] = _folder(name).OPTIONS
    return options


def space_of(name: str) -> Space:
    """What is tuned of a method."""
    space: Space = _folder(name).SPACE
    return space


def presets_of(name: str) -> dict[str, dict[str, Any]]:
    """Named sets of a method's options, chosen by its option `preset`; most have none."""
    presets: dict[str, dict[str, Any]] = getattr(_folder(name), "PRESETS", {})
    return presets
