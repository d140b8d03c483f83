"""What an update costs: OFMU's three presets against gradient ascent and GradDiff, on the same engine in one run.

    OMP_NUM_THREADS=1 python benchmarks/step.py [--repeats 5] [--rows 8] [--out benchmarks/step.json] [--smoke]

Measures gradient passes, seconds, tokens per second and peak memory per update, and what a round costs beyond its
passes. Every repeat times all methods and bare gradient passes in turn, on one forget and one retain batch; results are
medians over the repeats. benchmarks/README.md explains them; `--smoke` is for the tests.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ofmu_ray.algorithm.space import combine, scale_
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import FormatConfig, ModelConfig, OptimizerConfig
from ofmu_ray.data.batches import collate
from ofmu_ray.data.template import Template
from ofmu_ray.engines import Batch, DeepSpeedEngine, TorchEngine
from ofmu_ray.methods.ofmu import OFMU, OFMUConfig
from ofmu_ray.models.loading import load_causal_lm, load_tokenizer

UPDATES = 6
"""Updates per round: T = 5 inner steps and one outer step, or six steps of a baseline."""
OPTIMIZER = OptimizerConfig(name="adamw", lr=1e-6)
BUILTIN = "builtin:people/target"
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEN_MILLION = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 6}


class GradientAscent:
    """theta <- theta + eta grad L_f."""

    def round(self, engine: Any, forget: list[Batch], retain: list[Batch]) -> None:
        for _ in range(UPDATES):
            gradient, _ = engine.gradient(forget[0], kind="forget")
            engine.apply(scale_(gradient, -1.0), "inner")


class GradDiff:
    """theta <- theta - eta grad (L_r - L_f)."""

    def round(self, engine: Any, forget: list[Batch], retain: list[Batch]) -> None:
        for _ in range(UPDATES):
            g_f, _ = engine.gradient(forget[0], kind="forget")
            g_r, _ = engine.gradient(retain[0], kind="retain")
            engine.apply(combine(1.0, g_r, -1.0, g_f, out=g_r), "inner")


def methods() -> dict[str, Any]:
    return {
        "gradient ascent": GradientAscent(),
        "GradDiff": GradDiff(),
        "OFMU full": OFMU(OFMUConfig.from_preset("full", relative_step=1e-4)),
        "OFMU lite": OFMU(OFMUConfig.from_preset("lite", relative_step=1e-4)),
        # a level that no token reaches, so that no step is skipped
        "OFMU first_order": OFMU(OFMUConfig.from_preset("first_order", inner_steps=3, outer_steps=3, forget_level=1e3)),
    }


# ------------------------------------------------------------------------------------------- models, batches, engines


def build_model(name: str) -> torch.nn.Module:
    if name == BUILTIN:
        return load_causal_lm(ModelConfig(path=BUILTIN))[0]
    import transformers

    torch.manual_seed(0)
    shape = TINY if name == "llama-tiny" else TEN_MILLION
    config = transformers.LlamaConfig(vocab_size=1024, max_position_embeddings=256, **shape)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-any-return]


def batch_of(stream: str, rows: int, joined: int) -> Batch:
    """One micro-batch of `rows` rows of the built-in corpus; a row is `joined` questions, then their answers."""
    lines = Path(resolve_builtin(f"builtin:people/{stream}.jsonl")).read_text().splitlines()
    if rows * joined > len(lines):
        raise SystemExit(f"--rows {rows} x --joined {joined}: the built-in {stream} set has {len(lines)} rows")
    single = [json.loads(line) for line in lines[: rows * joined]]
    pairs = [{c: " ".join(p[c] for p in single[i::rows]) for c in ("question", "answer")} for i in range(rows)]
    tokenizer = load_tokenizer(ModelConfig(path=BUILTIN))
    encoded = Template(tokenizer, FormatConfig()).encode_rows(*([p[c] for p in pairs] for c in ("question", "answer")))
    return Batch([collate([row._asdict() for row in encoded], tokenizer.pad_token_id)])


def build_engine(name: str, module: torch.nn.Module, rows: int) -> Any:
    if name == "torch":
        return TorchEngine(module, inner=OPTIMIZER, outer=OPTIMIZER)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return DeepSpeedEngine(module, inner=OPTIMIZER, outer=OPTIMIZER, zero_stage=2, micro_batch_size=rows)


# --------------------------------------------------------------------------------------------------------- measuring


def measure(engine: Any, rows: int, joined: int, repeats: int, only: Sequence[str]) -> dict[str, Any]:
    """Results of gradient ascent and the methods `only` on one engine."""
    compared = {name: method for name, method in methods().items() if name == "gradient ascent" or name in only}
    forget, retain = [batch_of("forget", rows, joined)], [batch_of("retain", rows, joined)]

    def passes(kind: str, batch: Batch) -> Callable[[], Any]:
        return lambda: [engine.gradient(batch, kind=kind) for _ in range(3)]

    actions: dict[str, Callable[[], Any]] = {
        "forget": passes("forget", forget[0]),
        "retain": passes("retain", retain[0]),
        **{name: partial(method.round, engine, forget, retain) for name, method in compared.items()},
    }
    # the first round allocates optimiser states and kernel workspaces: use it for passes, not for time or memory
    spent = {name: account_of(engine, action) for name, action in actions.items()}
    memory = {name: peak_bytes(action) for name, action in actions.items()}
    wall: dict[str, list[float]] = {name: [] for name in actions}
    cpu: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            action()
            cpu[name].append(time.process_time() - started_cpu)
            wall[name].append(time.perf_counter() - started)
    results = {}
    for name in compared:
        cost, seconds = spent[name], median(wall[name])
        bare = [
            (cost["forget"] * f + cost["retain"] * r) / 3 for f, r in zip(cpu["forget"], cpu["retain"], strict=True)
        ]
        results[name] = {
            "forget_passes": cost["forget"],
            "retain_passes": cost["retain"],
            "updates": cost["updates"],
            "passes_per_update": (cost["forget"] + cost["retain"]) / cost["updates"],
            "seconds_per_update": seconds / cost["updates"],
            "tokens_per_second": cost["tokens"] / seconds,
            "gflop_per_second": cost["flops"] / seconds / 1e9,
            "seconds_to_gradient_ascent": seconds / median(wall["gradient ascent"]),
            "overhead_beyond_passes": median((c - b) / c for c, b in zip(cpu[name], bare, strict=True)),
            "peak_bytes": memory[name][0],
            "peak_bytes_above_rest": memory[name][1],
        }
    pass_seconds = {kind: median(wall[kind]) / 3 for kind in ("forget", "retain")}
    tokens = {kind: spent[kind]["tokens"] // 3 for kind in ("forget", "retain")}
    return {"pass_seconds": pass_seconds, "pass_tokens": tokens, "methods": results}


def account_of(engine: Any, action: Callable[[], Any]) -> dict[str, Any]:
    """The cost of one call, by the engine's pass counts."""
    before = engine.account.state()
    action()
    after = engine.account.state()
    passes = {kind: after["gradient_passes"][kind] - before["gradient_passes"][kind] for kind in ("forget", "retain")}
    return passes | {key: after[key] - before[key] for key in ("tokens", "flops", "updates")}


