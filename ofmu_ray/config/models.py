"""Options of models."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from ofmu_ray.config.ranges import positive, require
from ofmu_ray.errors import UserError

BUILTIN_TARGET = "builtin:people/target"
Precision = Literal["fp32", "tf32", "bf16", "bf16_autocast"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (peft)."""

    rank: int = 8
    """Rank of the update matrices."""
    alpha: float = 16.0
    """Scaling; the update is multiplied by alpha / rank."""
    target_modules: list[str] | None = None
    """Names of the modules to adapt; null: all linear layers except the output head."""

    def __post_init__(self) -> None:
        positive("model.lora", self, "rank", "alpha")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to change."""

    path: str = BUILTIN_TARGET
    """Folder (safetensors), GGUF file, hub name or builtin:NAME."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name; null: the model's own."""
    precision: Precision = "fp32"
    """fp32, tf32, bf16 or bf16_autocast. tf32: fp32 weights, TF32 products on a GPU, fp32 differences; bf16: bf16
    weights, fp32 master copy; bf16_autocast: fp32 weights, bf16 passes, fp32 differences."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation; exact curvature needs eager. flash_attention_2 needs precision bf16, a GPU and the
    package flash-attn; without them the run takes sdpa and says so."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (less memory, about a third more time)."""
    lora: LoraConfig | None = None
    """Train only low-rank adapters; null: train the weights."""
    freeze: list[str] = field(default_factory=list)
    """Regular expressions; parameters with a matching name are frozen."""
    trust_remote_code: bool = False
    """Run code from the model repository."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The model that a run writes."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights; auto: as in the files of model.path. What is evaluated is the exported model."""
    weights: Literal["merged", "adapter"] = "merged"
    """With model.lora. merged: the adapters are added to the weights; adapter: they alone, as peft loads them (auto:
    fp32)."""
    max_shard_size: str = "5GB"
    """Largest file; also what export needs of host memory, and of local disk for a storage at a URI."""
    push_to_hub: str | None = None
    """Push the finished model to this repository on the Hugging Face hub (OWNER/NAME); `--push-to-hub` for short."""
    hub_public: bool = False
    """Whether everybody may load what is pushed."""

    def __post_init__(self) -> None:
        sized = re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", self.max_shard_size) is not None
        require(sized, "export.max_shard_size", self.max_shard_size, "a number and a unit, such as 5GB or 500MB")

    def check(self, model: ModelConfig | None) -> None:
        """Raises UserError if this model has no adapters to export."""
        if self.weights == "adapter" and (model is None or model.lora is None):
            raise UserError(
                "export.weights = adapter, but no adapters are trained: set --model.lora.rank 8, or drop it"
            )


@dataclass(frozen=True, kw_only=True)
class ScratchConfig:
    """A small Llama trained from scratch (`ofmu train`)."""

    hidden_size: int = 128
    """Width."""
    intermediate_size: int = 344
    """Width of the feed-forward layers."""
    layers: int = 4
    """Number of layers."""
    heads: int = 4
    """Number of attention heads."""
    kv_heads: int = 4
    """Number of key/value heads."""
    vocab_size: int = 4096
    """Size of the byte-pair vocabulary learned from the training rows (without a tokenizer)."""
    max_length: int = 512
    """Longest sequence (tokens)."""
    tie_embeddings: bool = True
    """Share the input and output embeddings."""

    def __post_init__(self) -> None:
        names = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "vocab_size", "max_length")
        positive("scratch", self, *names)
        require(self.hidden_size % self.heads == 0, "scratch.heads", self.heads, "a divisor of scratch.hidden_size")
        require(self.heads % self.kv_heads == 0, "scratch.kv_heads", self.kv_heads, "a divisor of scratch.heads")
