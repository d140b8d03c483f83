"""Random labels: forget rows are fitted to classes drawn at random (Golatkar et al. 2020, arXiv 1911.04933)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ofmu_ray.config.methods import MYPY, RATE, RETAIN_WEIGHT, Ranges, WeightedConfig
from ofmu_ray.features.label_features import DrawnLabels
from ofmu_ray.features.protocol import Need, Values
from ofmu_ray.methods.one_loop import WeightedLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts


@dataclass(frozen=True, kw_only=True)
class RandomLabelsConfig(WeightedConfig):
    """Random labels (Golatkar et al. 2020, arXiv 1911.04933): descent on retain rows and on forget rows with drawn
    classes."""


def relabelled_loss(module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
    """Cross-entropy of the classes in `other_labels`; mean over rows."""
    from ofmu_ray.algorithm.losses import token_nll
    from ofmu_ray.models.answers import answers

    logits_rc = answers(module, micro).logits_tv
    return token_nll(logits_rc, micro["other_labels"].to(logits_rc.device)).sum(), len(logits_rc)


L = TypeVar("L", bound=RandomLabelsConfig)


class Relabelling(WeightedLoop[L]):
    """Minimises gamma CE(drawn class of a forget row) + alpha R. A row keeps its class for the run: uniform over all
    classes, the true one included, as in OPTML-Group/Unlearn-Saliency (which draws anew in each epoch)."""

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({"answers", "classes"})

    @property
    def labels(self) -> Values:
        """The classes that forget rows are fitted to."""
        return DrawnLabels()

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("forget", self.labels), *super().needs)

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return relabelled_loss(module, micro)


class RandomLabels(Relabelling[RandomLabelsConfig]):
    """`Relabelling` and nothing else."""

    name = "random_labels"
    options = RandomLabelsConfig
    space: ClassVar[Ranges] = {"optimizer.lr": RATE, "retain_weight": RETAIN_WEIGHT}
