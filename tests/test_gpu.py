"""CUDA against the CPU. Every comparison is a function of the device: the same code runs once on the CPU, so that a
mistake in a test shows where there is no GPU. `benchmarks/gpu.py` collects what the tests record.

fp32 and export have to agree closely; bf16 is compared with fp32 on the CPU, at the error that bf16 has there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from engine_models import tiny_model, token_batch
from engine_ranks import difference, trajectories

from ofmu_ray.algorithm.curvature import Exact, FiniteDifference
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import EvaluationConfig, ExportConfig, FormatConfig, ModelConfig, OptimizerConfig
from ofmu_ray.engines import Batch, DeepSpeedEngine, TorchEngine
from ofmu_ray.models.answers import causal_lm_loss
from ofmu_ray.models.loading import load_causal_lm, pretrained
from ofmu_ray.tasks import loaded, task_named

Record = Callable[[str, object], None]


class Place(NamedTuple):
    device: str
    backend: str

    def __str__(self) -> str:
        return self.device


HAS_GPU = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.system, pytest.mark.skipif(not HAS_GPU, reason="torch finds no CUDA device")]
PLACES = [
    # other tests hold this of the CPU: here it only keeps the tests themselves free of mistakes
    pytest.param(Place("cpu", "gloo"), marks=[pytest.mark.system, pytest.mark.full], id="cpu"),
    pytest.param(Place("cuda", "nccl"), marks=GPU, id="cuda"),
]
INNER = OptimizerConfig(name="sgd", lr=0.05, clip=1.0, momentum=0.5)
OUTER = OptimizerConfig(name="adamw", lr=1e-3, clip=None, weight_decay=0.01, eps=1e-4)
TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 6e-2, "bf16_autocast": 6e-2}
"""Relative difference of a gradient from fp32 on the CPU."""
PRECISIONS = {
    "fp32": {"fp32": 5},
    "tf32": {"tf32": 4, "fp32": 1},
    "bf16": {"bf16": 5},
    "bf16_autocast": {"bf16": 4, "fp32": 1},
}
"""Passes of the engines' comparison by what they run in: the displaced one is fp32 unless the weights are not."""
everywhere = pytest.mark.parametrize("place", PLACES)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Callable[[Place], None]]:
    """Starts a process group of one rank on the place's backend. DeepSpeed keeps the first group of a process."""
    stores = []

    def start(place: Place) -> None:
        if place.device == "cpu" and HAS_GPU:
            pytest.skip("DeepSpeed keeps one kind of device per process: here it is CUDA")
        if not dist.is_initialized():
            stores.append(dist.TCPStore("127.0.0.1", 0, 1, True))
            dist.init_process_group(place.backend, store=stores[0], rank=0, world_size=1)

    yield start
    if stores:
        dist.destroy_process_group()


@pytest.fixture
def group(place: Place, one_rank: Callable[[Place], None]) -> None:
    one_rank(place)


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    return token_batch([9, 12, 7, 30], seed=seed)


def torch_engine(device: str, **options: Any) -> TorchEngine:
    return TorchEngine(tiny_model().train().to(device), inner=INNER, outer=OUTER, **options)


def zero_engine(place: Place, stage: Any, **options: Any) -> DeepSpeedEngine:
    module = tiny_model().train().to(place.device)
    return DeepSpeedEngine(module, inner=INNER, outer=OUTER, zero_stage=stage, micro_batch_size=4, **options)


def flat(vector: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.detach().double().cpu() for part in vector])


