"""The plan of a run: memory, time, communication and cost, before anything starts."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofmu_ray.config.plan import PlanConfig, parsed_bytes
from ofmu_ray.errors import UserError

if TYPE_CHECKING:
    from ofmu_ray.data.encoder import Encoder


def planned(config: PlanConfig) -> dict[str, Any]:
    """The plan as plain values (bytes, seconds, FLOPs).

    Raises UserError if nothing fits plan.gpu_memory, or if the configuration cannot be planned.
    """
    _check(config)
    from ofmu_ray.models.loading import read_config
    from ofmu_ray.planning.cost import GPUS
    from ofmu_ray.planning.propose import Target, propose
    from ofmu_ray.planning.setup import Planner, link_of

    options, training = config.plan, config.training
    gpu = GPUS[options.gpu] if options.gpu else None
    cuda = gpu is not None or options.gpu_memory is not None or training.gpus > 0
    proposing = gpu is not None or options.gpu_memory is not None
    rows = _rows(config)
    shape = read_config(config.model.path, trust_remote_code=config.model.trust_remote_code)
    planner = Planner(
        shape, config.model, config.method_options, training, rows, "cuda" if cuda else "cpu",
        base=0 if cuda else _process_bytes(), stored=_stored(shape), export=config.export,
        file_bytes=parsed_bytes(config.export.max_shard_size),
    )  # fmt: skip
    workers = options.gpus or training.workers
    name, link = link_of(options.link, workers, options.gpus_per_node, "cuda" if cuda else "cpu")
    # without a GPU, set-ups are ordered as on an A100, and no seconds are reported
    device = (gpu or GPUS["A100-80GB"]).device(config.model.precision, options.efficiency)
    if proposing:
        capacity = parsed_bytes(options.gpu_memory) if options.gpu_memory else gpu.memory if gpu else 0
        usable = int(capacity * (1 - options.reserve))
        estimate = propose(planner, Target(usable, workers, device, link))
    else:
        usable = None
        planner.training = dataclasses.replace(training, workers=workers)
        estimate = planner.estimate(planner.given())
    time = estimate.time(device, link) if gpu is not None else None
    reason = None if time else "plan.gpu is not set and plan.calibrate is off"
    if options.calibrate:
        from ofmu_ray.planning.calibrate import calibrated_time

        time, reason = calibrated_time(planner, estimate, link), None
    return _described(config, estimate, rows, time, reason, usable, name)


def _check(config: PlanConfig) -> None:
    """Raise UserError for what cannot be planned, before torch is imported."""
    options, training = config.plan, config.training
    if config.task != "causal_lm":
        raise UserError(f"task = {config.task!r}: memory and time are planned for language models only")
    if options.calibrate and (options.gpu is not None or options.gpu_memory is not None or training.gpus > 0):
        raise UserError("plan.calibrate measures this machine's CPU: remove plan.gpu and plan.gpu_memory")
    if getattr(config.method_options, "curvature", None) == "exact":
        raise UserError("ofmu.curvature = exact: memory and time of double backward cannot be planned; use "
                        "--ofmu.curvature finite_difference")  # fmt: skip
    if options.gpu is None and options.gpu_memory is None:
        # the batch divides over workers and micro-batches; with a GPU given, set-ups are looked for that do
        dataclasses.replace(training, workers=options.gpus or training.workers)


def _stored(shape: Any) -> Any:
    """The type of the weights in the model's files, as config.json has it."""
    import torch

    stored = getattr(shape, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _rows(config: PlanConfig) -> dict[str, Any]:
    from ofmu_ray.planning.setup import Rows

    if config.plan.row_tokens:
        tokens = config.plan.row_tokens
        return {stream: Rows(tokens, float(tokens), tokens // 3) for stream in ("forget", "retain")}
    from ofmu_ray.data.kinds import StreamEncoders
    from ofmu_ray.models.loading import load_tokenizer

    kinds = {stream: config.data.kind(stream) for stream in ("forget", "retain")}
    encoders = StreamEncoders.of(load_tokenizer(config.model), config.data.format, kinds)
    return {stream: _counted(config, stream, encoders.stream(stream)) for stream in kinds}


def _counted(config: PlanConfig, stream: str, encoder: Encoder) -> Any:
    """Token counts from the first rows of a stream."""
    from ofmu_ray.data import sources
    from ofmu_ray.data.row_checks import Problems
    from ofmu_ray.planning.setup import Rows

    data = config.data
    columns = list(encoder.columns)
    fragments = sources.fragments(getattr(data, stream), data.root, stream=stream, option=f"data.{stream}")
    every = (row for piece in fragments for _, row in sources.read(piece, columns))
    sample = itertools.islice(every, config.plan.sample_rows)
    rows = [row for _, row in encoder.encode([("", row) for row in sample if isinstance(row, dict)], Problems())]
    if not rows:
        raise UserError(f"data.{stream}: no row with columns {columns} to count tokens; set --plan.row_tokens")
    prompts = sum(row.payload[1] for row in rows) / len(rows)
    return Rows(max(row.length for row in rows), sum(row.length for row in rows) / len(rows), prompts)


def _process_bytes() -> int:
    """Resident set of this process with all imports of a worker."""
    from ofmu_ray.engines.deepspeed_engine import import_deepspeed

    import_deepspeed()

    for line in Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []:
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


def _described(
    config: PlanConfig, estimate: Any, rows: Any, time: Any, reason: str | None, usable: int | None, link: str
) -> dict[str, Any]:
    rounds, setup, options = config.training.rounds, estimate.setup, config.plan
    per_rank = estimate.traffic.sent_bytes(setup.workers)
    seconds: dict[str, Any] | None = None
    cost = None
    if time is not None:
        seconds = {**dataclasses.asdict(time), "total": time.total, "run": time.total * rounds}
        if options.price_per_gpu_hour is not None:
            cost = seconds["run"] / 3600 * setup.workers * options.price_per_gpu_hour
    return {
        "model": {"path": config.model.path, "parameters": estimate.sizes.total, "trainable": estimate.sizes.trainable},
        "method": config.method,
        "rows": {stream: dataclasses.asdict(counts) for stream, counts in rows.items()},
        "setup": {**dataclasses.asdict(setup), "micro_batches": estimate.layout.micro_batches},
        "options": setup.options(),
        "proposed": usable is not None,
        "memory": {
            "usable_bytes": usable,
            "peak_bytes": estimate.peak.bytes,
            "phase": next(name for name, peak in estimate.phases.items() if peak is estimate.peak),
            "components": {name: size for name, size in estimate.peak.components.items() if size},
            "phases": {name: peak.bytes for name, peak in estimate.phases.items()},
        },
        "loading": {
            "model_bytes": estimate.files.model,
            "read_bytes_per_rank": estimate.files.read,
            "peak_bytes": estimate.phases["loading"].bytes,
            "whole": estimate.files.whole if estimate.layout.zero_stage == 3 else None,
        },
        "export": {"written_bytes": estimate.files.written, "held_bytes": estimate.files.held},
        "round": {
            "gradient_passes": dict(estimate.passes),
            "precisions": dict(
                Counter(trace.precision.removesuffix("_autocast") for trace in estimate.traces.values())
            ),
            "updates": estimate.updates,
            "tokens": estimate.tokens,
            "flops": estimate.flops,
            "sent_bytes_per_rank": per_rank,
            "collectives": estimate.traffic.calls,
            "seconds": seconds,
            "seconds_missing": reason,
        },
        "run": {
            "rounds": rounds,
            "gradient_passes": {kind: count * rounds for kind, count in estimate.passes.items()},
            "tokens": estimate.tokens * rounds,
            "flops": estimate.flops * rounds,
            "seconds": seconds["run"] if seconds else None,
            "cost": cost,
        },
        "link": link,
    }