def peak_bytes(action: Callable[[], Any]) -> tuple[int, int] | tuple[None, None]:
    """Peak resident memory of this process during the call, and its excess over memory at rest (Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return None, None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    rest = resident("VmRSS")
    action()
    peak = resident("VmHWM")
    return peak, peak - rest


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    """The processor and the throughput of one thread, from which the floors of passes and vector work follow."""
    a = torch.randn(1024, 1024)
    b = torch.randn(1 << 24)
    c = torch.empty_like(b)
    product = min(seconds_of(lambda: a @ a) for _ in range(10))
    addition = min(seconds_of(lambda: torch.add(b, b, alpha=2.0, out=c)) for _ in range(10))
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "matmul_gflop_per_second": 2 * 1024**3 / product / 1e9,
        "add_gbyte_per_second": 2 * b.numel() * 4 / addition / 1e9,  # b is read once, c written
        "load_average": os.getloadavg()[0],
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def seconds_of(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


# ----------------------------------------------------------------------------------------------------------- printing


def table(workload: dict[str, Any], rows: int) -> Iterator[str]:
    """Markdown rows of one model on one engine."""
    tokens = workload["pass_tokens"]["forget"] / rows
    size = f"{workload['parameters'] / 1e6:.2f} M parameters, {tokens:.0f} tokens a row"
    yield f"\n{workload['model']} ({size}), {workload['engine']}\n"
    heads = ["method", "forget + retain passes", "passes/update", "ms/update", "of ascent", "tokens/s"]
    heads += ["peak MB (above rest)", "beyond passes"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name, row in workload["methods"].items():
        peak = (
            "-"
            if row["peak_bytes"] is None
            else f"{row['peak_bytes'] / 1e6:.0f} ({row['peak_bytes_above_rest'] / 1e6:.0f})"
        )
        yield (
            f"| {name} | {row['forget_passes']} + {row['retain_passes']} | {row['passes_per_update']:.2f} "
            f"| {1e3 * row['seconds_per_update']:.1f} | {row['seconds_to_gradient_ascent']:.2f} "
            f"| {row['tokens_per_second']:.0f} | {peak} | {row['overhead_beyond_passes']:.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=5, help="repeats of every measurement (five times as many on the built-in model)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument(
        "--models", nargs="+", default=[BUILTIN, "llama-10m"], help=f"of {BUILTIN}, llama-10m, llama-tiny"
    )
    parser.add_argument("--engines", nargs="+", default=["torch", "deepspeed"], help="of torch, deepspeed (stage 2)")
    parser.add_argument("--rows", type=int, default=8, help="rows per batch")
    parser.add_argument("--joined", type=int, default=2, help="questions per row (built-in model: always 1)")
    names = list(methods())
    parser.add_argument("--methods", nargs="+", choices=names, default=names, help="beside gradient ascent")
    parser.add_argument("--smoke", action="store_true", help="two repeats on a model of 0.1 M parameters")
    args = parser.parse_args()
    if args.smoke:
        args.repeats, args.models = 2, ["llama-tiny"]
    torch.set_num_threads(1)

    results: dict[str, Any] = {"machine": machine(), "rows": args.rows, "workloads": []}
    for model in args.models:
        for name in args.engines:
            engine = build_engine(name, build_model(model), args.rows)
            joined = 1 if model == BUILTIN else args.joined
            repeats = args.repeats * (5 if model == BUILTIN else 1)  # its rounds are short and therefore noisy
            about = {"model": model, "engine": name, "parameters": engine.numel, "joined": joined, "repeats": repeats}
            results["workloads"].append(about | measure(engine, args.rows, joined, repeats, args.methods))
            print("\n".join(table(results["workloads"][-1], args.rows)), flush=True)
            if name == "deepspeed":
                engine.close()
            del engine
            gc.collect()
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
