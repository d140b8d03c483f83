"""Predictions of `ofmu plan` against what processes really use: peak memory and seconds of a round.

    python benchmarks/plan.py [--workers 2] [--sizes 3m 10m 30m] [--stages 0 1 2 3] [--time] [--out FILE]

Each case runs two rounds of OFMU on a Llama with random weights, in processes connected by gloo, without Ray. The peak
is the resident set (VmHWM) above the process's base. The base is the resident set after the same job on a tiny model,
so imports and the buffers of DeepSpeed and gloo are measured, not assumed. glibc is set to return freed tensors at once
(MALLOC_MMAP_THRESHOLD_); with its default moving threshold, the resident set keeps freed memory and is larger. `--time`
adds timed rounds and a calibrated prediction, with default glibc settings (peaks are then larger); it needs a quiet
machine.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import socket
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers

from ofmu_ray.config import ModelConfig, OptimizerConfig, TrainingConfig
from ofmu_ray.engines import Batch, DeepSpeedEngine
from ofmu_ray.methods.ofmu import OFMU, OFMUConfig
from ofmu_ray.models.loading import empty_model
from ofmu_ray.planning.calibrate import calibrated_time
from ofmu_ray.planning.cost import LINKS
from ofmu_ray.planning.setup import Planner, Rows

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "DS_LOG_LEVEL": "error",
}
"""Read at process start, so set for the processes that this one spawns."""
SHAPES = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128},
    "3m": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 2048},
    "10m": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6, "vocab_size": 4096},
    "30m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 7, "vocab_size": 8192},
}
OPTIMIZER = OptimizerConfig(name="adamw", lr=1e-6)
INNER_STEPS = 2
"""Inner steps of a round: more of them change its time, not its memory."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ROWS, TOKENS = 2, 48
"""Rows of a worker's share of a batch, and tokens of each."""


def shape_of(size: str) -> Any:
    return transformers.LlamaConfig(num_attention_heads=4, max_position_embeddings=512, **SHAPES[size])


def batch_of(size: str, rows: int, tokens: int, seed: int) -> Batch:
    """One micro-batch; the first third of each row has no loss, and the first row some padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, SHAPES[size]["vocab_size"], (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, : tokens // 3] = -100
    return Batch([{"input_ids": ids, "attention_mask": mask, "labels": labels}])


def started(size: str, stage: int, rows: int) -> DeepSpeedEngine:
    torch.manual_seed(0)
    module = empty_model(shape_of(size), ModelConfig(), device="cpu")
    return DeepSpeedEngine(module, inner=OPTIMIZER, outer=OPTIMIZER, zero_stage=stage, micro_batch_size=rows)  # type: ignore[arg-type]


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Reset the peak; return the current resident set."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def two_rounds(
    size: str, stage: int, rows: int, tokens: int, preset: Any
) -> tuple[DeepSpeedEngine, OFMU, list[list[Batch]]]:
    """An engine after two rounds, with the method and its batches: forget and retain."""
    engine = started(size, stage, rows)
    batches = [[batch_of(size, rows, tokens, seed)] for seed in (0, 1)]
    method = OFMU(OFMUConfig.from_preset(preset, inner_steps=INNER_STEPS, relative_step=1e-4))
    for _ in range(2):
        method.round(engine, *batches)
    return engine, method, batches


def measured(size: str, stage: int, rows: int, tokens: int, preset: Any, timed: int, clock: Any) -> dict[str, Any]:
    """Peaks above the base of two rounds and of a checkpoint's copies; median seconds of `timed` more rounds."""
    warm, *_ = two_rounds("tiny", stage, rows, tokens, preset)
    warm.close()
    del warm
    base = reset_peak()
    engine, method, batches = two_rounds(size, stage, rows, tokens, preset)
    peak = resident("VmHWM") - base
    reset_peak()
    copies = engine.state_dict()
    checkpoint = resident("VmHWM") - base
    del copies
    seconds = []
    for _ in range(timed):
        dist.barrier()
        start = clock()
        method.round(engine, *batches)
        seconds.append(clock() - start)
    parameters = engine.numel
    engine.close()
    memory = {"parameters": parameters, "base_bytes": base, "round_bytes": peak, "checkpoint_bytes": checkpoint}
    return memory | {"seconds": median(seconds) if seconds else None}


