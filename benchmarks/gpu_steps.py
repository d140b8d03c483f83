"""What `benchmarks/gpu.py` measures: updates of methods on Llama shapes, an evaluation; what `ofmu plan` predicts.

Every function returns plain values; `save` stores unfinished ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_cells import OPTIMIZER, ROWS, SHAPES, TOKENS, Cell, methods
from benchmarks.gpu_device import Save, failure, finish, free, seconds_of
from benchmarks.step import account_of
from ofmu_ray.algorithm.space import add_
from ofmu_ray.config import FormatConfig, ModelConfig, TrainingConfig
from ofmu_ray.engines import Batch, DeepSpeedEngine, TorchEngine
from ofmu_ray.methods import build_method
from ofmu_ray.methods.protocol import run_round
from ofmu_ray.models.loading import empty_model

ROOT = Path(__file__).resolve().parent.parent
TIMED_SECONDS = 3.0
"""Rounds of a method are repeated for about this long, at most `REPEATS` times."""
REPEATS = 5
TOFU = {"forget": 400, "retain": 400, "real_authors": 100, "world_facts": 117}
"""Rows of an evaluation on forget10."""


def measure_cell(cell: Cell, device: torch.device, rate: float | None, smoke: bool, save: Save) -> dict[str, Any]:
    """Bare passes and updates of every method; `rate`: measured FLOP/s of bf16 products, for MFU."""
    engine = engine_of(cell, device)
    tokens = (8, 6) if smoke else TOKENS
    found: dict[str, Any] = {"parameters": engine.numel, "rows": ROWS, "tokens": list(tokens), "rate": rate}
    found["at_rest_bytes"] = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    found["passes"], found["methods"] = {}, {}
    batches = {length: batch_of(cell, length) for length in tokens}
    attempts: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
        ("passes", str(length), lambda length=length: passes(engine, batches[length], rate))  # type: ignore[misc]
        for length in tokens
    ]
    attempts += [
        ("methods", name, lambda config=config: updates(engine, config, batches[tokens[0]], rate))  # type: ignore[misc]
        for name, config in methods().items()
    ]
    if cell.engine == "torch" and not cell.checkpointing:
        attempts.append(("profile", "a pass", lambda: profile(engine, batches[tokens[0]], smoke)))
    try:
        for group, name, attempt in attempts:
            try:
                found.setdefault(group, {})[name] = attempt()
            except Exception as error:
                found.setdefault(group, {})[name] = failure(error, device)
            free(device)
            save(found)
    finally:
        if cell.engine != "torch":
            engine.close()
    return found


def engine_of(cell: Cell, device: torch.device) -> Any:
    torch.manual_seed(0)
    module = empty_model(cell.llama, cell.model, device=str(device))
    options: dict[str, Any] = {"inner": OPTIMIZER, "outer": OPTIMIZER, "precision": cell.precision}
    if cell.engine == "torch":
        return TorchEngine(module, **options)
    if not dist.is_initialized():
        store = dist.TCPStore("127.0.0.1", 0, 1, True)  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    stage: Any = int(cell.engine.removeprefix("zero"))
    return DeepSpeedEngine(module, zero_stage=stage, micro_batch_size=ROWS, **options)


def batch_of(cell: Cell, tokens: int) -> Batch:
    """One micro-batch of `ROWS` rows; a third of a row is its prompt, the first row has some padding."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(1, SHAPES[cell.shape]["vocab_size"], (ROWS, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, : tokens // 3] = -100
    nll = torch.full((ROWS,), 8.0 * tokens, dtype=torch.float64)  # of a reference model, for NPO
    return Batch([{"input_ids": ids, "attention_mask": mask, "labels": labels, "reference_nll": nll}])


def passes(engine: Any, batch: Batch, rate: float | None) -> dict[str, Any]:
    """Bare gradient passes, plain and as they enter a difference; whether a pass repeats to the bit."""
    found: dict[str, Any] = {}
    for name, exact in (("plain", False), ("differenced", True)):

        def action(exact: bool = exact) -> Any:
            return engine.gradient(batch, differenced=exact)

        spent = account_of(engine, action)
        free_peak(engine.device)
        times = repeated(engine.device, action)
        seconds = median(times)
        found[name] = {
            "seconds": seconds,
            "repeats": len(times),
            "tokens_per_second": spent["tokens"] / seconds,
            "flops_per_second": spent["flops"] / seconds,
            "mfu": spent["flops"] / seconds / rate if rate else None,
            "peak_bytes": peak(engine.device),
        }
        with suppress(torch.OutOfMemoryError):  # two vectors at once
            found[name]["noise"] = noise(engine, action)
    return found


