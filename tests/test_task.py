"""A task unknown to the project (digits_task.py) works end to end: methods, engines, run, report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from contributing import added_to
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from ofmu_ray import progress, unlearn
from ofmu_ray.config import (
    BenchmarkConfig,
    BudgetConfig,
    DataConfig,
    ModelConfig,
    RuleConfig,
    SourceConfig,
    StopConfig,
    TrackingConfig,
    TrainingConfig,
    TuningConfig,
    UnlearnConfig,
    apply_overrides,
)
from ofmu_ray.config.evaluate import EvaluateConfig
from ofmu_ray.errors import UserError
from ofmu_ray.runs.comparison import compare
from ofmu_ray.search.run_benchmark import benchmark

FORGOTTEN = 7
"""The digit to forget."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model fitted by scikit-learn, all sevens as forget rows, the others as retain rows."""
    folder = tmp_path_factory.mktemp("digits")
    pixels, digits = load_digits(return_X_y=True)
    pixels = pixels / 16
    fitted = LogisticRegression(max_iter=2000).fit(pixels, digits)
    (folder / "target").mkdir()
    weights = {
        "weight": torch.tensor(fitted.coef_).float().contiguous(),
        "bias": torch.tensor(fitted.intercept_).float(),
    }
    save_file(weights, folder / "target" / "model.safetensors")
    (folder / "target" / "config.json").write_text("{}")  # by which a benchmark knows a model's folder
    for name, chosen in (("forget", digits == FORGOTTEN), ("retain", digits != FORGOTTEN)):
        rows = [{"pixels": p.tolist(), "digit": int(d)} for p, d in zip(pixels[chosen], digits[chosen], strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(files: Path, storage: Path, name: str, changes: dict[str, object]) -> UnlearnConfig:
    base = UnlearnConfig(
        name=name,
        storage=str(storage),
        task="digits_task",
        model=ModelConfig(path=str(files / "target")),
        data=DataConfig(
            forget=SourceConfig(path=str(files / "forget.jsonl")), retain=SourceConfig(path=str(files / "retain.jsonl"))
        ),
        training=TrainingConfig(rounds=30, batch_size=16),
        stop=StopConfig(utility_floor=0.5, check_every=10),
        tracking=TrackingConfig(system_metrics=False),
    )
    return apply_overrides(base, changes)


METHODS = {
    "ofmu": {"ofmu.forget_loss": "nll", "ofmu.inner.lr": 0.05, "ofmu.outer_ratio": 0.5},
    "gradient_ascent": {"gradient_ascent.optimizer.lr": 0.02},
    "grad_diff": {"grad_diff.optimizer.lr": 0.02},
}


class Notes(progress.Listener):
    def __init__(self) -> None:
        self.topics: list[str] = []

    def note(self, topic: str, text: str) -> None:
        self.topics.append(topic)


@pytest.mark.parametrize("method", ["ofmu", "grad_diff", pytest.param("gradient_ascent", marks=pytest.mark.full)])
def test_a_custom_task(files: Path, tmp_path: Path, method: str, local_ray: None) -> None:
    heard = Notes()
    outcome = unlearn(config(files, tmp_path, method, {"method": method, **METHODS[method]}), heard)
    before, after = (outcome.metrics[model] for model in ("before", "after"))
    assert before["forget_accuracy"]["value"] > 0.95
    assert after["forget_accuracy"]["value"] < 0.5 * before["forget_accuracy"]["value"]
    assert {"run", "data", "train"} <= set(heard.topics)
    report = Path(outcome.run["report"]).read_text()
    assert "Forget accuracy" in report
    compared = compare(EvaluateConfig(
        storage=str(tmp_path), task="digits_task", models={"a": str(files / "target"), "b": outcome.model},
        data=config(files, tmp_path, "x", {}).data, tracking=TrackingConfig(system_metrics=False),
    ))  # fmt: skip
    assert compared.metrics == {"a": before, "b": after}
    if method != "gradient_ascent":  # which has no term for the retain rows
        assert after["retain_accuracy"]["value"] > 0.9


@pytest.mark.full
def test_a_benchmark_of_a_custom_task(files: Path, tmp_path: Path, local_ray: None) -> None:
    result = benchmark(
        BenchmarkConfig(
            storage=str(tmp_path),
            methods=["grad_diff"],
            base=config(files, tmp_path, "base", {"training.engine": "torch", "evaluation.bootstrap_samples": 20}),
            budget=BudgetConfig(unit="passes", amount=60),
            tuning=TuningConfig(trials=2, refine=0, rows=50, lr_scale=1000),
            rule=RuleConfig(objective="forget_accuracy", utility="retain_accuracy", floor=0.5),
            seeds=[1],
        )
    )
    assert result.complete
    trials = [json.loads(path.read_text()) for path in (tmp_path / "benchmark/trials").glob("*.json")]
    [reported] = [trial["figures"] for trial in trials if trial["phase"] == "report"]
    assert reported["forget_accuracy"]["value"] < 0.5
    assert reported["retain_accuracy"]["value"] > 0.5
    assert {trial["figures"]["forget_accuracy"]["n"] for trial in trials if trial["phase"] == "tune"} == {50}


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_two_workers_give_the_same_model(files: Path, tmp_path: Path, method: str, local_ray: None) -> None:
    weights = []
    for workers, stage in ((1, 2), (2, 3)):
        changes = {"method": method, **METHODS[method], "training.workers": workers, "training.zero_stage": stage}
        outcome = unlearn(config(files, tmp_path, f"workers{workers}", changes))
        weights.append(load_file(Path(outcome.model, "model.safetensors"))["weight"].numpy())
    np.testing.assert_allclose(*weights, atol=1e-4)


def test_contributing_shows_lines_of_it() -> None:
    lines = iter((Path(__file__).parent / "digits_task.py").read_text().splitlines())
    shown = added_to("digits_task.py").splitlines()
    assert len(shown) > 15
    assert [line for line in shown if line and line not in lines] == []  # in this order: `in` moves on


def test_what_the_task_does_not_offer_is_refused(files: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"npo.*digits_task"):
        unlearn(config(files, tmp_path, "npo", {"method": "npo"}))
    with pytest.raises(UserError, match=r"ofmu\.forget_loss"):
        unlearn(config(files, tmp_path, "bounded", {"ofmu.forget_loss": "bounded_token"}))
    with pytest.raises(UserError, match="task = 'nothing'"):
        unlearn(config(files, tmp_path, "nothing", {"task": "nothing"}))


def test_a_row_that_the_task_refuses(files: Path, tmp_path: Path, local_ray: None) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text((files / "forget.jsonl").read_text() + json.dumps({"pixels": [0.0], "digit": 1}) + "\n")
    with pytest.raises(UserError, match="an image has not 64 pixels"):
        unlearn(config(files, tmp_path, "bad", {"data.forget.path": str(bad), **METHODS["ofmu"]}))
