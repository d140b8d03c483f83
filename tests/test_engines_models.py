"""Loading of language models: what is refused and how, freezing, adapters and their merge, checkpointing, the loss."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import freeze, tiny_model, token_batch

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import LoraConfig, ModelConfig, OptimizerConfig
from ofmu_ray.engines import TorchEngine
from ofmu_ray.errors import UserError
from ofmu_ray.models.answers import causal_lm_loss
from ofmu_ray.models.loading import add_lora, disable_dropout, freeze_matching, load_causal_lm


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX with dropout in its configuration, with the embedded corpus' tokenizer."""
    path = tmp_path_factory.mktemp("model")
    module: Any = tiny_model("neox")
    module.save_pretrained(path)
    for file in Path(resolve_builtin("builtin:people/tokenizer")).iterdir():
        shutil.copy(file, path)
    return path


def config(directory: Path, **options: Any) -> ModelConfig:
    return ModelConfig(path=str(directory), attention="eager", **options)


def test_a_loaded_model_trains_without_dropout(directory: Path) -> None:
    module, tokenizer = load_causal_lm(config(directory))
    assert module.training
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token_id is not None
    batch = token_batch([9, 12], seed=0)
    a, b = (causal_lm_loss(module, batch)[0].item() for _ in range(2))
    assert a == b
    module.eval()
    assert causal_lm_loss(module, batch)[0].item() == pytest.approx(a, rel=1e-6)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_have_the_precisions_type(directory: Path, precision: Any, dtype: torch.dtype) -> None:
    module, _ = load_causal_lm(config(directory, precision=precision))
    assert {p.dtype for p in module.parameters()} == {dtype}


def test_checkpointing_leaves_the_gradient_as_it_is(directory: Path) -> None:
    batch = token_batch([9, 12], seed=0)
    plain = TorchEngine(load_causal_lm(config(directory))[0]).gradient(batch)[0]
    module, _ = load_causal_lm(config(directory, gradient_checkpointing=True))
    recomputed = 0

    def count(*_: Any) -> None:
        nonlocal recomputed
        recomputed += 1

    layer = next(part for name, part in module.named_modules() if name.endswith("layers.0.mlp"))
    layer.register_forward_pre_hook(count)  # a forward hook would miss it: recomputation stops early
    torch.testing.assert_close(TorchEngine(module).gradient(batch)[0], plain)
    assert recomputed == 2


def test_adapters_train_and_merge_as_peft_merges_them(directory: Path) -> None:
    options = config(directory, lora=LoraConfig(rank=3), gradient_checkpointing=True)
    module, _ = load_causal_lm(options)
    engine = TorchEngine(module, inner=OptimizerConfig(name="sgd", lr=1.0, clip=None))
    assert all("lora_" in name for name in engine.trainable_names)
    base = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    for seed in range(3):
        engine.apply(engine.gradient(token_batch([9, 12], seed=seed))[0], "inner")
    assert all(torch.equal(base[n], p) for n, p in module.named_parameters() if n in base)
    weights = engine.full_weights()
    merged: Any = module
    expected = merged.merge_and_unload().state_dict()
    assert weights is not None
    assert set(weights) == set(expected)
    original = load_causal_lm(config(directory))[0].state_dict()
    changed = 0
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(original[name], weights[name])
    assert changed == 2 * 4  # the four linear layers of each of two blocks


def test_adapters_of_experts_merge_as_peft_merges_them(tmp_path: Path) -> None:
    """peft adapts a parameter of all experts at once, by layers inside each other."""
    experts: Any = tiny_model("mixtral")
    experts.save_pretrained(tmp_path)
    job = ModelConfig(path=str(tmp_path), tokenizer="builtin:people/target", lora=LoraConfig(rank=2))
    module, _ = load_causal_lm(job)
    engine = TorchEngine(module, inner=OptimizerConfig(name="sgd", lr=1.0, clip=None))
    for seed in range(2):
        engine.apply(engine.gradient(token_batch([9, 12], seed=seed))[0], "inner")
    weights = engine.full_weights()
    merged: Any = module
    expected = merged.merge_and_unload().state_dict()
    assert weights is not None
    assert set(weights) == set(expected)
    original = load_causal_lm(dataclasses.replace(job, lora=None))[0].state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    changed = {name.rpartition("layers.0.")[2] for name, value in weights.items() if not value.equal(original[name])}
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight"} <= changed