def off(value: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return float((flat(value) - flat(expected)).norm() / flat(expected).norm())


def sums(module: torch.nn.Module, micro: Any) -> float:
    return float(causal_lm_loss(module, micro)[0])


@everywhere
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "bf16_autocast"])
def test_torch_engine_agrees(place: Place, precision: Any, record_property: Record) -> None:
    engine, expected = torch_engine(place.device, precision=precision), torch_engine("cpu")
    assert engine.device.type == place.device
    halves = Batch([{name: value[at : at + 2] for name, value in batch().items()} for at in (0, 2)])
    g, loss = engine.gradient(halves)
    h, right = expected.gradient(batch())
    found = {"gradient": off(g, h), "loss": abs(loss / right - 1)}
    (here,), (there,) = (one.evaluate(batch(), sums) for one in (engine, expected))
    found["evaluated"] = abs(here / there - 1)
    before = engine.state_dict()["masters"]
    with engine.displaced(g, 0.1), expected.displaced(h, 0.1):
        found["displaced"] = off(engine.gradient(batch(1))[0], expected.gradient(batch(1))[0])
    assert all(map(torch.equal, before, engine.state_dict()["masters"])), "theta is not restored to the bit"
    for loop in ("inner", "outer", "inner"):
        for one in (engine, expected):
            one.apply(one.gradient(batch(2))[0], loop)
    found["weights"] = off(engine.weights(), expected.weights())
    for name, value in found.items():
        record_property(name, f"{value:.2e}")
    assert max(found.values()) < TOLERANCE[precision], found
    assert engine.account == replace(expected.account, precisions=PRECISIONS[precision])


@everywhere
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16_autocast"])
def test_differences_are_taken_in_fp32(place: Place, precision: Any, record_property: Record) -> None:
    """Also where the process allows TF32 everywhere; against double backward in float64 on the CPU."""
    exact = TorchEngine(tiny_model().double())
    g, _ = exact.gradient(batch())
    norm = exact.dot((g, g))[0] ** 0.5
    expected = Exact(exact, "cosine").hessian_vector(batch(), "forget", g, g, norm)
    engine = torch_engine(place.device, precision=precision)
    torch.set_float32_matmul_precision("high")
    try:
        allowed, _ = engine.gradient(batch(), differenced=True)
        curvature = FiniteDifference(engine, "central", 3e-4)
        product = curvature.hessian_vector(batch(), "forget", allowed, list(allowed), norm)
    finally:
        torch.set_float32_matmul_precision("highest")
    error = off(product, expected)
    record_property("product", f"{error:.2e}")
    record_property("gradient", f"{off(allowed, g):.2e}")
    assert error < 1e-2
    assert off(allowed, g) < 1e-4


@everywhere
@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        (0, "fp32", "none"), (1, "fp32", "none"), (2, "fp32", "none"), (3, "fp32", "none"), (0, "bf16", "none"),
        (2, "bf16", "none"), (3, "bf16", "none"), (3, "bf16_autocast", "none"), (2, "fp32", "optimizer"),
    ],
)  # fmt: skip
def test_zero_agrees(
    place: Place, stage: int, precision: Any, offload: str, group: None, record_property: Record
) -> None:
    engine = zero_engine(place, stage, precision=precision, offload=offload)
    expected = torch_engine("cpu")
    g, loss = engine.gradient(batch())
    h, right = expected.gradient(batch())
    found = {"loss": abs(loss / right - 1), "dot": abs(engine.dot((g, g))[0] / expected.dot((h, h))[0] - 1)}
    if precision != "bf16":  # read from weights, which bf16 would round
        found["gradient"] = difference(engine, g, expected, h)
        found["weights"] = trajectories(engine, expected, batch(), batch())
    for name, value in found.items():
        record_property(name, f"{value:.2e}")
    engine.close()
    assert max(found.values()) < TOLERANCE[precision], found


@everywhere
def test_offloaded_moments_lie_in_host_memory_and_change_nothing(place: Place) -> None:
    here, there = (torch_engine(place.device, offload=offload) for offload in ("none", "optimizer"))
    for one in (here, there):
        for loop in ("inner", "outer", "outer"):
            one.apply(one.gradient(batch())[0], loop)
    devices = {
        value.device.type
        for optimizer in there._optimizers.values()
        for state in optimizer._optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    }
    assert devices == {"cpu"}
    assert torch.equal(here.weights()[0], there.weights()[0])
    kept, moved = (one.first_moment("outer") for one in (here, there))
    assert kept is not None
    assert moved is not None
    assert torch.equal(kept[0], moved[0])
    saved = [one.state_dict()["optimizers"]["outer"]["state"][0]["exp_avg_sq"] for one in (here, there)]
    assert torch.equal(*saved)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Kernels that give the same bits each time; some backward passes on CUDA do not otherwise."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@everywhere
