"""A method is one folder: a new one has options, labels, a search space, planning and rounds with no other change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = '''
"""Ascent by the sign of the gradient."""

from dataclasses import dataclass

from ofmu_ray.config.method_options import OneLoopConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.config.spaces import Knob, LogUniform, Space, rate


@dataclass(frozen=True, kw_only=True)
class SignAscentConfig(OneLoopConfig):
    """Ascent by the sign of the gradient."""

    sharpness: float = 10.0
    """How soon an entry counts as a sign."""

    def check(self, section: str) -> None:
        super().check(section)
        positive(section, self, "sharpness")


OPTIONS = SignAscentConfig
SPACE = Space((rate("sign_ascent.optimizer.lr"), Knob("sign_ascent.sharpness", LogUniform(1, 100), "a guess")))
'''
METHOD = """
import torch

from ofmu_ray.methods.gradient_ascent.method import GradientAscent


class SignAscent(GradientAscent):
    name = "sign_ascent"

    def direction(self, engine, forget, retain, figures):
        return [torch.tanh(self.config.sharpness * part) for part in forget]


METHOD = SignAscent
"""
STRANGER = """
import json, sys
import ofmu_ray.methods
ofmu_ray.methods.__path__.append(sys.argv[1])
assert "torch" not in sys.modules

from pipelines.parse import parse
from ofmu_ray.config import LABELS, UnlearnConfig, apply_overrides, outcome_hash
from ofmu_ray.errors import UserError
from ofmu_ray.search.space_files import space_for

config = parse(UnlearnConfig, ["--method", "sign_ascent", "--sign_ascent.sharpness", "3"], "x")
assert "torch" not in sys.modules
assert LABELS["sign_ascent"] == {"method": "sign_ascent"}
draw = space_for("sign_ascent", "sign_ascent").draws(2, 0, config)[0]
config = apply_overrides(config, draw)
assert config.method_options.sharpness == draw["sign_ascent.sharpness"]
try:
    apply_overrides(config, {"sign_ascent.sharpness": 0.0})
    refused = ""
except UserError as error:
    refused = str(error)

import torch
from ofmu_ray.engines import Batch, TorchEngine
from ofmu_ray.methods import build_method

module = torch.nn.Linear(3, 2)
engine = TorchEngine(module, lambda m, batch: m(batch).square().sum(), outer=config.method_options.optimizer)
method = build_method(config.method_options, 2)
method.start(engine)
batches = [Batch([torch.ones(4, 3)])]
losses = [method.round(engine, batches, [])["forget_loss"] for _ in range(2)]
print(json.dumps({"refused": refused, "losses": losses, "updates": engine.account.updates}))
"""


@pytest.mark.system
def test_a_folder_is_enough(tmp_path: Path) -> None:
    folder = tmp_path / "sign_ascent"
    folder.mkdir()
    (folder / "__init__.py").write_text(OPTIONS)
    (folder / "method.py").write_text(METHOD)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STRANGER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "sign_ascent.sharpness" in found["refused"]
    assert found["losses"][1] < found["losses"][0]  # of the negated loss
    assert found["updates"] == 2


def test_every_method_has_its_line_in_the_readme() -> None:
    from ofmu_ray.config.method_options import method_names

    text = (ROOT / "README.md").read_text()
    assert not [name for name in method_names() if f"`{name}`" not in text]
