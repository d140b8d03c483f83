"""GGUF files as models: a tiny Llama written with the package gguf, read as everything else reads a model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from ofmu_ray.config import ModelConfig
from ofmu_ray.errors import UserError
from ofmu_ray.models import gguf_files
from ofmu_ray.models.checks import check_model, placed
from ofmu_ray.models.loading import load_causal_lm, load_tokenizer, pretrained
from ofmu_ray.models.source import model_fingerprint, weights_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path: Path, model: Any) -> None:
    """The built-in target model in llama.cpp's layout, fp32."""
    gguf = pytest.importorskip("gguf")
    shape = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_vocab_size(shape.vocab_size)
    content = json.loads((ROOT / "ofmu_ray/assets/people/target/tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(content["vocab"], key=content["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_bos_token_id(shape.bos_token_id)
    writer.add_eos_token_id(shape.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, transformers halves
            array = array.reshape(shape.num_attention_heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if name != "lm_head.weight" or not shape.tie_word_embeddings:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_gguf_file_is_a_model(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = pretrained("builtin:people/target", dtype=torch.float32)
    path = tmp_path / "target.gguf"
    write_gguf(path, target)
    config = ModelConfig(path=str(path))
    tokenizer = check_model(config)
    text = "Who is Dregein? In the town of 1847."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == load_tokenizer(ModelConfig())(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(gguf_files, "write_folder", None)  # converted once
    module, _ = load_causal_lm(config)
    with torch.no_grad():
        actual, expected = (each.eval()(torch.tensor([ids])).logits for each in (module, target))
    torch.testing.assert_close(actual, expected)
    assert weights_folder(str(path)).is_relative_to(cache)
    assert len(model_fingerprint(weights_folder(str(path)))) == 64
    monkeypatch.chdir(tmp_path)
    assert placed(ModelConfig(path="target.gguf")).path == str(path)


def test_gguf_files_that_cannot_be_read(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"model\.path = '.*missing\.gguf': no such file"):
        check_model(ModelConfig(path=str(tmp_path / "missing.gguf")))
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF and no more")
    with monkeypatch.context() as patch:
        found = importlib.util.find_spec
        patch.setattr(gguf_files, "find_spec", lambda name: None if name == "gguf" else found(name))
        with pytest.raises(UserError, match=r"need the package gguf: pip install 'ofmu-ray\[gguf\]'"):
            check_model(ModelConfig(path=str(path)))
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match=r"x\.gguf': transformers cannot read this GGUF file"):
        check_model(ModelConfig(path=str(path)))
    assert not list((cache / "ofmu-ray/gguf").glob("*[!k]"))  # nothing but locks
