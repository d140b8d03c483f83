"""A method needs only a new file in ofmu_ray/methods/: options, draws, planning and rounds follow from it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from contributing import added_to

from ofmu_ray.config import METHODS

ROOT = Path(__file__).resolve().parent.parent
METHOD = '''
"""Ascent that fades out with the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ofmu_ray.config.methods import RATE, Ranges, WeightedConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.methods.one_loop import WeightedLoop


@dataclass(frozen=True, kw_only=True)
class FadingConfig(WeightedConfig):
    """Fading ascent (nobody, never)."""

    scale: float = 2.0
    """Nats over which it fades."""
    preset: str = "slow"
    """slow or fast."""

    def check(self, section):
        super().check(section)
        positive(section, self, "scale")


class Fading(WeightedLoop[FadingConfig]):
    """Minimises -exp(-L_f / scale) L_f + alpha R."""

    name = "fading"
    options = FadingConfig
    space: ClassVar[Ranges] = {"optimizer.lr": RATE, "scale": ("uniform(1, 4)", "a test")}
    presets: ClassVar = {"slow": {"scale": 2.0}, "fast": {"scale": 1.0}}

    def forget_loss(self, module, micro):
        total, count = self.negated_loss(module, micro)
        return (total / count / self.config.scale).exp().detach() * total, count
'''
IMPORTS = """
from dataclasses import dataclass

from ofmu_ray.config.methods import RATE, OneLoopConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.methods.gradient_ascent import GradientAscent
"""
USE_SHOWN = """
import sys

from ofmu_ray.commandline.parse import parse
from ofmu_ray.config import LABELS, UnlearnConfig, apply_overrides
from ofmu_ray.errors import UserError

config = parse(UnlearnConfig, ["--method", "sign_ascent", "--sign_ascent.sharpness", "3"], "x")
assert "torch" not in sys.modules
assert LABELS["sign_ascent"] == {"method": "sign_ascent"}
from ofmu_ray.search.spaces import space_for

draw = space_for("sign_ascent", config).draws(2, 0, config)[0]
config = apply_overrides(config, draw)
assert config.method_options.sharpness == draw["sign_ascent.sharpness"]
try:
    apply_overrides(config, {"sign_ascent.sharpness": 0.0})
    raise AssertionError
except UserError as error:
    assert "sign_ascent.sharpness" in str(error)

import torch

from ofmu_ray.engines import Batch, TorchEngine
from ofmu_ray.methods import build_method

module = torch.nn.Linear(3, 2)
engine = TorchEngine(module, lambda m, batch: m(batch).square().sum(), outer=config.method_options.optimizer)
method = build_method(config.method_options, 2)
method.start(engine)
batches = [Batch([torch.ones(4, 3)])]
losses = [method.round(engine, batches, [])["forget_loss"] for _ in range(2)]
assert losses[1] < losses[0], losses  # of the negated loss
assert engine.account.updates == 2
"""
USE = """
import torch

from ofmu_ray.config import LABELS, BenchmarkConfig, ModelConfig, UnlearnConfig, apply_overrides
from ofmu_ray.data.batches import collate
from ofmu_ray.engines import TorchEngine
from ofmu_ray.methods import build_method
from ofmu_ray.models.loading import load_causal_lm
from ofmu_ray.planning.replay import replay
from ofmu_ray.search.spaces import space_for

assert LABELS["fading_fast"] == {"method": "fading", "fading.preset": "fast"}, LABELS
BenchmarkConfig(methods=["fading", "fading_fast"])
base = apply_overrides(UnlearnConfig(), LABELS["fading_fast"])
assert base.fading.scale == 1.0
space = space_for("fading_fast", base)
space.check(base)
(draw, _) = space.draws(2, 0, base)
config = apply_overrides(base, {**draw, "fading.optimizer.lr": 1e-3})
assert 1 <= config.method_options.scale <= 4
method = build_method(config.method_options, 2)
module, tokenizer = load_causal_lm(ModelConfig(path="builtin:people/target"))
batch = collate([{"input_ids": [5, 9, 11, 30, 31, 2], "prompt_tokens": 3}], tokenizer.pad_token_id)
engine = TorchEngine(module, outer=config.method_options.optimizers[1])
method.start(engine)
losses = [method.round(engine, [batch], [batch])["forget_loss"] for _ in range(2)]
assert losses[0] != losses[1] and all(torch.isfinite(torch.tensor(losses))), losses
planned = replay(build_method(config.method_options, 2), module.to("meta"), config.method_options.optimizers, "fp32",
                 lambda stream: batch)
assert [one.kind for one in planned.passes] == ["forget", "retain"]
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with two more files: METHOD, and the one that CONTRIBUTING.md shows."""
    folder = tmp_path_factory.mktemp("house")
    for name in ("ofmu_ray", "pipelines", "tune_spaces"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    assets = folder / "ofmu_ray" / "assets"
    shutil.copytree(
        ROOT / "ofmu_ray/assets", assets, ignore=shutil.ignore_patterns("__pycache__"), copy_function=os.symlink
    )
    (folder / "ofmu_ray/methods/fading.py").write_text(METHOD)
    (folder / "ofmu_ray/methods/sign_ascent.py").write_text(IMPORTS + added_to("ofmu_ray/methods/sign_ascent.py"))
    return folder


def run(house: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(house)}
    return subprocess.run([sys.executable, *words], cwd=house, env=environment, capture_output=True, text=True)


@pytest.mark.system
def test_its_options_are_those_of_the_command_line(house: Path) -> None:
    words = ["-m", "pipelines.cli", "unlearn", "--method", "fading"]
    shown = run(house, *words, "--fading.preset", "fast", "--fading.retain_weight", "3", "--print_config")
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout)["fading"] | {"optimizer": None} == {
        "forget_weight": 1.0, "retain_weight": 3.0, "retain_loss": "nll", "scale": 1.0, "preset": "fast",
        "optimizer": None,
    }  # fmt: skip
    helped = " ".join(run(house, *words[:3], "--help", "all").stdout.split())
    assert "Fading ascent (nobody, never): --fading CONFIG" in helped
    assert "Nats over which it fades. (type: float, default: 2.0)" in helped
    wrong = run(house, *words, "--fading.scalle", "1")
    assert (wrong.returncode, "Did you mean fading.scale?" in wrong.stderr) == (2, True), wrong.stderr
    wrong = run(house, *words, "--fading.scale", "-1")
    assert "fading.scale = -1.0: must be greater than 0" in wrong.stderr


@pytest.mark.system
@pytest.mark.parametrize("use", [USE, USE_SHOWN], ids=["fading", "as shown"])
def test_it_is_drawn_built_trained_and_planned(house: Path, use: str) -> None:
    used = run(house, "-c", use)
    assert used.returncode == 0, used.stderr


def test_the_readme_has_one_row_for_each_method() -> None:
    table = re.split(r"^\| `?method`? \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)[1].partition("\n\n")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert sorted(name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)) == sorted(METHODS)
