"""Rounds of a baseline on one engine, alone or as a rank of a gloo group: what tests/test_methods.py compares."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from engine_ranks import all_ranks
from invariant_ranks import close, seeded_model, shard_of

from ofmu_ray import config
from ofmu_ray.engines import Batch
from ofmu_ray.methods import build_method
from ofmu_ray.models.answers import answers

ROUNDS = 3
ADAMW = config.OptimizerConfig(name="adamw", lr=2e-3, clip=1.0, eps=1e-3, weight_decay=0.05)
UNDECAYED = replace(ADAMW, weight_decay=0.0)
MOMENTUM = config.OptimizerConfig(name="sgd", lr=0.05, clip=1.0, momentum=0.5, decay="linear")
OPTIONS: dict[str, config.MethodConfig] = {
    "gradient_ascent": config.METHODS["gradient_ascent"](optimizer=ADAMW),
    "grad_diff": config.METHODS["grad_diff"](optimizer=ADAMW, forget_weight=0.5, retain_weight=2.0),
    "grad_diff-kl": config.METHODS["grad_diff"](optimizer=ADAMW, retain_loss="kl"),
    "grad_diff-no_retain": config.METHODS["grad_diff"](optimizer=MOMENTUM, retain_weight=0.0, retain_loss="kl"),
    "simnpo": config.METHODS["simnpo"](optimizer=ADAMW, delta=0.3),
    "wga": config.METHODS["wga"](optimizer=ADAMW, beta=0.7),
    "satimp": config.METHODS["satimp"](optimizer=MOMENTUM, forget_weight=1.0, beta1=0.5),
    "ceu": config.METHODS["ceu"](optimizer=ADAMW),
    "pdu": config.METHODS["pdu"](optimizer=ADAMW, tolerance=0.0, warmup_rounds=1, dual_rate=5.0),
    "task_arithmetic": config.METHODS["task_arithmetic"](optimizer=UNDECAYED, scale=0.7),
    "task_arithmetic-sgd": config.METHODS["task_arithmetic"](optimizer=MOMENTUM, scale=2.0),
    "retain_finetune": config.METHODS["retain_finetune"](optimizer=ADAMW),
    "blur": config.METHODS["blur"](optimizer=ADAMW),
    "dualoptim": config.METHODS["dualoptim"](optimizer=ADAMW, forget_lr_ratio=0.5, retain_steps=2, base_beta1=0.8),
    "dualoptim-apart": config.METHODS["dualoptim"](
        optimizer=ADAMW, retain_steps=2, shared_base=False, forget_loss="npo"
    ),
    "influence": config.METHODS["influence"](alpha=2.0, damping=0.2, gradients=2, forget_share=0.5),
    "blur-nll": config.METHODS["blur"](optimizer=ADAMW, forget_loss="nll", forget_weight=0.3),
}
"""Variant -> options: small models need larger learning rates than the defaults."""


@dataclass(frozen=True)
class Case:
    variant: str
    stage: int | None = None
    """None: TorchEngine."""
    micro: int | None = None
    """Rows per micro-batch; None: all of the rank's share."""
    resume: bool = False
    """Also continue in a new engine from the state after the first round."""

    def __str__(self) -> str:
        engine = "torch" if self.stage is None else f"zero{self.stage}"
        return f"{self.variant}-{engine}{f'-micro{self.micro}' if self.micro else ''}{'-resume' if self.resume else ''}"


def batches(
    variant: str, world: int, rank: int, micro: int | None, dtype: torch.dtype = torch.float32
) -> list[dict[str, list[Batch]]]:
    """This rank's batches for each round, with the reference model's values for their rows."""
    counts = build_method(OPTIONS[variant]).batches_per_round()
    untouched = seeded_model("llama").to(dtype)
    shards = {s: shard_of(s, counts[s], ROUNDS, world, rank, micro) if counts[s] else [[]] * ROUNDS for s in counts}
    return [{s: [known(batch, untouched) for batch in shards[s][at]] for s in shards} for at in range(ROUNDS)]


def known(batch: Batch, untouched: torch.nn.Module) -> Batch:
    """The batch with the columns that the sidecar adds."""
    return Batch([{**micro, **reference(untouched, micro)} for micro in batch.micro])


@torch.no_grad()
def reference(untouched: torch.nn.Module, micro: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    logits_tv, labels_t, rows_t, rows = answers(untouched, micro)
    logprobs_tv = logits_tv.log_softmax(1)
    nll_t = -logprobs_tv[torch.arange(len(labels_t)), labels_t]
    nll_r = torch.stack([nll_t[rows_t == row].sum() for row in range(rows)])
    return {"reference_nll": nll_r, "reference_logprobs": logprobs_tv}


def build_engine(case: Case, module: torch.nn.Module) -> Any:
    from ofmu_ray.engines import DeepSpeedEngine, TorchEngine

    inner, outer = OPTIONS[case.variant].optimizers
    if case.stage is None:
        return TorchEngine(module, inner=inner, outer=outer)
    return DeepSpeedEngine(module, inner=inner, outer=outer, zero_stage=case.stage)  # type: ignore[arg-type]


def started(case: Case) -> tuple[Any, Any]:
    """Engine and method on the reference model."""
    engine, method = build_engine(case, seeded_model("llama")), build_method(OPTIONS[case.variant], ROUNDS)
    method.start(engine)
    return engine, method


def run(method: Any, engine: Any, rounds: list[dict[str, list[Batch]]]) -> Iterator[dict[str, float]]:
    for streams in rounds:
        yield method.round(engine, iter(streams["forget"]), iter(streams["retain"]))


def trajectory(case: Case, rank: int, world: int) -> dict[str, Any]:
    """Run the case's rounds. Only rank 0 has the full weights."""
    rounds = batches(case.variant, world, rank, case.micro)
    engine, method = started(case)
    start = engine.full_weights()
    metrics = list(run(method, engine, rounds[:1]))
    saved = copy.deepcopy((engine.state_dict(), method.state_dict()))
    metrics += run(method, engine, rounds[1:])
    result = {
        "start": start,
        "weights": engine.full_weights(),
        "figures": metrics,
        "account": engine.account.state(),
        "states": [method.state_dict()],
    }
    if case.resume:
        again, method = started(case)
        again.load_state_dict(saved[0])
        method.load_state_dict(saved[1])
        list(run(method, again, rounds[1:]))
        same = all(map(torch.equal, engine.shards.masters, again.shards.masters))
        result["resumed"] = all_ranks(same) if dist.is_initialized() else same
        close(again)
    if dist.is_initialized():
        result["states"] = [None] * world
        dist.all_gather_object(result["states"], method.state_dict())
    close(engine)
    return result