def noise(engine: Any, action: Callable[[], Any]) -> float:
    """Relative difference of a gradient from the same gradient; 0: equal to the bit."""
    first, second = action()[0], action()[0]
    add_(second, first, -1.0)
    off, size = engine.dot((second, second), (first, first))
    return float((off / size) ** 0.5)


def updates(engine: Any, config: Any, batch: Batch, rate: float | None) -> dict[str, Any]:
    """Rounds of a method, of which the first allocates the moments: cost, seconds and peak memory of an update."""
    method = build_method(config, 1000)
    method.start(engine)
    counts = method.batches_per_round()
    values: dict[str, float] = {}

    def one_round() -> None:
        values.update(run_round(method, engine, {name: [batch] * count for name, count in counts.items() if count}))

    started = time.perf_counter()
    spent = account_of(engine, one_round)
    first = time.perf_counter() - started
    free_peak(engine.device)
    with PassClock(engine) as clock:
        times = repeated(engine.device, one_round)
    seconds, inside = median(times), clock.seconds() / len(times)
    gradient_passes = spent["forget"] + spent["retain"]
    return {
        "forget_passes": spent["forget"],
        "retain_passes": spent["retain"],
        "differenced_passes": clock.differenced / len(times),
        "updates": spent["updates"],
        "passes_per_update": gradient_passes / spent["updates"],
        "first_round_seconds": first,
        "rounds": len(times),
        "round_seconds": seconds,
        "seconds_per_update": seconds / spent["updates"],
        "tokens_per_second": spent["tokens"] / seconds,
        "mfu": spent["flops"] / seconds / rate if rate else None,
        "mfu_in_passes": spent["flops"] / inside / rate if rate and inside else None,
        "outside_passes": 1 - inside / (sum(times) / len(times)),
        "peak_bytes": peak(engine.device),
        "reserved_bytes": torch.cuda.max_memory_reserved(engine.device) if engine.device.type == "cuda" else None,
        "losses": {name: value for name, value in values.items() if name.endswith("loss")},
    }


def repeated(device: torch.device, action: Callable[[], Any]) -> list[float]:
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < TIMED_SECONDS:
        times.append(seconds_of(device, action))
    return times


