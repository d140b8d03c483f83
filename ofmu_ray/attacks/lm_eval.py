"""Tasks of lm-evaluation-harness on an exported model (https://github.com/EleutherAI/lm-evaluation-harness).

The harness is an optional extra, imported on demand. It loads the model and the task data itself: from the hub, the
offline cache, or the files that a task's YAML names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ofmu_ray.errors import UserError
from ofmu_ray.metrics.intervals import MetricValue

_OPTION = "checks.lm_eval"
_NORMAL_95 = 1.959963984540054  # 97.5 % point of the normal distribution


def run_lm_eval(
    model_dir: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat_template: bool = False,
    device: str | None = None,
) -> dict[str, dict[str, MetricValue]]:
    """Task (or group) -> metric -> value, as the harness computes them.

    `tasks`: names or patterns of tasks from the harness or from the folder `include_path`. `num_fewshot`: None is the
    task's default. `limit`: first n rows per task; None is all. The interval is the value +- 1.96 of the harness's
    standard errors over rows; a metric without a standard error has a reason instead. Metrics with a filter other than
    "none" are named `metric,filter`. The model runs in fp32 on a CPU and in its stored precision on a GPU. The harness
    seeds the global generators of Python, NumPy and torch with its own defaults.

    Raises UserError: the extra is missing, there is no such task, or a task's data cannot be loaded.
    """
    harness = _harness()
    manager = import_module("lm_eval.tasks").TaskManager(
        include_path=None if include_path is None else str(include_path)
    )
    _check_names(tasks, manager.all_tasks, include_path)
    device = device or _device()
    dtype = "float32" if device == "cpu" else "auto"
    try:
        result = harness.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model_dir), "dtype": dtype},
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            device=device,
            apply_chat_template=chat_template,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:  # no such data set, no such file, no connection
        raise UserError(
            f"{_OPTION} = {', '.join(tasks)}: a task's data or the model {model_dir} cannot be loaded "
            f"({type(error).__name__}); check the network, the offline cache or the task's data_files"
        ) from None
    counts = {name: count["effective"] for name, count in result["n-samples"].items()}
    return {name: _metrics(values, counts.get(name)) for name, values in result["results"].items()}


def _harness() -> Any:
    try:
        return import_module("lm_eval")
    except ImportError as error:
        if error.name and error.name.partition(".")[0] != "lm_eval":
            raise  # a broken installation: the original error says more
        raise UserError("lm-evaluation-harness is not installed: pip install 'ofmu-ray[lm-eval]'") from None


def _check_names(tasks: Sequence[str], known: Sequence[str], include_path: str | Path | None) -> None:
    if not tasks:
        raise UserError(f"{_OPTION} is empty: name tasks of lm-evaluation-harness, such as wmdp or mmlu")
    unknown = [name for name in tasks if name not in known and "*" not in name and not Path(name).is_file()]
    if unknown:
        where = "" if include_path is None else f" or under {include_path}"
        raise UserError(
            f"{_OPTION}: no task {', '.join(unknown)} in lm-evaluation-harness{where}; "
            "`lm-eval ls tasks` lists all tasks"
        )


def _metrics(results: Mapping[str, Any], n: int | None) -> dict[str, MetricValue]:
    """The harness's {"metric,filter": value, "metric_stderr,filter": error, "alias": ...} as metric values."""
    metrics = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
            continue
        error = results.get(f"{metric}_stderr,{kind}")
        metrics[metric if kind == "none" else key] = _metric_value(float(value), error, n)
    return metrics


def _metric_value(value: float, error: object, n: int | None) -> MetricValue:
    if not isinstance(error, int | float) or not math.isfinite(error):
        return MetricValue(value, n=n, reason="no interval: the harness has no standard error for this metric")
    return MetricValue(value, value - _NORMAL_95 * error, value + _NORMAL_95 * error, n)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
