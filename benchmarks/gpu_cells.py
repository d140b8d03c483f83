"""The models, precisions, engines and methods that `benchmarks/gpu.py` measures. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ofmu_ray.config import LoraConfig, ModelConfig, OptimizerConfig
from ofmu_ray.methods.grad_diff import GradDiffConfig
from ofmu_ray.methods.gradient_ascent import GradientAscentConfig
from ofmu_ray.methods.npo import NPOConfig
from ofmu_ray.methods.ofmu import OFMUConfig

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {  # SmolLM2-135M
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "1b": {  # Llama-3.2-1B
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "3b": {  # Llama-3.2-3B
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 1024,
    },
}  # fmt: skip
ROWS = 8
TOKENS = (512, 128)
"""Tokens of a row: the methods' (the longest rows that TOFU's configurations allow), and of further bare passes (about
TOFU's mean)."""
OPTIMIZER = OptimizerConfig(name="adamw", lr=1e-6)


@dataclass(frozen=True)
class Cell:
    """A model, how it runs, and on which engine."""

    shape: str
    precision: Any
    checkpointing: bool = False
    engine: str = "torch"
    """torch, or deepspeed's ZeRO stage on a process group of one rank: zero0 to zero3."""
    lora: int | None = None

    @property
    def name(self) -> str:
        words = [self.shape, self.precision, "checkpointed" if self.checkpointing else "", self.engine]
        return " ".join(word for word in [*words, f"lora{self.lora}" if self.lora else ""] if word not in ("", "torch"))

    @property
    def model(self) -> ModelConfig:
        lora = LoraConfig(rank=self.lora) if self.lora else None
        return ModelConfig(precision=self.precision, gradient_checkpointing=self.checkpointing, lora=lora)

    @property
    def llama(self) -> Any:
        import transformers

        return transformers.LlamaConfig(**SHAPES[self.shape])


def cells(smoke: bool) -> list[Cell]:
    """In order of worth."""
    if smoke:
        return [Cell("tiny", "bf16"), Cell("tiny", "bf16_autocast", True), Cell("tiny", "fp32", engine="zero3")]
    plain, checked = False, True
    return [
        Cell("1b", "bf16"), Cell("1b", "bf16_autocast"), Cell("135m", "bf16"), Cell("1b", "bf16", checked),
        Cell("3b", "bf16", checked), Cell("135m", "bf16_autocast"), Cell("3b", "bf16", plain),
        Cell("1b", "bf16", engine="zero2"), Cell("1b", "bf16_autocast", checked), Cell("1b", "bf16", engine="zero3"),
        Cell("135m", "bf16", checked), Cell("3b", "bf16", checked, lora=16), Cell("135m", "bf16_autocast", checked),
        Cell("3b", "bf16_autocast", checked), Cell("3b", "bf16_autocast", plain), Cell("1b", "fp32"),
    ]  # fmt: skip


def methods() -> dict[str, Any]:
    """By growing memory, as an engine keeps the moments of every loop that has stepped."""
    loops: dict[str, Any] = {"inner": OPTIMIZER, "outer": OPTIMIZER, "inner_steps": 2}
    return {
        "gradient ascent": GradientAscentConfig(optimizer=OPTIMIZER),
        "GradDiff": GradDiffConfig(optimizer=OPTIMIZER),
        "NPO": NPOConfig(optimizer=OPTIMIZER),
        # a level that no token reaches, so that no step is skipped
        "OFMU first_order": OFMUConfig.from_preset(
            "first_order", **loops, outer_steps=2, projection=0.6, forget_level=1e3
        ),
        "OFMU lite": OFMUConfig.from_preset("lite", **loops, relative_step=1e-4),
        "OFMU full": OFMUConfig.from_preset("full", **loops, relative_step=1e-4),
    }