@pytest.mark.parametrize("stage", [None, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_continues_to_the_bit(
    place: Place, stage: int | None, precision: Any, group: None, deterministic: None, tmp_path: Path
) -> None:
    def fresh() -> Any:
        if stage is None:
            return torch_engine(place.device, precision=precision)
        return zero_engine(place, stage, precision=precision)

    def steps(engine: Any) -> torch.Tensor:
        for loop in ("inner", "outer"):
            engine.apply(engine.gradient(batch())[0], loop)
        return torch.cat([master.detach().cpu() for master in engine.shards.masters])

    engine = fresh()
    steps(engine)
    torch.save(engine.state_dict(), tmp_path / "rank.pt")
    expected = steps(engine)
    resumed = fresh()
    resumed.load_state_dict(torch.load(tmp_path / "rank.pt", map_location="cpu", weights_only=True, mmap=True))
    assert torch.equal(steps(resumed), expected)


@everywhere
@pytest.mark.parametrize("stage", [None, 3])
def test_weights_go_from_file_to_device_to_file_unchanged(
    place: Place, stage: int | None, group: None, tmp_path: Path
) -> None:
    from ofmu_ray.models.exporting import export_causal_lm
    from ofmu_ray.storage import new_folder

    config, task = ModelConfig(), task_named("causal_lm")
    module, processor, unread, notes = loaded(task, config)
    assert unread is not None, notes
    unread.place(module, torch.device(place.device))
    if stage is None:
        engine: Any = TorchEngine(module, unread=unread)
    else:
        engine = DeepSpeedEngine(module, unread=unread, zero_stage=3, micro_batch_size=4)
    assert engine.device.type == place.device
    with new_folder(str(tmp_path / "model")) as folder:
        export_causal_lm(module, processor, engine.readable_weights(), folder, config, ExportConfig())
    before, after = (
        pretrained(path, dtype="auto").state_dict()  # tied weights may be stored under either name
        for path in (resolve_builtin(config.path), str(tmp_path / "model"))
    )
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@everywhere
def test_evaluation_agrees(place: Place, record_property: Record) -> None:
    from ofmu_ray.evaluation.runner import evaluate_live

    folder = Path(resolve_builtin("builtin:people/forget.jsonl")).parent
    sets = {}
    for name in ("forget", "world_facts"):
        lines = (folder / f"{name}_perturbed.jsonl").read_text().splitlines()[:12]
        sets[name] = [json.loads(line) for line in lines]
    tables = []
    for device in (place.device, "cpu"):
        module, tokenizer = load_causal_lm(ModelConfig())
        config = EvaluationConfig(max_new_tokens=12, batch_size=8)
        tables.append(
            evaluate_live(module.to(device), tokenizer, sets, FormatConfig(), config, label=device, reveal_text=True)
        )
    here, there = tables
    for name in ("answer_nll", "paraphrase_nll", "truth_ratio", "probability"):
        pairs = zip(here[name].to_pylist(), there[name].to_pylist(), strict=True)
        worst = max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs if b is not None)
        record_property(name, f"{worst:.2e}")
        assert worst < 2e-3, name
    same = [a == b for a, b in zip(here["generated"].to_pylist(), there["generated"].to_pylist(), strict=True)]
    record_property("generations", f"{sum(same)}/{len(same)}")
    assert sum(same) >= 0.9 * len(same)


@everywhere
def test_a_run_in_this_process(place: Place, tmp_path: Path, record_property: Record) -> None:
    from pipelines import cli

    words = ["--storage", str(tmp_path), "--name", "short", "--training.rounds", "3", "--training.batch_size", "8"]
    words += ["--training.gpus_per_worker", str(int(place.device == "cuda")), "--ofmu.preset", "lite"]
    words += ["--evaluation.max_rows", "8", "--evaluation.max_new_tokens", "8", "--tracking.system_metrics", "false"]
    assert cli.main(["unlearn", *words]) == 0
    metrics = json.loads((tmp_path / "short/metrics.json").read_text())
    training = json.loads((tmp_path / "short/training.json").read_text())
    record_property("round_seconds", f"{training['train_seconds'] / 3:.3f}")
    record_property("peak_memory_bytes", training["peak_memory_bytes"])
    assert training["status"] == "finished"
    assert metrics["after"]
    if place.device == "cuda":
        assert 10**6 < training["peak_memory_bytes"] < 10**9, "peak memory is not the device's"
