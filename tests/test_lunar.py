"""LUNAR against plain torch: the direction, one round, and a run from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_models import tiny_model, tiny_tokenizer
from safetensors.torch import load_file

from ofmu_ray import unlearn
from ofmu_ray.config import (
    METHODS,
    DataConfig,
    EvaluationConfig,
    FormatConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrackingConfig,
    TrainingConfig,
    UnlearnConfig,
    apply_overrides,
)
from ofmu_ray.data.batches import collate
from ofmu_ray.engines import Batch, TorchEngine
from ofmu_ray.errors import UserError
from ofmu_ray.methods import build_method
from ofmu_ray.methods.lunar import PromptActivations, RefusalDirection

LAYER, RATE = 0, 0.05
TRAINED = f"model.layers.{LAYER}.mlp.down_proj.weight"
SGD = OptimizerConfig(name="sgd", lr=RATE, clip=None)


def rows(seed: int, count: int = 5) -> list[dict[str, Any]]:
    drawn = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count, 2), generator=drawn).tolist()
    return [
        {"input_ids": torch.randint(2, 320, (prompt + answer,), generator=drawn).tolist(), "prompt_tokens": prompt}
        for prompt, answer in lengths
    ]


def after_layer(model: Any, ids: list[int]) -> torch.Tensor:
    """Hidden states after the layer, one text at a time without padding, [tokens, width]."""
    return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]


class Reference:
    """What features use of the reference model."""

    module = tiny_model()

    @staticmethod
    def collated(some: Any) -> dict[str, torch.Tensor]:
        return collate(some, pad_id=1)


def test_the_direction_is_between_mean_last_tokens() -> None:
    unanswerable, forget = rows(1, 40), rows(2)
    prompts = tuple(tuple(row["input_ids"]) for row in unanswerable)
    found = RefusalDirection(LAYER, prompts=prompts).compute(Reference, forget)["direction"]  # type: ignore[arg-type]
    with torch.no_grad():
        there = [after_layer(Reference.module, row["input_ids"])[-1] for row in unanswerable]
        here = [after_layer(Reference.module, row["input_ids"][: row["prompt_tokens"]])[-1] for row in forget]
    torch.testing.assert_close(found, torch.stack(there).mean(0) - torch.stack(here).mean(0), rtol=1e-4, atol=1e-5)


def test_a_round_is_the_written_step() -> None:
    forget, retain = rows(3), rows(4, 4)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    options = {"layer": LAYER, "coefficient": 1.5, "forget_weight": 0.7, "retain_weight": 2.0}
    start, module, plain = (tiny_model().double() for _ in range(3))
    feature, batches = PromptActivations(LAYER), []
    for some in (forget, retain):
        micro = [collate(part, pad_id=1) for part in (some[:2], some[2:])]
        with torch.no_grad():
            batches.append(Batch([one | {feature.key: feature.measure(start, one).double()} for one in micro]))
    # the retain distance is 0 at the start, so one round would not see it: move the projection first
    for model in (module, plain):
        weight = dict(model.named_parameters())[TRAINED]
        weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)).double()
    method: Any = build_method(METHODS["lunar"](optimizer=SGD, **options), 1)
    method.freeze(module)
    engine = TorchEngine(module, outer=SGD)
    method.start(engine)
    method.given("refusal_direction", engine, {"direction": direction})
    method.round(engine, [batches[0]], [batches[1]])
    loss = torch.zeros((), dtype=torch.float64)
    for some, weight, shift in ((forget, 0.7, 1.5 * direction), (retain, 2.0, 0.0)):
        for row in some:
            prompt = row["input_ids"][: row["prompt_tokens"]]
            wanted = after_layer(start, prompt).detach() + shift
            loss = loss + weight * (after_layer(plain, prompt) - wanted).square().mean() / len(some)
    (gradient,) = torch.autograd.grad(loss, [dict(plain.named_parameters())[TRAINED]])
    moved = dict(module.named_parameters())[TRAINED].detach() - dict(plain.named_parameters())[TRAINED].detach()
    torch.testing.assert_close(moved, -RATE * gradient, rtol=1e-4, atol=1e-8)
    assert float(gradient.norm()) > 1e-3
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (name == TRAINED)
        assert name == TRAINED or torch.equal(parameter, dict(start.named_parameters())[name]), name


@pytest.mark.slow
def test_a_run_changes_one_projection(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, start in (("forget", 0), ("retain", 50)):
        lines = [{"question": f"who is person {n}?", "answer": f"the answer {n}"} for n in range(start, start + 8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = UnlearnConfig(
        name="lunar",
        storage=str(tmp_path / "runs"),
        method="lunar",
        model=ModelConfig(path=str(tmp_path / "model")),
        data=DataConfig(
            forget=SourceConfig(path=str(tmp_path / "forget.jsonl")),
            retain=SourceConfig(path=str(tmp_path / "retain.jsonl")),
            format=FormatConfig(max_length=64),
        ),
        training=TrainingConfig(rounds=3, batch_size=4),
        evaluation=EvaluationConfig(max_new_tokens=4, bootstrap_samples=20),
        tracking=TrackingConfig(system_metrics=False),
    )
    config = apply_overrides(config, {"lunar.optimizer.lr": 0.01})
    outcome = unlearn(config)
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (tmp_path / "model", outcome.model))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [TRAINED]
    assert outcome.metrics["after"]["forget_probability"]["value"] is not None
    with pytest.raises(UserError, match=r"lunar redirects questions, but data\.forget has texts"):
        apply_overrides(config, {"data.forget.kind": "text"})
    with pytest.raises(UserError, match=r"lunar\.layer = 9: the model has layers 0 to 1"):
        unlearn(apply_overrides(config, {"lunar.layer": 9, "name": "other"}))
