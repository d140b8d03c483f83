"""vLLM loads an exported model and continues a prompt greedily as transformers does. It brings its own torch, so it is
tested where somebody has installed it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.full,
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]
PROMPT, TOKENS = "Question: Where was Seraul Trajoath born?\nAnswer:", 12


def test_vllm_loads_an_exported_model(tmp_path: Path) -> None:
    import transformers
    from vllm import LLM, SamplingParams

    from ofmu_ray import unlearn
    from ofmu_ray.config import EvaluationConfig, TrainingConfig, UnlearnConfig

    config = UnlearnConfig(
        name="r",
        storage=str(tmp_path),
        training=TrainingConfig(rounds=1),
        evaluation=EvaluationConfig(enabled=False),
    )
    folder = unlearn(config).model
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    engine = LLM(model=folder, dtype="float32", enforce_eager=True)
    [answer] = engine.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=TOKENS))
    assert list(answer.outputs[0].token_ids) == expected.tolist()
