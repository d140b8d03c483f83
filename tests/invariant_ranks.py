"""Ten OFMU rounds on one engine, alone or as a rank of a gloo group: what tests/test_invariants.py compares.

Batches are made as in a run: global batches by `batch_order`, dealt to the ranks by `shard_slots`, cut into
micro-batches, collated. Unlike in a run, rows come from a generator, not from Parquet.
"""

from __future__ import annotations

import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from engine_models import VOCABULARY, tiny_model
from engine_ranks import all_ranks

from ofmu_ray.config import OptimizerConfig
from ofmu_ray.data.batches import collate
from ofmu_ray.data.order import batch_order, shard_slots
from ofmu_ray.engines import Batch
from ofmu_ray.methods.ofmu import OFMU, OFMUConfig, PresetName

ROUNDS = 10
BATCH = 4
"""Rows per global batch."""
ROWS = {"forget": 10, "retain": 17}
SHORT: dict[str, dict[str, Any]] = {
    "full": {"inner_steps": 2, "beta": 1.0, "rho": 0.02},
    "lite": {"inner_steps": 3, "beta": 1.0, "rho": 0.02},
    "first_order": {"inner_steps": 2, "outer_steps": 3, "projection": 0.6, "forget_level": 5.0},
}
"""Fewer steps than in a run: 8 + 8, 5 + 3 and 2 + 3 passes per round. The level is in the middle of the losses."""
LOSSES: dict[str, Any] = {"llama": "bounded_token", "neox": "bounded_row", "qwen2": "simnpo"}
"""Forget losses of first_order."""
OPTIMIZERS = {
    "sgd": OptimizerConfig(name="sgd", lr=0.05, clip=1.0),
    "adamw": OptimizerConfig(name="adamw", lr=2e-3, clip=1.0, eps=1e-3),
}
FAR = 1e4
"""Displacement that dwarfs the weights' rounding when a sharded vector is read from the full weights."""


@dataclass(frozen=True)
class Case:
    model: str = "llama"
    stage: int | None = None
    """None: TorchEngine."""
    preset: PresetName = "lite"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    micro: int | None = None
    """Rows per micro-batch; None: all of the rank's share."""
    resume: bool = False
    """Also continue in a new engine from the state after half of the rounds."""
    curvature: Literal["finite_difference", "exact"] = "finite_difference"
    relative_step: float | None = 1e-3
    """Longer than the default: its truncation error is the same everywhere, and rounding hardly matters."""
    rounds: int = ROUNDS

    def __str__(self) -> str:
        engine = "torch" if self.stage is None else f"zero{self.stage}"
        micro = f"-micro{self.micro}" if self.micro else ""
        return f"{self.model}-{engine}-{self.preset}-{self.optimizer}{micro}{'-resume' if self.resume else ''}"

    @property
    def reference(self) -> Case:
        """The same trajectory in one process with global batches."""
        return Case(self.model, None, self.preset, self.optimizer)


def config(case: Case) -> OFMUConfig:
    optimizer = OPTIMIZERS[case.optimizer]
    loss = {"forget_loss": LOSSES[case.model]} if case.preset == "first_order" else {}
    return OFMUConfig.from_preset(
        case.preset,
        **SHORT[case.preset],
        **loss,
        curvature=case.curvature,
        relative_step=case.relative_step,
        inner=optimizer,
        outer=optimizer,
    )


def seeded_model(kind: str, seed: int = 0) -> torch.nn.Module:
    """The tiny model with matrices from numpy's generator by parameter name: the same with every torch release."""
    module = tiny_model(kind)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 2:
                rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
                parameter.copy_(torch.from_numpy(rng.normal(scale=0.1, size=tuple(parameter.shape))))
    return module.train()


def rows(stream: str) -> list[dict[str, Any]]:
    """Random rows of 5 to 24 tokens; prompts of any length, so that equal token counts differ in labels."""
    rng = np.random.default_rng(zlib.crc32(stream.encode()))
    lengths = rng.integers(5, 25, size=ROWS[stream])
    ids = [rng.integers(1, VOCABULARY, size=n).tolist() for n in lengths]
    return [{"input_ids": tokens, "prompt_tokens": int(rng.integers(1, len(tokens) - 1))} for tokens in ids]


