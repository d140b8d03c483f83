"""Search spaces by label, and from a user's file."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import yaml

from ofmu_ray.config import flatten
from ofmu_ray.config.method_options import space_of
from ofmu_ray.config.spaces import Knob, Prior, Space, parse_priors
from ofmu_ray.errors import UserError


def space_for(label: str, method: str, lr_scale: float = 1.0) -> Space:
    """The space of a label, tune_spaces/LABEL.py or else its method's own, with its learning rates times `lr_scale`."""
    name = f"tune_spaces.{label}"
    found = importlib.import_module(name).SPACE if importlib.util.find_spec(name) else space_of(method)
    space: Space = found.scaled(lr_scale)
    return space


def read_space(path: str, space: Space) -> Space:
    """`space` with what a file says: YAML with priors by field, or Python with a `SPACE`, which replaces it.

    A Python file is run; it is only read because the user names it.

    Raises:
        UserError: no such file, another kind of file, or not a space.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"space_file = {path!r}: no such file")
    if file.suffix == ".py":
        found = runpy.run_path(str(file)).get("SPACE")
        if not isinstance(found, Space) or not all(isinstance(knob, Knob) for knob in found.knobs):
            raise UserError(f"space_file = {path!r}: it must define SPACE, a tune_spaces.Space of Knobs")
        return found
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"space_file = {path!r}: name a .yaml file of priors by field, or a .py file with a SPACE")
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"space_file = {path!r}: not YAML: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"space_file = {path!r}: must hold priors by field, such as 'ofmu.beta: loguniform(1e-3, 1)'")
    priors: dict[str, Prior | None] = parse_priors(flatten(content), option=path)
    return space.with_priors(priors, f"from {file.name}")