def predicted(size: str, stage: int, workers: int, rows: int, tokens: int, preset: Any, clock: Any) -> dict[str, Any]:
    config = OFMUConfig.from_preset(preset, inner_steps=INNER_STEPS, relative_step=1e-4)
    config = replace(config, inner=OPTIMIZER, outer=OPTIMIZER)
    training = TrainingConfig(workers=workers, zero_stage=stage, batch_size=rows * workers)  # type: ignore[arg-type]
    length = Rows(tokens, float(tokens), tokens // 3)
    lengths = {"forget": length, "retain": length}
    planner = Planner(shape_of(size), ModelConfig(), config, training, lengths, "cpu")
    estimate = planner.estimate(planner.given())
    memory = {f"{phase}_bytes": estimate.phases[phase].bytes for phase in ("round", "checkpoint")}
    memory["components"] = dict(estimate.phases["round"].components)  # type: ignore[assignment]
    memory["parameters"] = estimate.sizes.total
    seconds = calibrated_time(planner, estimate, LINKS["loopback"], clock).total if clock else None
    return memory | {"seconds": seconds}


def rank_main(rank: int, port: int, args: argparse.Namespace, out: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    wait = datetime.timedelta(seconds=300)
    store = dist.TCPStore("127.0.0.1", port, args.workers, rank == 0, timeout=wait)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.workers, timeout=wait)
    cases = []
    for stage in args.stages:
        for size in args.sizes:
            case = {"size": size, "zero_stage": stage, "workers": args.workers}
            timed = args.repeats if args.time else 0
            cases.append(
                case
                | {"measured": measured(size, stage, args.rows, args.tokens, args.preset, timed, CLOCKS[args.clock])}
            )
    if rank == 0:
        Path(out).write_text(json.dumps(cases))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", default=["3m", "10m", "30m"], choices=list(SHAPES))
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--preset", default="lite", choices=["lite", "full"])
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of a worker's micro-batch")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens per row")
    parser.add_argument("--time", action="store_true", help="also predict and measure the seconds of a round")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: for a busy machine and one worker")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed rounds")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    # an allocator that returns memory at once makes memory measurable but rounds slower: measure one or the other
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if not (args.time and "MALLOC" in name)})
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    target = str(args.out or Path(os.environ.get("TMPDIR", "/tmp")) / f"ofmu_plan_{os.getpid()}.json")
    mp.spawn(rank_main, args=(port, args, target), nprocs=args.workers)  # type: ignore[no-untyped-call]
    cases = json.loads(Path(target).read_text())
    print("| model | workers | ZeRO | round, peak MB | predicted | checkpoint, MB | predicted | s/round | predicted |")
    print("|---" * 9 + "|")
    for case in cases:
        case["predicted"] = predicted(
            case["size"],
            case["zero_stage"],
            args.workers,
            args.rows,
            args.tokens,
            args.preset,
            CLOCKS[args.clock] if args.time else None,
        )
        real, plan = case["measured"], case["predicted"]
        cells = [case["size"], case["workers"], case["zero_stage"]]
        for phase in ("round_bytes", "checkpoint_bytes"):
            cells += [f"{real[phase] / 1e6:.0f}", f"{plan[phase] / 1e6:.0f} ({plan[phase] / real[phase] - 1:+.1%})"]
        if args.time:
            cells += [f"{real['seconds']:.3f}", f"{plan['seconds']:.3f} ({plan['seconds'] / real['seconds'] - 1:+.1%})"]
        print(f"| {' | '.join(map(str, cells))} |")
    if args.out:
        args.out.write_text(json.dumps(cases, indent=1) + "\n")
    else:
        Path(target).unlink()


if __name__ == "__main__":
    main()
