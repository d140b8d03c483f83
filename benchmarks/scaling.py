"""One worker against two, the cost of communication and Ray, and the resulting curve for 8 to 512 GPUs.

    python benchmarks/scaling.py [--stages 0 2 3] [--rounds 5] [--ray] [--project] [--out FILE] [--smoke]

Workers are processes with one thread each, connected by gloo: two of them need two free cores and an otherwise idle
machine. Weak scaling: the rows per worker are fixed; strong scaling: the rows of the batch are fixed. Every collective
is counted in bytes and waited for at once, so that its time is visible; a worker's time includes waiting for the other.
`--ray` runs the loop of `ofmu unlearn` under Ray Train and reports what a round costs beyond the method. `--project`
needs no quiet machine: it applies the formulas of `ofmu plan` to given GPUs and links; the planned bytes are printed
next to the counted ones.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers

from ofmu_ray.config import ModelConfig, OptimizerConfig, TrainingConfig, UnlearnConfig
from ofmu_ray.engines import Batch
from ofmu_ray.methods.ofmu import OFMU, OFMUConfig
from ofmu_ray.models.loading import empty_model
from ofmu_ray.planning.cost import GPUS
from ofmu_ray.planning.setup import Planner, Rows, SetUp, link_of

SHAPES = {
    "0.5m": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "vocab_size": 512},
    "10m": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6, "vocab_size": 4096},
}
SEVEN_BILLION = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
OPTIMIZER = OptimizerConfig(name="adamw", lr=1e-6)
METHOD = replace(OFMUConfig.from_preset("lite", relative_step=1e-4), inner=OPTIMIZER, outer=OPTIMIZER)


def shape_of(size: str) -> Any:
    return transformers.LlamaConfig(num_attention_heads=4, max_position_embeddings=1024, **SHAPES[size])


# ------------------------------------------------------------------------------------------------------- collectives


class Collectives:
    """Counts this process's `torch.distributed` collectives: calls, tensor bytes by kind, seconds."""

    KINDS: ClassVar = {
        "all_reduce": ("all_reduce", 0),
        "reduce": ("reduce_scatter", 0),  # to one owner per slice
        "reduce_scatter_tensor": ("reduce_scatter", 1),
        "reduce_scatter": ("reduce_scatter", 1),
        "all_gather_into_tensor": ("all_gather", 0),
        "all_gather": ("all_gather", 0),
        "broadcast": ("all_gather", 0),
    }

    def __init__(self) -> None:
        self.clear()
        for name in self.KINDS:
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def clear(self) -> None:
        self.bytes = {"all_reduce": 0, "reduce_scatter": 0, "all_gather": 0}
        self.calls, self.seconds = 0, 0.0

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        kind, place = self.KINDS[name]

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            named = ("output_tensor", "tensor", "output", "tensor_list")
            carried = args[place] if len(args) > place else next(kwargs[word] for word in named if word in kwargs)
            tensors = carried if isinstance(carried, list | tuple) else [carried]
            self.bytes[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.calls += 1
            start = time.perf_counter()
            work = function(*args, **kwargs)
            if work is not None:
                work.wait()
            self.seconds += time.perf_counter() - start
            return work

        return counted


# --------------------------------------------------------------------------------------------------------- measuring


def batches_of(size: str, rows: int, tokens: int, rank: int) -> list[list[Batch]]:
    """A rank's forget and retain batch, one micro-batch each; the first third of a row has no loss."""
    batches = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(2 * rank + seed)
        ids = torch.randint(1, SHAPES[size]["vocab_size"], (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -4:] = 0
        labels = torch.where(mask.bool(), ids, -100)
        labels[:, : tokens // 3] = -100
        batches.append([Batch([{"input_ids": ids, "attention_mask": mask, "labels": labels}])])
    return batches


def rank_main(rank: int, world: int, port: int, args: argparse.Namespace, out: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    collectives = Collectives()  # before DeepSpeed takes references to them
    wait = datetime.timedelta(seconds=300)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=wait)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
    results = []
    for stage in args.stages:
        for rows in sorted({args.rows, args.rows // world}, reverse=True):
            results.append(timed(args, rank, world, stage, rows, collectives))
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def timed(
    args: argparse.Namespace, rank: int, world: int, stage: int, rows: int, collectives: Collectives
) -> dict[str, Any]:
    """Seconds, tokens and collectives of a round on this rank."""
    from ofmu_ray.engines import DeepSpeedEngine

    torch.manual_seed(0)
    module = empty_model(shape_of(args.size), ModelConfig(), device="cpu")
    engine = DeepSpeedEngine(module, inner=OPTIMIZER, outer=OPTIMIZER, zero_stage=stage, micro_batch_size=rows)  # type: ignore[arg-type]
    method, batches = OFMU(METHOD), batches_of(args.size, rows, args.tokens, rank)
    method.round(engine, *batches)  # allocates moments and kernel workspaces
    seconds, waits = [], []
    before = engine.account.state()
    for _ in range(args.rounds):
        dist.barrier()
        collectives.clear()
        start = time.perf_counter()
        method.round(engine, *batches)
        seconds.append(time.perf_counter() - start)
        waits.append(collectives.seconds)
    tokens = (engine.account.tokens - before["tokens"]) // args.rounds
    result = {
        "workers": world,
        "rows_per_worker": rows,
        "zero_stage": stage,
        "parameters": engine.numel,
        "seconds": median(seconds),
        "communication_seconds": median(waits),
        "tokens": tokens,
        "tokens_per_second": tokens / median(seconds),
        "bytes": dict(collectives.bytes),
        "calls": collectives.calls,
    }
    engine.close()
    return result


def measure(args: argparse.Namespace, world: int) -> list[dict[str, Any]]:
    """All stages and batch sizes for one number of workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/found.json"
        mp.spawn(rank_main, args=(world, port, args, out), nprocs=world)  # type: ignore[no-untyped-call]
        results: list[dict[str, Any]] = json.loads(Path(out).read_text())
    for one in results:
        rows = one["rows_per_worker"]
        job = planner(shape_of(args.size), rows * world, args.tokens, "cpu")
        traffic = job.estimate(SetUp(one["zero_stage"], world, rows, False, "none", None)).traffic
        # a single worker's collectives go nowhere
        one["planned_bytes"] = {kind: getattr(traffic, kind) for kind in one["bytes"]}
    return results


def planner(shape: Any, batch: int, tokens: int, device: Any, precision: Any = "fp32") -> Planner:
    length = Rows(tokens, float(tokens), tokens // 3)
    training = TrainingConfig(batch_size=batch)
    lengths = {"forget": length, "retain": length}
    return Planner(shape, ModelConfig(precision=precision), METHOD, training, lengths, device)


# --------------------------------------------------------------------------------------------------------------- Ray


def ray_loop(config: dict[str, Any]) -> None:
    """`ofmu_ray.training.start.worker_loop` with a clock around the rounds."""
    from ofmu_ray.data.batch_plan import read_plan
    from ofmu_ray.data.stream import rounds, shard_iterator
    from ofmu_ray.training.session import RaySession
    from ofmu_ray.training.worker import Worker

    job, session = config["job"], RaySession(config["job"].run_dir)
    torch.set_num_threads(1)
    plan = read_plan(job.plan_dir)
    worker = Worker(job, session, config["progress"])
    marks: list[float] = []

    def source(start: int, options: dict[str, Any]) -> Iterator[Any]:
        for batches in rounds(shard_iterator(plan, session.rank, start), plan, start_round=start, **options):
            marks.append(time.perf_counter())
            yield batches

    worker.run(source)
    if session.rank == 0:
        # from the first round's batch to the last round's: one round fewer than were run
        wall = (marks[-1] - marks[0]) / (len(marks) - 1)
        count = len(worker.state.series)
        seconds = {"round_seconds": wall, "method_seconds": worker.state.train_seconds / count, "rounds": count}
        Path(job.run_dir, "scaling.json").write_text(json.dumps(seconds))


def ray_overhead(workers: int, rounds: int) -> dict[str, Any]:
    """Seconds of a round under Ray Train, with stream, progress and series, and of the method alone."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from ofmu_ray.cluster.connect import connect, worker_environment
    from ofmu_ray.data.answer_encoder import AnswerEncoder
    from ofmu_ray.data.batch_plan import write_plan
    from ofmu_ray.data.prepare import prepare_streams
    from ofmu_ray.models.loading import load_tokenizer
    from ofmu_ray.training.watch import Progress
    from ofmu_ray.training.worker_job import WorkerJob

    training = TrainingConfig(workers=workers, rounds=rounds, batch_size=8 * workers, checkpoint_every=10**6)
    config = UnlearnConfig(training=training, ofmu=METHOD)  # type: ignore[call-arg]
    connect(workers)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_streams(
            {"forget": config.data.forget, "retain": config.data.retain}, None,
            AnswerEncoder(load_tokenizer(config.model), config.data.format), folder,
        )  # fmt: skip
        job = WorkerJob(
            run_dir=folder, plan_dir=f"{folder}/plan", config_hash="scaling", seed=0, model=config.model,
            method=METHOD, training=training, stop=config.stop, utility_rows=None,
        )  # fmt: skip
        write_plan(
            prepared.streams, job.plan_dir, batches_per_round=job.build_method().batches_per_round(), rounds=rounds,
            batch_size=training.batch_size, workers=workers, seed=0,
        )  # fmt: skip
        TorchTrainer(
            ray_loop,
            train_loop_config={"job": job, "progress": Progress.remote()},  # type: ignore[attr-defined]
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(
                name="train", storage_path=folder,
                worker_runtime_env={"env_vars": worker_environment(1)},
            ),
        ).fit()  # fmt: skip
        seconds: dict[str, Any] = json.loads(Path(folder, "scaling.json").read_text())
    return seconds | {"workers": workers}


# --------------------------------------------------------------------------------------------------------- projecting


def projected(gpu: str, rows: int, tokens: int, stage: int, efficiency: float) -> Iterator[dict[str, Any]]:
    """Weak scaling of a Llama-2-7B in bf16: rounds, tokens and the share of communication by number of GPUs."""
    shape = transformers.LlamaConfig(num_attention_heads=32, max_position_embeddings=4096, **SEVEN_BILLION)
    device = GPUS[gpu].device("bf16", efficiency)
    job: Planner | None = None
    for gpus in (8, 16, 32, 64, 128, 256, 512):
        one = planner(shape, rows * gpus, tokens, "cuda", "bf16")
        if job is not None:
            one._traced = job._traced  # traces depend on the micro-batch, which stays the same
        job = one
        estimate = one.estimate(SetUp(stage, gpus, rows, True, "none", None))
        name, link = link_of(None, gpus, 8, "cuda")
        spent = estimate.time(device, link)
        yield {
            "gpu": gpu, "gpus": gpus, "zero_stage": stage, "link": name, "round_seconds": spent.total,
            "communication_seconds": spent.communication, "tokens_per_second": estimate.tokens / spent.total,
            "peak_bytes": estimate.peak.bytes, "sent_bytes": estimate.traffic.sent_bytes(gpus),
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ printing


def row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def print_measured(results: list[dict[str, Any]]) -> None:
    heads = ["ZeRO", "workers", "rows a worker", "rounds/s", "tokens/s", "of one worker", "communication, ms a round"]
    print(row(*heads, "share", "MB counted", "MB planned"))
    print("|---" * (len(heads) + 3) + "|")
    alone = {(one["zero_stage"], one["rows_per_worker"]): one for one in results if one["workers"] == 1}
    for one in results:
        most = max(rows for stage, rows in alone if stage == one["zero_stage"])
        # weak and strong scaling are both compared with one worker at the larger batch
        against = one["tokens_per_second"] / alone[one["zero_stage"], most]["tokens_per_second"]
        spent, counted, planned = one["communication_seconds"], one["bytes"], one["planned_bytes"]
        share, sums = spent / one["seconds"], [f"{sum(b.values()) / 1e6:.1f}" for b in (counted, planned)]
        values = f"{1 / one['seconds']:.3f}", f"{one['tokens_per_second']:.0f}", f"{against:.2f}", f"{spent * 1e3:.0f}"
        print(row(one["zero_stage"], one["workers"], one["rows_per_worker"], *values, f"{share:.1%}", *sums))


def print_projected(results: list[dict[str, Any]]) -> None:
    heads = ["GPUs", "link", "s a round", "tokens/s", "of 8 GPUs' rate per GPU", "communication", "GB a GPU"]
    print(row(*heads))
    print("|---" * len(heads) + "|")
    first = results[0]
    for one in results:
        kept = one["tokens_per_second"] / one["gpus"] / (first["tokens_per_second"] / first["gpus"])
        print(row(one["gpus"], one["link"], f"{one['round_seconds']:.2f}", f"{one['tokens_per_second']:.0f}",
                  f"{kept:.0%}", f"{one['communication_seconds'] / one['round_seconds']:.0%}",
                  f"{one['peak_bytes'] / 1e9:.0f}"))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 2, 3])
    parser.add_argument("--size", default="10m", choices=list(SHAPES))
    parser.add_argument(
        "--rows", type=int, default=16, help="rows of a worker's batch (strong scaling: of the global batch)"
    )
    parser.add_argument("--tokens", type=int, default=128, help="tokens per row")
    parser.add_argument("--rounds", type=int, default=5, help="number of timed rounds")
    parser.add_argument("--ray", action="store_true", help="measure what Ray Train adds to a round")
    parser.add_argument("--project", action="store_true", help="the curve for 8 to 512 GPUs")
    parser.add_argument("--gpu", default="H100-80GB", choices=list(GPUS))
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of the data sheet's FLOP/s")
    parser.add_argument("--gpu-rows", type=int, default=8, help="rows of a GPU's batch in the projection")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--smoke", action="store_true", help="a small model and one round")
    args = parser.parse_args()
    if args.smoke:
        args.size, args.rows, args.tokens, args.rounds = "0.5m", 4, 16, 1
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, Any] = {"load_average": os.getloadavg()[0], "measured": [], "ray": [], "projected": []}
    for world in (1, 2):
        results["measured"] += measure(args, world)
    results["measured"].sort(key=lambda one: (one["zero_stage"], one["workers"], -one["rows_per_worker"]))
    print_measured(results["measured"])
    if args.ray:
        for workers in (1, 2):
            one = ray_overhead(workers, 4 * args.rounds)
            results["ray"].append(one)
            extra = one["round_seconds"] - one["method_seconds"]
            print(
                f"Ray Train, {workers} worker(s): {one['round_seconds'] * 1e3:.0f} ms a round, {extra * 1e3:.1f} ms "
                f"({extra / one['round_seconds']:.1%}) of it beyond the method"
            )
    if args.project:
        results["projected"] = list(projected(args.gpu, args.gpu_rows, 512, 3, args.efficiency))
        print_projected(results["projected"])
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
