"""Numbers published by others, shown next to ours but never ranked or tested with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

SOURCE = "Asif and Amiri, OFMU, arXiv 2509.22483"
URL_TEXT = "arxiv.org/abs/2509.22483"


@dataclass(frozen=True)
class PublishedResult:
    """One row of a published table."""

    name: str
    """The name in the paper."""
    labels: tuple[str, ...]
    """The same methods here; reference models are `target` and `retrained`."""
    values: Mapping[str, float]


def _row(name: str, labels: tuple[str, ...], quality: float, utility: float, ratio: float) -> PublishedResult:
    values = {"forget_quality": quality, "model_utility": utility, "forget_truth_ratio": ratio}
    return PublishedResult(name, labels, MappingProxyType(values))


PUBLISHED: Mapping[str, tuple[str, tuple[PublishedResult, ...]]] = MappingProxyType(
    {
        "forget01": (
            "LLaMA-2-7B on TOFU forget01",
            (
                _row("retrain", ("retrained",), 1.00, 0.63, 0.68),
                _row("gradient ascent", ("gradient_ascent",), 1.9e-4, 0.55, 0.36),
                _row("GradDiff", ("grad_diff",), 3.0e-3, 0.57, 0.41),
                _row("NPO", ("npo",), 0.40, 0.58, 0.65),
                _row("RMU", ("rmu",), 0.40, 0.62, 0.64),
                _row("OFMU", ("ofmu", "ofmu_full", "ofmu_lite"), 0.42, 0.63, 0.68),
            ),
        )
    }
)
"""Split -> (model and setting, rows)."""