def shard_of(stream: str, per_round: int, rounds: int, world: int, rank: int, micro: int | None) -> list[list[Batch]]:
    """This rank's batches for each round."""
    table = rows(stream)
    lengths = np.array([len(row["input_ids"]) for row in table])
    order = batch_order(len(lengths), rounds * per_round, BATCH, lengths=lengths.__getitem__, seed=3, stream=stream)
    share = BATCH // world
    mine = np.take_along_axis(order, shard_slots(lengths[order], world), axis=1)[:, rank * share : (rank + 1) * share]
    batches = []
    for slots in mine:
        pieces = [slots[start : start + (micro or share)] for start in range(0, share, micro or share)]
        batches.append(Batch([collate([table[i] for i in piece], pad_id=0) for piece in pieces]))
    return [batches[at : at + per_round] for at in range(0, len(batches), per_round)]


class Watched:
    """An engine that observes its vectors going in and out."""

    def __init__(self, engine: Any):
        self.engine = engine
        self.first: dict[str, torch.Tensor] | None = None
        """Direction of the first step of the first inner loop: the full -grad Phi, on rank 0."""
        self.applied = 0
        self.largest = 0
        """Elements of the largest vector on this rank."""
        self.left_behind = 0
        """Largest number of parameter-gradient elements alive next to a vector."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def gradient(self, *args: Any, **kwargs: Any) -> tuple[list[torch.Tensor], float]:
        vector, value = self.engine.gradient(*args, **kwargs)
        self._see(vector)
        grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        self.left_behind = max(self.left_behind, sum(grad.numel() for grad in grads))
        return vector, value

    def displaced(self, vector: list[torch.Tensor], step: float) -> AbstractContextManager[None]:
        self._see(vector)
        return self.engine.displaced(vector, step)  # type: ignore[no-any-return]

    def apply(self, vector: list[torch.Tensor], *args: Any, **kwargs: Any) -> float:
        self._see(vector)
        if not self.applied:
            self.first = self._whole(vector)
        self.applied += 1
        return self.engine.apply(vector, *args, **kwargs)  # type: ignore[no-any-return]

    def _see(self, vector: list[torch.Tensor]) -> None:
        self.largest = max(self.largest, sum(shard.numel() for shard in vector))

    def _whole(self, vector: list[torch.Tensor]) -> dict[str, torch.Tensor] | None:
        before = self.engine.full_weights()
        with self.engine.displaced(vector, FAR):
            after = self.engine.full_weights()
        return None if after is None else {name: (after[name] - before[name]) / FAR for name in after}


def trajectory(case: Case, rank: int, world: int) -> dict[str, Any]:
    """Run the case's rounds. Only rank 0 has full vectors."""
    method = OFMU(config(case))
    counts = method.batches_per_round()
    forget, retain = (shard_of(s, counts[s], case.rounds, world, rank, case.micro) for s in ("forget", "retain"))
    engine = Watched(build_engine(case))
    start = engine.full_weights()
    metrics, saved = [], None
    for number in range(case.rounds):
        if case.resume and number == case.rounds // 2:
            saved = engine.state_dict(), method.state_dict()
        metrics.append(method.round(engine, iter(forget[number]), iter(retain[number])))
    result = {
        "start": start,
        "phi": engine.first,
        "weights": engine.full_weights(),
        "figures": metrics,
        "account": engine.account.state(),
        "largest": engine.largest / engine.numel,
        "left_behind": engine.left_behind,
        "labels": [int((micro["labels"] >= 0).sum()) for batch in forget[0] for micro in batch.micro],
    }
    if saved is not None:
        same = continues(case, saved, engine, forget, retain)
        result["resumed"] = all_ranks(same) if dist.is_initialized() else same
    close(engine)
    return result


def continues(case: Case, saved: tuple[Any, Any], engine: Any, forget: Any, retain: Any) -> bool:
    """Whether a new engine has exactly the weights of `engine` after the second half of the rounds."""
    fresh, method = build_engine(case, seed=1), OFMU(config(case))
    fresh.load_state_dict(saved[0])
    method.load_state_dict(saved[1])
    for number in range(case.rounds // 2, case.rounds):
        method.round(fresh, iter(forget[number]), iter(retain[number]))
    same = all(map(torch.equal, engine.shards.masters, fresh.shards.masters))
    same &= fresh.account == engine.account
    close(fresh)
    return same


def build_engine(case: Case, seed: int = 0) -> Any:
    from ofmu_ray.engines import DeepSpeedEngine, TorchEngine

    optimizer = OPTIMIZERS[case.optimizer]
    module = seeded_model(case.model, seed)
    if case.stage is None:
        return TorchEngine(module, inner=optimizer, outer=optimizer)
    return DeepSpeedEngine(module, inner=optimizer, outer=optimizer, zero_stage=case.stage)  # type: ignore[arg-type]


def close(engine: Any) -> None:
    if hasattr(engine, "close"):
        engine.close()
