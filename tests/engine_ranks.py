"""What two gloo ranks (or one) measure on a DeepSpeed engine, against the single-process engine on the global batch.

Started by `run_ranks`; rank 0 writes {case: {quantity: number}} for the tests to judge.
"""

from __future__ import annotations

import datetime
import math
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_models import freeze, tiny_model, token_batch

from ofmu_ray.config import LoraConfig, OptimizerConfig

Measure = Callable[[Any, int, int], dict[str, Any]]
INNER = OptimizerConfig(name="sgd", lr=0.05, clip=1.0, momentum=0.5)
OUTER = OptimizerConfig(name="adamw", lr=1e-3, clip=None, weight_decay=0.3, eps=1e-4)
SHARDED_FROM = 100
"""Elements of a tensor that stage 3 cuts: the models' matrices, not their norms. By default nothing so small is cut."""
LENGTHS = [[9, 12, 7, 10], [5, 30, 28, 16]]  # rows by rank: the ranks' token counts differ


@dataclass(frozen=True)
class Case:
    stage: int
    model: str = "llama"
    precision: str = "fp32"
    variant: str = "plain"
    offload: str = "none"

    def __str__(self) -> str:
        return f"{self.model}-{self.variant}-{self.precision}-zero{self.stage}-{self.offload}"


def build_module(case: Case) -> torch.nn.Module:
    from ofmu_ray.models.loading import add_lora

    module: Any = tiny_model(case.model, tie=case.variant == "tied")
    if case.variant == "frozen":
        freeze(module, r"layers\.0\.|embed")
    if case.variant == "lora":
        torch.manual_seed(1)
        module = add_lora(module, LoraConfig(rank=2))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:  # initially zero, which would hide half of the gradient
                    parameter.normal_(std=0.1)
        module.enable_input_require_grads()
    if case.variant in ("checkpointed", "lora"):
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return module.train()


def rank_main(rank: int, world: int, port: int, cases: list[Any], out: str, measure: Measure) -> None:
    from ofmu_ray.engines import deepspeed_engine

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    assert deepspeed_engine.PERSISTENT_BELOW > SHARDED_FROM
    deepspeed_engine.PERSISTENT_BELOW = SHARDED_FROM
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=datetime.timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    os.environ["LOCAL_RANK"] = str(rank)
    measured: dict[str, dict[str, Any]] = {}
    for case in cases:
        try:
            measured[str(case)] = measure(case, rank, world)
        except Exception:  # the other rank may be waiting in a collective: report the reason before it times out
            measured[str(case)] = {"error": traceback.format_exc()}
            torch.save(measured, f"{out}.rank{rank}")
            raise
    if rank == 0:
        torch.save(measured, out)
    dist.barrier()
    dist.destroy_process_group()


def measure(case: Case, rank: int, world: int) -> dict[str, Any]:
    from ofmu_ray.engines import Batch, DeepSpeedEngine, TorchEngine

    options: dict[str, Any] = {"inner": INNER, "outer": OUTER, "precision": case.precision, "offload": case.offload}
    options["decay_norms"] = case.variant == "tied"
    engine = DeepSpeedEngine(build_module(case), zero_stage=case.stage, **options)
    reference = TorchEngine(build_module(case), **options)
    mine = token_batch(LENGTHS[rank], seed=rank)
    global_batch = Batch([token_batch(LENGTHS[r], seed=r) for r in range(world)])
    halves = Batch([{k: v[i : i + 2] for k, v in mine.items()} for i in (0, 2)])

    results: dict[str, Any] = {}
    g, value = engine.gradient(mine)
    h, expected = reference.gradient(global_batch)
    results["loss"] = abs(value - expected) / expected
    results["gradient"] = difference(engine, g, reference, h)
    results["norm"] = abs(engine.parameters_norm() - reference.parameters_norm()) / reference.parameters_norm()
    results["dot"] = abs(engine.dot((g, g))[0] / reference.dot((h, h))[0] - 1)
    results["shard"] = sum(t.numel() for t in g) / engine.numel
    results["account"] = engine.account == reference.account
    results["trained"] = {str(parameter.dtype) for parameter in engine._trainable}
    results["frozen"] = {str(p.dtype) for p in engine.module.parameters() if not p.requires_grad}
    results["names"] = engine.trainable_names == reference.trainable_names

    g_parts, value_parts = engine.gradient(halves)
    results["accumulated"] = norm_of_difference(engine, g_parts, g)
    results["accumulated_loss"] = abs(value_parts - value) / value

    results.update(displacements(engine, reference, mine, global_batch, g, h))
    results["evaluated"] = evaluated(engine, reference, mine)
    results["weights"] = trajectories(engine, reference, mine, global_batch)
    results["resumed"] = resumed(engine, mine)
    results["refuses"] = all_ranks(refuses(engine, mine))
    engine.close()
    return results