def free_peak(device: torch.device) -> None:
    if device.type == "cuda":
        free(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


class PassClock:
    """Time that the device's stream spends in an engine's passes, while the context is open."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.differenced = engine, 0
        self._marks: list[tuple[Any, Any]] = []

    def __enter__(self) -> PassClock:
        original = self.engine.gradient

        def gradient(*arguments: Any, **options: Any) -> Any:
            self.differenced += bool(options.get("differenced") or self.engine._displacements)
            begin = self._mark()
            result = original(*arguments, **options)
            self._marks.append((begin, self._mark()))
            return result

        self.engine.gradient = gradient
        return self

    def __exit__(self, *_: object) -> None:
        del self.engine.gradient  # the class's again

    def _mark(self) -> Any:
        if self.engine.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        finish(self.engine.device)
        if self.engine.device.type != "cuda":
            return sum(end - begin for begin, end in self._marks)
        return sum(begin.elapsed_time(end) for begin, end in self._marks) / 1e3


def profile(engine: Any, batch: Batch, smoke: bool) -> dict[str, Any]:
    """One pass by kernel: what to speed up, and how long the device waits for the host."""
    from torch.profiler import ProfilerActivity

    cuda = engine.device.type == "cuda"
    engine.gradient(batch)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        seconds = seconds_of(engine.device, lambda: engine.gradient(batch))
    rows = profiled.key_averages()
    kernels = [(row.key, row.self_device_time_total if cuda else row.self_cpu_time_total, row.count) for row in rows]
    kernels.sort(key=lambda row: -row[1])
    busy = sum(microseconds for _, microseconds, _ in kernels) / 1e6
    return {
        "seconds": seconds,
        "busy_seconds": busy,
        "kernels": sum(count for *_, count in kernels),
        "longest": [
            {"name": name[:120], "seconds": microseconds / 1e6, "count": count}
            for name, microseconds, count in kernels[: 3 if smoke else 25]
        ],
    }


# ------------------------------------------------------------------------------------------------------- evaluation


def evaluation(device: torch.device, smoke: bool, save: Save) -> dict[str, Any]:
    """A whole TOFU evaluation (forget10) of a model with random weights: its generations never end early."""
    from ofmu_ray.config import EvaluationConfig
    from ofmu_ray.evaluation.runner import evaluate_live
    from ofmu_ray.models.loading import load_tokenizer

    cell = Cell("tiny" if smoke else "135m", "bf16" if device.type == "cuda" else "fp32")
    torch.manual_seed(0)
    module = empty_model(cell.llama, cell.model, device=str(device)).eval()
    sets, source = evaluation_rows(smoke)
    found: dict[str, Any] = {"shape": cell.shape, "rows": {name: len(rows) for name, rows in sets.items()}}
    found |= {"source": source, "times": []}
    tokenizer = load_tokenizer(ModelConfig())
    for new in (0, 8 if smoke else 200):
        config = EvaluationConfig(max_new_tokens=new)
        started = time.perf_counter()
        table = evaluate_live(module, tokenizer, sets, FormatConfig(), config, label="random")
        finish(device)
        seconds = time.perf_counter() - started
        generated = sum(value or 0 for value in table["generated_tokens"].to_pylist())
        found["times"].append({"max_new_tokens": new, "seconds": seconds, "generated_tokens": generated})
        save(found)
    return found


def evaluation_rows(smoke: bool) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """TOFU's rows if they lie beside the checkout, else the built-in ones, repeated to as many."""
    from ofmu_ray.assets import resolve_builtin

    tofu, built_in = ROOT.parent / "shared/data/tofu", Path(resolve_builtin("builtin:people/forget.jsonl")).parent
    places = {name: tofu / f"{'forget10' if name == 'forget' else name}_perturbed.json" for name in TOFU}
    own = not all(path.is_file() for path in places.values())
    if own:
        places = {name: built_in / f"{name}_perturbed.jsonl" for name in TOFU}
    sets = {}
    for name, path in places.items():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        sets[name] = list(itertools.islice(itertools.cycle(rows), 4 if smoke else TOFU[name]))
    return sets, "built-in people, repeated" if own else "TOFU"


# -------------------------------------------------------------------------------------------------------------- plan


def predictions(chosen: list[Cell], device_name: str, smoke: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(cell, what `ofmu plan` predicts for each method). Needs no GPU: models are traced on the meta device."""
    from ofmu_ray.planning.cost import GPUS, LINKS
    from ofmu_ray.planning.setup import Planner, Rows

    tokens = 8 if smoke else TOKENS[0]
    length = Rows(tokens, float(tokens), tokens // 3)
    gpu = next((gpu for name, gpu in GPUS.items() if name.split("-")[0] in device_name), GPUS["H100-80GB"])
    for cell in chosen:
        found: dict[str, Any] = {}
        single = cell.engine == "torch"
        layout: dict[str, Any] = {} if single else {"zero_stage": int(cell.engine.removeprefix("zero"))}
        training = TrainingConfig(batch_size=ROWS, engine="torch" if single else "deepspeed", **layout)
        for name, config in methods().items():
            try:
                rows = {"forget": length, "retain": length}
                planner = Planner(cell.llama, cell.model, config, training, rows, "cuda")
                estimate = planner.estimate(planner.given())
                seconds = estimate.time(gpu.device(cell.precision, 0.4), LINKS["nvlink"])
                found[name] = {
                    "peak_bytes": estimate.peak.bytes,
                    "components": {part: size for part, size in estimate.peak.components.items() if size},
                    "passes": dict(estimate.passes),
                    "seconds": dataclasses.asdict(seconds) | {"total": seconds.total},
                }
            except Exception as error:
                found[name] = failure(error, torch.device("cpu"))
        yield cell.name, found
