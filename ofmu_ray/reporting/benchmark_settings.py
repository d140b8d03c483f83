"""A benchmark's settings as its report needs them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ofmu_ray.metrics.degeneration import SoundRange
from ofmu_ray.metrics.rule import Goal


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What the report says about the benchmark besides its runs."""

    title: str = "benchmark"
    objective: str = "forget_quality"
    """Metric that the rule optimises."""
    utility: str = "model_utility"
    """Metric that the floor applies to."""
    floor: float = 0.9
    """Fraction of the target's utility."""
    margin: float = 0.0
    """Added to the floor when a trial is chosen."""
    seeds: Sequence[int] = ()
    planned_runs: int | None = None
    """Over all phases; shows whether the benchmark is finished."""
    ablation_of: str | None = None
    """Method that the ablation's variants are compared with."""
    command: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further entries for the page header: the model, the machine, versions."""
    goals: Mapping[str, Goal] = field(default_factory=dict)
    """Split -> the rule with its numbers."""
    draws: int | None = None
    """Draws of the first round of tuning, per method and split."""
    refine: int = 0
    """Draws of the second round of tuning, per method and split."""
    samples: int = 1000
    """Resamples of the rows."""
    references: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Split -> model (target, retrained) -> its metrics, as in metrics.json."""

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> BenchmarkSettings:
        """From benchmark.json: `name`, `command`, `config` (of `ofmu benchmark`, nested), `code`, and optionally
        `packages` (name -> version), `machine` and `model` in words. Absent entries keep their defaults."""
        config = written.get("config") or {}
        rule, base = config.get("rule") or {}, config.get("base") or {}
        ablation = config.get("ablation") or {}
        command = written.get("command") or ""
        known = {name: rule[name] for name in ("objective", "utility", "floor", "margin") if name in rule}
        return cls(
            title=str(written.get("name") or "benchmark"),
            **known,
            seeds=tuple(config.get("seeds") or ()),
            planned_runs=_planned_runs(config),
            ablation_of=ablation.get("of") if ablation.get("variants") else None,
            command=command if isinstance(command, str) else shlex.join(command),
            facts=facts(written, base),
            goals={split: _goal(goal) for split, goal in (written.get("goals") or {}).items()},
            draws=(config.get("tuning") or {}).get("trials"),
            refine=int((config.get("tuning") or {}).get("refine") or 0),
            references=written.get("references") or {},
            samples=(base.get("evaluation") or {}).get("bootstrap_samples") or 1000,
        )


def _goal(written: Mapping[str, Any]) -> Goal:
    return Goal(**{**written, "sound": written["sound"] and SoundRange(**written["sound"])})


def _planned_runs(config: Mapping[str, Any]) -> int | None:
    if not {"methods", "splits", "seeds", "tuning"} <= config.keys():
        return None
    seeds, variants = len(config["seeds"]), len((config.get("ablation") or {}).get("variants") or {})
    draws = int(config["tuning"]["trials"]) + int(config["tuning"].get("refine") or 0)
    per_split = len(config["methods"]) * (draws + seeds) + variants * seeds
    return per_split * len(config["splits"])


def facts(written: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, str]:
    """Model, machine, code and packages in words."""
    code, packages = written.get("code") or {}, written.get("packages") or {}
    commit = f" ({code['commit'][:10]}{', modified' if code.get('modified') else ''})" if code.get("commit") else ""
    facts = {
        "model": written.get("model") or (base.get("model") or {}).get("path"),
        "machine": written.get("machine"),
        "code": f"{code['version']}{commit}" if code.get("version") else None,
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
    }
    return {name: str(value) for name, value in facts.items() if value}
