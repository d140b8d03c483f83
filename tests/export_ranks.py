"""Exports by two ranks at ZeRO-3 that tests/test_export.py reads."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_models import tiny_model, token_batch

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import ExportConfig, LoraConfig, ModelConfig, OptimizerConfig, Precision
from ofmu_ray.models.exporting import export_causal_lm
from ofmu_ray.models.loading import load_causal_lm
from ofmu_ray.storage import new_folder

SGD = OptimizerConfig(name="sgd", lr=0.1, clip=None)
SHARD = "20KB"
DEFAULT = ExportConfig(max_shard_size=SHARD)


@dataclass(frozen=True)
class Export:
    """One export."""

    name: str
    folder: str
    """Parent of the model that goes in (`<name>-in`) and of the one that comes out (`<name>`)."""
    model: str = "llama"
    tie: bool = False
    stored: torch.dtype = torch.float32
    precision: Precision = "fp32"
    lora: LoraConfig | None = None
    options: ExportConfig = DEFAULT

    def __str__(self) -> str:
        return self.name


def source(export: Export) -> Path:
    return Path(export.folder) / f"{export.name}-in"


def write_source(export: Export) -> None:
    """A model with the built-in tokenizer's files, in the type `stored`."""
    module: Any = tiny_model(export.model, tie=export.tie)
    module.to(export.stored).save_pretrained(source(export))
    for file in Path(resolve_builtin("builtin:people/tokenizer")).iterdir():
        shutil.copy(file, source(export))


def export(case: Export, rank: int, world: int) -> dict[str, Any]:
    """Load, take a step, export; what rank 0 knows of the weights."""
    from ofmu_ray.engines import DeepSpeedEngine

    if rank == 0:
        write_source(case)
    dist.barrier()
    config = ModelConfig(path=str(source(case)), attention="eager", precision=case.precision, lora=case.lora)
    torch.manual_seed(0)
    module, tokenizer = load_causal_lm(config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:  # initially zero
                parameter.normal_(std=0.1)
    engine = DeepSpeedEngine(module, zero_stage=3, precision=case.precision, inner=SGD, outer=SGD)
    engine.apply(engine.gradient(token_batch([9, 12], seed=rank))[0], "inner")
    readable = engine.readable_weights()
    if rank == 0:
        with new_folder(Path(case.folder) / case.name) as folder:
            export_causal_lm(module, tokenizer, readable, folder, config, case.options)
    else:
        export_causal_lm(module, tokenizer, readable, None, config, case.options)
    weights = engine.full_weights()
    engine.close()
    return {"weights": weights}


def fit_and_die_in_the_export(folder: Path) -> None:
    """A run without Ray that kills itself when it is about to write the second shard."""
    import safetensors.torch
    from fault_job import make_job

    from ofmu_ray.training.start import fit_here

    save, written = safetensors.torch.save_file, []

    def save_file(content: Any, path: Path, **options: Any) -> None:
        if written and path.name.startswith("model-"):
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        save(content, path, **options)

    safetensors.torch.save_file = save_file
    fit_here(replace(make_job(folder), export=ExportConfig(max_shard_size="500KB")), "run")
