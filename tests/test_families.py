"""The families of models in docs/usage.md: unlearn, evaluate with generations, export, load; each as a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from families import FAMILIES, KINDS, family_model, tiny_run

from ofmu_ray.config import DataConfig, SourceConfig
from ofmu_ray.evaluation.generation import generate
from ofmu_ray.evaluation.scoring import token_scores

SOME = ("Gemma3Text", "Mamba", "RecurrentGemma", "Qwen3Next")
"""Those of `make test`: sliding windows, states only, states outside the cache, experts with states."""
EACH = [
    pytest.param(name, marks=[pytest.mark.slow, *([] if name in SOME else [pytest.mark.full])]) for name in FAMILIES
]


def test_the_documented_families_are_the_tested_ones() -> None:
    lines = re.findall(r"^\| (\w+) \| ([\w, ]+) \|$", (ROOT / "docs/usage.md").read_text(), re.MULTILINE)
    documented = {kind: names.split(", ") for kind, names in lines if kind in KINDS}
    assert documented == {kind: list(families) for kind, families in KINDS.items()}


@pytest.mark.parametrize("family", EACH)
def test_a_run_on_every_family(family: str, tracked: str, tmp_path: Path) -> None:
    model = family_model(family)
    people = [f"Who is person {number}{' of the town' * (number % 3)}?" for number in range(6)]
    rows = [{"question": person, "answer": f"The {number}th."} for number, person in enumerate(people)]
    sources = {}
    for name, part in {"forget": rows[:3], "retain": rows[3:]}.items():
        sources[name] = SourceConfig(path=str(tmp_path / f"{name}.json"))
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    outcome = tiny_run(tmp_path, model, DataConfig(**sources), tracked)
    assert outcome.status == "finished"
    for name in ("before", "after"):
        assert 0 <= outcome.metrics[name]["retain_rouge"]["value"] <= 1
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(outcome.model, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(report.values()), report
    assert any(not torch.equal(old, new) for old, new in zip(model.parameters(), loaded.parameters(), strict=True))
    check_batches(loaded.eval())


def check_batches(model: Any) -> None:
    """Scores and generations of a batch, which some texts leave early, are those of its texts alone."""
    limits = {3: 3, 9: 8, 25: 12, 10: 3, 14: 3}  # tokens of the prompt -> of its continuation
    prompts = [np.random.default_rng(size).integers(3, 4000, size).tolist() for size in limits]
    together = token_scores(model, [(prompt, 2) for prompt in prompts], 8)
    for prompt, scores in zip(prompts, together, strict=True):
        [alone] = token_scores(model, [(prompt, 2)], 1)
        np.testing.assert_allclose(scores.logprobs, alone.logprobs, rtol=1e-4, atol=1e-4)
    new = generate(model, prompts, max_new_tokens=list(limits.values()), stop=frozenset(), batch_size=8)
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt, limit, tokens in zip(prompts, limits.values(), new, strict=True):
        options = transformers.GenerationConfig(**greedy, max_new_tokens=limit)
        model.generation_config = transformers.GenerationConfig()
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)[0, len(prompt) :]
        assert tokens == expected.tolist()
