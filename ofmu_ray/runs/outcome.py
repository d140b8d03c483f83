"""The outcome of a run: the value that `ofmu_ray.unlearn` and `ofmu_ray.train` return."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ofmu_ray.storage import is_file, is_whole, join, name_of, read_text


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run that has ended, successfully or not."""

    home: str
    """Folder or URI of the run."""
    status: str
    """finished; or utility_floor, non_finite or stopped if a rule stopped it."""
    message: str = ""
    """Why it stopped, in a sentence; empty for a finished run."""
    rounds: int
    """Rounds that the model was trained for."""
    loss: float | None = None
    """`train`: loss of the last round, in nats per token."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Model (before, after, retrained) -> metric -> {"value", "low", "high", "n"}, or {"value": null, "reason"}; None
    for an absent model. Empty for `train`."""
    cost: Mapping[str, Any] = field(default_factory=dict)
    """Gradient passes, tokens, FLOPs, updates, seconds by phase, peak memory (bytes)."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """The section `run` of metrics.json: name, method, notes, paths, whether generations are degenerate."""
    reused: bool = False
    """Whether the run had finished before, and nothing was run."""
    hub: str = ""
    """Where the model was pushed to (export.push_to_hub)."""
    delivered: bool = True
    """Whether MLflow has everything; if not, the next start of the run sends the rest."""

    @property
    def finished(self) -> bool:
        """Whether the run reached its planned end."""
        return self.status == "finished"

    @property
    def model(self) -> str:
        """Path of the model, a Hugging Face directory."""
        return join(self.home, "model")

    @property
    def name(self) -> str:
        """The run's name."""
        return name_of(self.home)


def read_unlearned(home: str, *, reused: bool = False, delivered: bool = True) -> Outcome | None:
    """The outcome in metrics.json; None: the run has not finished."""
    path = join(home, "metrics.json")
    if not is_file(path):
        return None
    summary = json.loads(read_text(path))
    run = summary["run"]
    return Outcome(
        home=home,
        status=run["status"],
        message=run["message"],
        rounds=run["rounds"],
        metrics={name: content for name, content in summary.items() if name not in ("cost", "run")},
        cost=summary["cost"],
        run=run,
        reused=reused,
        delivered=delivered,
    )


def read_trained(home: str, *, reused: bool = False) -> Outcome | None:
    """The outcome in training.json; None: there is no complete model."""
    path = join(home, "training.json")
    if not is_file(path) or not is_whole(join(home, "model")):
        return None
    training = json.loads(read_text(path))
    return Outcome(
        home=home,
        status=training["status"],
        message=training["message"],
        rounds=training["round"],
        loss=training["series"][-1]["loss"] if training["series"] else None,
        cost=cost_of(training),
        reused=reused,
    )


def cost_of(training: Mapping[str, Any], seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """A run's cost, from training.json and the seconds of its phases."""
    counts = training["account"]
    return {
        "gradient_passes": counts["gradient_passes"],
        "precisions": counts.get("precisions", {}),
        "tokens": counts["tokens"],
        "flops": counts["flops"],
        "updates": counts["updates"],
        "seconds": {**(seconds or {}), "rounds": training["train_seconds"]},
        "peak_memory_bytes": training["peak_memory_bytes"],
    }
