"""Learning rates that follow from the number of trained parameters."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import METHODS, LoraConfig, ModelConfig, OptimizerConfig, UnlearnConfig, apply_overrides
from ofmu_ray.config.optimizers import rate_for
from ofmu_ray.errors import UserError
from ofmu_ray.methods.ofmu import OFMUConfig
from ofmu_ray.runs.job import Spec, trained_parameters

TARGET = ModelConfig(path=resolve_builtin("builtin:people/target"))
with safe_open(Path(TARGET.path) / "model.safetensors", "torch") as weights:
    WHOLE = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
"""Parameters of the built-in target."""


def never() -> int:
    raise AssertionError("the size of the model does not matter")


@pytest.mark.parametrize(
    ("trained", "rate"), [(7e9, 1e-5), (1e9, 2.6e-5), (20e6, 1.9e-4), (135e6, 7.2e-5), (1e6, 8.4e-4)]
)
def test_fewer_trained_parameters_take_larger_steps(trained: float, rate: float) -> None:
    assert rate_for(trained) == rate


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_rate_after_the_size_is_known(name: str) -> None:
    options = apply_overrides(UnlearnConfig(), {"method": name}).method_options
    sized, remark = options.sized(name, lambda: 1_000_000)
    rates = [optimizer.lr for optimizer in sized.optimizers]
    assert None not in rates
    if remark is None:
        assert sized == options
        assert name in ("influence", "undial")
    else:
        assert max(rates) == 8.4e-4
        assert remark.endswith("for 1,000,000 trained parameters")


def test_the_outer_rate_stays_a_share_of_the_inner_one() -> None:
    sized, remark = OFMUConfig.from_preset("first_order").sized("ofmu", lambda: 7_000_000_000)
    assert [optimizer.lr for optimizer in sized.optimizers] == [1e-5, 0.45e-5]
    assert remark == "1e-05 (ofmu.inner.lr), for 7,000,000,000 trained parameters"
    both, remark = OFMUConfig.from_preset("full").sized("ofmu", lambda: 7_000_000_000)
    assert [optimizer.lr for optimizer in both.optimizers] == [1e-5, 1e-5]
    assert remark == "1e-05 (ofmu.inner.lr, ofmu.outer.lr), for 7,000,000,000 trained parameters"


def test_a_given_rate_stays() -> None:
    given = apply_overrides(UnlearnConfig(), {"ofmu.inner.lr": 1e-5, "ofmu.outer.lr": 1e-5}).method_options
    assert given.sized("ofmu", never) == (given, None)
    assert [optimizer.lr for optimizer in given.optimizers] == [1e-5, 1e-5]  # also where it equals an old default


def test_sgd_needs_a_rate() -> None:
    with pytest.raises(UserError, match=r"ofmu\.inner\.lr: give a learning rate; only AdamW's follows"):
        OFMUConfig(inner=OptimizerConfig(name="sgd")).sized("ofmu", never)
    ratio = OFMUConfig.from_preset("first_order", inner=OptimizerConfig(lr=0.1), outer=OptimizerConfig(name="sgd"))
    assert ratio.sized("ofmu", never) == (ratio, None)
    assert ratio.optimizers[1].lr == pytest.approx(0.045)


def test_a_model_that_does_not_tell_its_size_counts_as_a_large_one() -> None:
    sized, remark = OFMUConfig().sized("ofmu", lambda: None)
    assert sized.inner.lr == 1e-5
    assert remark is not None
    assert "an unknown number of trained parameters" in remark


def test_what_is_trained_counts() -> None:
    config = UnlearnConfig(model=TARGET)
    spec = Spec.of(config, TARGET)
    assert trained_parameters(spec) == WHOLE
    adapters = trained_parameters(dataclasses.replace(spec, model=dataclasses.replace(TARGET, lora=LoraConfig(rank=4))))
    assert adapters is not None
    assert 0 < adapters < WHOLE / 10
    frozen = dataclasses.replace(TARGET, freeze=["embed_tokens"])
    embedded = trained_parameters(dataclasses.replace(spec, model=frozen))
    assert embedded is not None
    assert 0 < embedded < WHOLE
    rmu = Spec.of(apply_overrides(config, {"method": "rmu", "rmu.train_layers": 1}), TARGET)
    layer = trained_parameters(rmu)
    assert layer is not None
    assert 0 < layer < WHOLE / 4
