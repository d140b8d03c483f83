"""OFMU-Ray: bi-level machine unlearning (OFMU, arXiv 2509.22483) on Ray, DeepSpeed, MLflow and transformers.

    from ofmu_ray import unlearn
    from ofmu_ray.config import UnlearnConfig

    outcome = unlearn(UnlearnConfig(name="mine"))
    print(outcome.status, outcome.model, outcome.metrics["after"]["forget_quality"])

Importing the package imports neither torch nor Ray; each subpackage imports them where it needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from ofmu_ray.config import TrainConfig, UnlearnConfig
    from ofmu_ray.progress import Listener
    from ofmu_ray.runs.outcome import Outcome

__version__ = "0.1.0"
__all__ = ["train", "unlearn"]


def unlearn(
    config: UnlearnConfig | Mapping[str, Any] | str | PathLike[str], listener: Listener | None = None
) -> Outcome:
    """Make a model forget; the same as `ofmu unlearn`.

    A killed run resumes under the same name; a finished one is read, not repeated. `config`: the options; or a mapping
    or the path of a YAML file with those that differ from the defaults. `listener` receives the progress.

    Raises:
        UserError: the configuration, the data or the cluster must change; the message says what.
    """
    from ofmu_ray.commandline.parse import configured
    from ofmu_ray.config import UnlearnConfig
    from ofmu_ray.runs.run import run

    return run(configured(UnlearnConfig, config), listener)


def train(config: TrainConfig | Mapping[str, Any] | str | PathLike[str], listener: Listener | None = None) -> Outcome:
    """Fit a target or a retrained model; the same as `ofmu train`. Otherwise like `unlearn`."""
    from ofmu_ray.commandline.parse import configured
    from ofmu_ray.config import TrainConfig
    from ofmu_ray.runs.run import run

    return run(configured(TrainConfig, config), listener)
