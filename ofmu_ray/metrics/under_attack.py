"""Declarations of what attacks on an unlearned model measure, named `<attack>/<rows>/<what>` (docs/metrics.md)."""

from __future__ import annotations

from ofmu_ray.metrics.registry import Better, Metric, register

_DECLARED: dict[str, tuple[str, Better]] = {
    "relearn/retain/height_beyond_retrained": (
        "Relearning, retain rows: height beyond the retrained model's",
        "depends",
    ),
    "relearn/retain/*": ("Relearning, retain rows: {}", "high"),
    "relearn/forget/height_beyond_retrained": ("Relearning, forget rows: height beyond the retrained model's", "zero"),
    "relearn/attacked/height_beyond_retrained": (
        "Relearning, its own rows: height beyond the retrained model's",
        "zero",
    ),
    "relearn/forget/*": ("Relearning, forget rows: {}", "retrained"),
    "relearn/attacked/*": ("Relearning, its own rows: {}", "retrained"),
    "quantise/retain/*": ("Rounded weights, retain rows: {}", "high"),
    "quantise/forget/*": ("Rounded weights, forget rows: {}", "retrained"),
    "prefix/*": ("Other ways to ask: {}", "retrained"),
    "alignment/*": ("Alignment with the retrained model: {}", "high"),
    # low on the domain to be forgotten, high on the rest
    "choice/*": ("Multiple choice: {}", "depends"),
    "lm_eval/*": ("lm-evaluation-harness: {}", "depends"),
}
"""Name (the first that matches counts) -> label and direction."""

register(
    *(Metric(name=name, label=label, better=better, group="Robustness") for name, (label, better) in _DECLARED.items())
)