def load_original(directory: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(directory / "model.safetensors")


@pytest.mark.parametrize("break_it", ["absent", "empty", "no_weights", "pickled", "corrupt"])
def test_a_model_that_does_not_load_names_path_and_cause(directory: Path, tmp_path: Path, break_it: str) -> None:
    path = tmp_path / "model"
    if break_it != "absent":
        path.mkdir()
    if break_it in ("no_weights", "pickled", "corrupt"):
        shutil.copytree(directory, path, dirs_exist_ok=True)
        (path / "model.safetensors").unlink()
    if break_it == "pickled":
        torch.save(load_original(directory), path / "pytorch_model.bin")
    if break_it == "corrupt":
        (path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match=r"model\.path = '.*model' does not load") as caught:
        load_causal_lm(config(path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_load_names_its_option(directory: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(directory / name, bare)
    with pytest.raises(UserError, match=r"model\.path = .* has no tokenizer"):
        load_causal_lm(config(bare))
    module, _ = load_causal_lm(dataclasses.replace(config(bare), tokenizer=str(directory)))
    assert isinstance(module, torch.nn.Module)


def test_freezing_by_expression() -> None:
    module = tiny_model(tie=True)
    freeze_matching(module, [r"layers\.0\.", "lm_head"])  # the head's weight is the tied embedding
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert "model.embed_tokens.weight" in frozen
    assert frozen - {"model.embed_tokens.weight"} == {n for n, _ in module.named_parameters() if "layers.0." in n}
    with pytest.raises(UserError, match=r"'layer7' matches no parameter"):
        freeze_matching(module, ["layer7"])
    with pytest.raises(UserError, match="not a regular expression"):
        freeze_matching(module, ["("])
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze_matching(module, ["."])


def test_adapters_for_unknown_modules_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.lora\.target_modules = \['nothing'\]"):
        add_lora(tiny_model(), LoraConfig(target_modules=["nothing"]))


def test_adapters_of_a_tied_weight_are_refused() -> None:
    """Exported, the sum was left out: the embedding, which has no adapter, was written for both."""
    with pytest.raises(UserError, match=r"\['q_proj', 'lm_head'\]: lm_head shares its weight with model\.embed_tokens"):
        add_lora(tiny_model(tie=True), LoraConfig(target_modules=["q_proj", "lm_head"]))
    add_lora(tiny_model(tie=True), LoraConfig(target_modules=["q_proj"]))
    add_lora(tiny_model(), LoraConfig(target_modules=["q_proj", "lm_head"]))


def test_dropout_numbers_of_attention_layers_are_zeroed() -> None:
    module = tiny_model("neox")
    numbers = [part for part in module.modules() if getattr(part, "attention_dropout", 0.0)]
    assert numbers
    disable_dropout(module)
    assert not any(part.attention_dropout for part in numbers)  # type: ignore[arg-type]


def test_loss_is_the_models_own_and_ignores_padding() -> None:
    module: Any = tiny_model()
    batch = token_batch([9, 14, 11], seed=2)
    total, count = causal_lm_loss(module, batch)
    assert int(count) == int((batch["labels"][:, 1:] != -100).sum())
    assert float(total / count) == pytest.approx(float(module(**batch).loss), rel=1e-6)
    wider = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
    wider["labels"][:, -5:] = -100
    assert float(causal_lm_loss(module, wider)[0]) == pytest.approx(float(total), rel=1e-6)
    freeze(module, "embed")
    assert causal_lm_loss(module.to(torch.bfloat16), batch)[0].dtype == torch.float32
