"""What ranks see of a model that each loads whole, and of the same model of which each reads what it keeps.

Rank functions for `engine_ranks.run_ranks`; tests/test_loading.py judges.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_models import token_batch
from engine_ranks import INNER, OUTER, all_ranks

from ofmu_ray.config import LoraConfig, ModelConfig


@dataclass(frozen=True)
class Loading:
    """One model directory and one way to train it."""

    folder: str
    stage: int
    precision: str = "fp32"
    variant: str = "plain"

    def __str__(self) -> str:
        return f"{self.folder.rpartition('/')[2]}-{self.variant}-{self.precision}-zero{self.stage}"

    @property
    def config(self) -> ModelConfig:
        config = ModelConfig(path=self.folder, precision=self.precision)  # type: ignore[arg-type]
        if self.variant == "lora":
            return replace(config, lora=LoraConfig(rank=2), gradient_checkpointing=True)
        return replace(config, freeze=[r"layers\.0\.|embed"]) if self.variant == "frozen" else config


def whole(case: Loading) -> torch.nn.Module:
    from ofmu_ray.models.loading import options_of, pretrained, read_config, ready

    torch.manual_seed(5)
    options = options_of(case.config, read_config(case.folder))
    return ready(pretrained(case.folder, **options), case.config)


def engine_of(case: Loading, cut: bool) -> tuple[Any, Any]:
    from ofmu_ray.engines import DeepSpeedEngine
    from ofmu_ray.models.unread import load_unread

    module, unread = whole(case), None
    if cut:
        torch.manual_seed(5)
        result = load_unread(case.config)
        assert not isinstance(result, str), result
        module, unread = result
        unread.place(module, torch.device("cpu"))
    options: dict[str, Any] = {"inner": INNER, "outer": OUTER, "precision": case.precision, "zero_stage": case.stage}
    return DeepSpeedEngine(module, unread=unread, **options), unread


def everything(engine: Any, rank: int) -> list[Any]:
    """All that loading decides, by rank: masters, exported weights, buffers, and ten rounds from there."""
    weights = engine.full_weights() or {}
    found = [[master.clone() for master in engine.shards.masters], list(weights.values())]
    found.append([buffer.clone() for buffer in engine.module.buffers()])
    losses = []
    for step in range(10):
        gradient, loss = engine.gradient(token_batch([9, 12, 7, 10], seed=2 * step + rank))
        losses.append(loss)
        if step == 0:
            found.append([part.clone() for part in gradient])
        engine.apply(gradient, "outer" if step % 2 else "inner")
    found += [engine.shards.masters, list((engine.full_weights() or {}).values())]
    names = [list(weights), engine.trainable_names, [name for name, _ in engine.module.named_buffers()]]
    return [found, [names, losses, engine.layout, str(engine.module.generation_config)]]


def measure(case: Loading, rank: int, world: int) -> dict[str, Any]:
    engine, _ = engine_of(case, cut=False)
    before = engine.state_dict()
    tensors, rest = everything(engine, rank)
    engine.close()
    drawn = torch.rand(1)
    engine, unread = engine_of(case, cut=True)
    read = unread.bytes_read
    first = everything(engine, rank)
    same_numbers = torch.equal(torch.rand(1), drawn)
    engine.load_state_dict(before)
    resumed = everything(engine, rank)
    engine.close()
    stored = sum(file.stat().st_size for file in Path(case.folder).glob("*.safetensors"))
    bytes_read = torch.tensor([float(read) if r == rank else 0.0 for r in range(world)])
    dist.all_reduce(bytes_read)
    return {
        "equal": [all_ranks(equal(a, b)) for a, b in zip(tensors, first[0], strict=True)],
        "rest": all_ranks(str(rest) == str(first[1])),
        "resumed": all_ranks(all(equal(a, b) for a, b in zip(tensors, resumed[0], strict=True))),
        "random": all_ranks(same_numbers),
        "share": (bytes_read / stored).tolist(),
    }


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fit_and_die(folder: Path, where: str) -> None:
    """A run without Ray that kills itself after the checkpoint of round 4, or while the tenth tensor is read."""
    from fault_job import make_job

    from ofmu_ray.models.stored import StoredTensor
    from ofmu_ray.training import checkpoint
    from ofmu_ray.training.start import fit_here

    save, read, done = checkpoint.save, StoredTensor.read, []

    def save_and_die(state: Any, *rest: Any) -> None:
        save(state, *rest)
        if state.round == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    def read_and_die(self: StoredTensor, target: torch.Tensor, start: int) -> int:
        done.append(self.name)
        if len(done) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, target, start)

    if where == "round":
        checkpoint.save = save_and_die
    else:
        StoredTensor.read = read_and_die  # type: ignore[method-assign]
    fit_here(make_job(folder), "run")