def displacements(engine: Any, reference: Any, mine: Any, global_batch: Any, g: Any, h: Any) -> dict[str, Any]:
    start = [m.clone() for m in engine.shards.masters]
    with engine.displaced(g, 0.1), reference.displaced(h, 0.1):
        moved, value = engine.gradient(mine)
        expected, value_expected = reference.gradient(global_batch)
        with engine.displaced(moved, -0.2), reference.displaced(expected, -0.2):
            nested, expected_nested = engine.gradient(mine)[1], reference.gradient(global_batch)[1]
        back = engine.gradient(mine)[0]
    again, _ = engine.gradient(mine)
    return {
        "displaced": abs(value - value_expected) / value_expected,
        "nested": abs(nested - expected_nested) / expected_nested,
        "restored_nested": all_ranks(all(map(torch.equal, moved, back))),
        "restored": all_ranks(all(map(torch.equal, start, engine.shards.masters))),
        "gradient_again": all_ranks(all(map(torch.equal, g, again))),
    }


def trajectories(engine: Any, reference: Any, mine: Any, global_batch: Any) -> float:
    """Relative difference of the change of the weights over two inner and two outer steps."""
    before = reference.full_weights()
    for loop in ("inner", "outer", "inner", "outer"):
        engine.apply(engine.gradient(mine)[0], loop)
        reference.apply(reference.gradient(global_batch)[0], loop)
    weights, expected = engine.full_weights(), reference.full_weights()
    if weights is None:
        return math.nan
    assert set(weights) == set(expected)
    off = sum(float((weights[n].double() - expected[n].double()).square().sum()) for n in expected)
    moved = sum(float((before[n].double() - expected[n].double()).square().sum()) for n in expected)
    return math.sqrt(off / moved)


def evaluated(engine: Any, reference: Any, mine: Any) -> float:
    """Relative difference of a no-grad loss on this rank's rows; sharded weights are gathered for it."""
    from ofmu_ray.models.answers import causal_lm_loss

    (a,), (b,) = (
        e.evaluate(mine, lambda module, micro: float(causal_lm_loss(module, micro)[0])) for e in (engine, reference)
    )
    return abs(a - b) / b


def refuses(engine: Any, mine: Any) -> bool:
    """Whether a state with another layout and double backward are refused with a message for users."""
    from ofmu_ray.errors import UserError

    state = engine.state_dict()
    state["layout"] = {**state["layout"], "layout": "zero_stage 9"}
    for attempt in (lambda: engine.load_state_dict(state), lambda: engine.graph_gradient(mine, kind="forget")):
        try:
            attempt()
        except UserError as error:
            if "training." not in str(error):
                return False
        else:
            return False
    return not engine.offers_exact


def resumed(engine: Any, mine: Any) -> bool:
    """Whether steps after loading a state equal those after saving it, bit for bit, on every rank."""

    def steps() -> list[torch.Tensor]:
        for loop in ("inner", "outer"):
            engine.apply(engine.gradient(mine)[0], loop)
        return [m.clone() for m in engine.shards.masters]

    saved = engine.state_dict()
    first = steps()
    engine.load_state_dict(saved)
    return all_ranks(all(map(torch.equal, first, steps())))


def difference(engine: Any, g: Any, reference: Any, h: Any) -> float:
    """Relative difference of two engines' vectors, read from the weights under a displacement much larger than they."""
    far = 1.0e3 if engine.precision == "bf16" else 1.0e4  # bf16 rounds the weights to 2^-9: a coarse comparison
    with engine.displaced(g, far), reference.displaced(h, far):
        a, b = engine.full_weights(), reference.full_weights()
    if a is None:
        return math.nan
    off = sum(float((a[n].double() - b[n].double()).square().sum()) for n in b)
    size = sum(float(b[n].double().square().sum()) for n in b)
    return math.sqrt(off / size)


def norm_of_difference(engine: Any, a: Any, b: Any) -> float:
    d = [x - y for x, y in zip(a, b, strict=True)]
    dd, bb = engine.dot((d, d), (b, b))
    return math.sqrt(dd / bb)


def all_ranks(flag: bool) -> bool:
    total = torch.tensor(float(flag))
    dist.all_reduce(total, op=dist.ReduceOp.MIN)
    return bool(total)


def run_ranks(world: int, cases: list[Any], folder: Path, measure: Measure | None = None) -> dict[str, dict[str, Any]]:
    """`measure(case, rank, world)` (by default this module's) for each case on `world` processes; rank 0's results."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folder / f"measured{world}.pt"
    arguments = (world, port, cases, str(out), measure or globals()["measure"])
    # forked from a process that has already imported what they need
    multiprocessing.set_forkserver_preload(["rank_imports"])
    torch.multiprocessing.start_processes(rank_main, arguments, world, start_method="forkserver")
    return torch.load(out)  # type: ignore[no-any-return]
