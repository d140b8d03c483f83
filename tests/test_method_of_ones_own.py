"""A method is one file: a new one has options, labels, a search space, planning and rounds with no other change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = '''
"""Ascent by the sign of the gradient."""

from dataclasses import dataclass

from ofmu_ray.config.methods import RATE, OneLoopConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.methods.gradient_ascent import GradientAscent


@dataclass(frozen=True, kw_only=True)
class SignAscentConfig(OneLoopConfig):
    """Ascent by the sign of the gradient."""

    sharpness: float = 10.0
    """How soon an entry counts as a sign."""

    def check(self, section):
        super().check(section)
        positive(section, self, "sharpness")


class SignAscent(GradientAscent):
    name = "sign_ascent"
    options = SignAscentConfig
    space = {"optimizer.lr": RATE, "sharpness": ("loguniform(1, 100)", "a guess")}

    def direction(self, engine, forget, retain, figures):
        import torch

        return [torch.tanh(self.config.sharpness * part) for part in forget]
'''
STRANGER = """
import json, sys
import types
# the package before it has looked for its methods: with one folder more
package = types.ModuleType("ofmu_ray.methods")
package.__path__ = [sys.argv[2] + "/ofmu_ray/methods", sys.argv[1]]
sys.modules["ofmu_ray.methods"] = package

from ofmu_ray.commandline.parse import parse
from ofmu_ray.config import LABELS, UnlearnConfig, apply_overrides, outcome_hash
from ofmu_ray.errors import UserError

config = parse(UnlearnConfig, ["--method", "sign_ascent", "--sign_ascent.sharpness", "3"], "x")
assert "torch" not in sys.modules
from ofmu_ray.search.spaces import space_for
assert LABELS["sign_ascent"] == {"method": "sign_ascent"}
draw = space_for("sign_ascent", config).draws(2, 0, config)[0]
config = apply_overrides(config, draw)
assert config.method_options.sharpness == draw["sign_ascent.sharpness"]
try:
    apply_overrides(config, {"sign_ascent.sharpness": 0.0})
    refused = ""
except UserError as error:
    refused = str(error)

import torch
from ofmu_ray.engines import Batch, TorchEngine
from ofmu_ray.methods.registry import build_method

module = torch.nn.Linear(3, 2)
engine = TorchEngine(module, lambda m, batch: m(batch).square().sum(), outer=config.method_options.optimizer)
method = build_method(config.method_options, 2)
method.start(engine)
batches = [Batch([torch.ones(4, 3)])]
losses = [method.round(engine, batches, [])["forget_loss"] for _ in range(2)]
print(json.dumps({"refused": refused, "losses": losses, "updates": engine.account.updates}))
"""


@pytest.mark.system
def test_a_file_is_enough(tmp_path: Path) -> None:
    (tmp_path / "sign_ascent.py").write_text(FILE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STRANGER, str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "sign_ascent.sharpness" in report["refused"]
    assert report["losses"][1] < report["losses"][0]  # of the negated loss
    assert report["updates"] == 2


def test_every_method_has_its_line_in_the_readme() -> None:
    from ofmu_ray.config import METHODS

    text = (ROOT / "README.md").read_text()
    assert not [name for name in METHODS if f"`{name}`" not in text]
