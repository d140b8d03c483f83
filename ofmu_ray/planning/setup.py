"""A set-up of a run and its requirements, from traces, replay, memory and time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ofmu_ray.config import ExportConfig, LoraConfig, MethodConfig, ModelConfig, TrainingConfig
from ofmu_ray.engines.deepspeed_engine import PERSISTENT_BELOW
from ofmu_ray.methods import build_method
from ofmu_ray.models.exporting import DTYPES, converts
from ofmu_ray.models.loading import empty_model
from ofmu_ray.models.stored import share
from ofmu_ray.models.unread import CONVERTED, unusual_kind
from ofmu_ray.planning.cost import (
    LINKS,
    Device,
    Link,
    RoundTime,
    Traffic,
    flops_as_reported,
    pass_seconds,
    round_traffic,
    vector_seconds,
)
from ofmu_ray.planning.memory import Files, Layout, Peak, Sizes, highest, peaks
from ofmu_ray.planning.replay import Round, replay
from ofmu_ray.planning.shapes import micro_batch, parameter_counts
from ofmu_ray.planning.trace import Meter, PassTrace, trace_pass

HOST_LINK = 20e9
"""Bytes per second between GPU and host memory (PCIe 4 x16), for offloaded moments."""


@dataclass(frozen=True)
class Rows:
    """Tokens of a stream's rows."""

    longest: int
    mean: float
    prompt: float
    """Mean prompt tokens, which have no loss."""


@dataclass(frozen=True)
class SetUp:
    """The choices of a plan."""

    zero_stage: int
    workers: int
    micro_batch_size: int
    gradient_checkpointing: bool
    offload: Literal["none", "optimizer"]
    lora: LoraConfig | None

    def options(self) -> list[str]:
        """The corresponding command-line options."""
        words = [
            f"--training.zero_stage {self.zero_stage}",
            f"--training.workers {self.workers}",
            f"--training.micro_batch_size {self.micro_batch_size}",
            f"--training.offload {self.offload}",
            f"--model.gradient_checkpointing {str(self.gradient_checkpointing).lower()}",
        ]
        if self.lora is not None:
            words.append(f"--model.lora.rank {self.lora.rank} --model.lora.alpha {self.lora.alpha:g}")
        return words


@dataclass(frozen=True)
class Requirements:
    """Requirements of a set-up."""

    setup: SetUp
    phases: Mapping[str, Peak]
    sizes: Sizes
    passes: Mapping[str, int]
    """Gradient passes per round, by stream."""
    updates: int
    tokens: float
    """Per round, over all workers, without padding."""
    flops: float
    """Per round, as the run reports them."""
    traffic: Traffic
    """Per round and rank."""
    files: Files
    round: Round = field(repr=False)
    traces: Mapping[int, PassTrace] = field(repr=False)
    layout: Layout = field(repr=False)

    @property
    def peak(self) -> Peak:
        return highest(self.phases)

    def time(self, device: Device, link: Link) -> RoundTime:
        """Seconds of a round by the roofline of `device`."""
        micro = sum(pass_seconds(trace, device) for trace in self.traces.values())
        moved = self.layout.offload * sum(self.round.steps.values()) * 2 * 2 * self._vector_bytes() / HOST_LINK
        return RoundTime(
            micro * self.layout.micro_batches,
            vector_seconds(self.layout, self.sizes, self.round, device.bytes_per_second) + moved,
            self.traffic.seconds(self.layout.workers, link),
        )

    def _vector_bytes(self) -> float:
        workers = self.layout.workers if self.layout.zero_stage else 1
        return 4 * self.sizes.trainable / workers


class Planner:
    """Estimates for a job; set-ups share traces where possible."""

    def __init__(
        self,
        shape: Any,
        model: ModelConfig,
        method: MethodConfig,
        training: TrainingConfig,
        rows: Mapping[str, Rows],
        device: Literal["cpu", "cuda"],
        base: int = 0,
        stored: torch.dtype = torch.float32,
        export: ExportConfig | None = None,
        file_bytes: int = 5 * 10**9,
    ):
        """`stored`: of the weights in the files; `file_bytes`: `export.max_shard_size` as a number."""
        self.shape, self.model, self.method, self.training = shape, model, method, training
        self.rows, self.device, self.base = rows, device, base
        self.stored, self.export, self.file_bytes = stored, export or ExportConfig(), file_bytes
        self._traced: dict[tuple[bool, LoraConfig | None, int], tuple[Sizes, Round, dict[int, PassTrace]]] = {}

    def given(self) -> SetUp:
        """The configured set-up."""
        training, model = self.training, self.model
        return SetUp(
            zero_stage=0 if training.single else training.zero_stage,
            workers=training.workers,
            micro_batch_size=training.micro_batch_size or training.batch_size // training.workers,
            gradient_checkpointing=model.gradient_checkpointing,
            offload=training.offload,
            lora=model.lora,
        )

    def estimate(self, setup: SetUp) -> Requirements:
        """Requirements of `setup`; traces the model if not yet done for its passes."""
        sizes, done, traces = self._trace(setup)
        layout = Layout(
            zero_stage=setup.zero_stage,
            workers=setup.workers,
            device=self.device,
            precision=self.model.precision,
            offload=setup.offload == "optimizer",
            micro_batches=self.training.batch_size // setup.workers // setup.micro_batch_size,
            adapters=setup.lora is not None,
        )
        files = self._files(layout, sizes)
        passes = {kind: sum(p.kind == kind for p in done.passes) for kind in ("forget", "retain")}
        batch = self.training.batch_size
        tokens = sum(count * batch * self.rows[kind].mean for kind, count in passes.items())
        return Requirements(
            setup=setup,
            phases=peaks(layout, sizes, done, traces, self.base, files),
            sizes=sizes,
            passes=passes,
            updates=sum(done.steps.values()),
            tokens=tokens,
            flops=flops_as_reported(sizes, tokens),
            traffic=round_traffic(layout, sizes, done),
            files=files,
            round=done,
            traces=traces,
            layout=layout,
        )

    def _files(self, layout: Layout, sizes: Sizes) -> Files:
        """Loading as models/unread.py reads, and export as models/exporting.py writes."""
        whole, converted = sum(sizes.stored), self._converted
        reason = unusual_kind(self.shape) or (CONVERTED if converted else None)
        cut = layout.workers if layout.zero_stage == 3 and reason is None else 1
        read = sum(stop - start for start, stop in (share(size, 0, cut) for size in sizes.stored))
        alone = self.export.weights == "adapter" and layout.adapters
        asked = DTYPES.get(self.export.dtype, torch.float32 if alone else self.stored)
        written = (sizes.trainable if alone else whole) * asked.itemsize
        held = written if alone else min(written, self.file_bytes)
        if converted and not alone:
            # the gathered weights, their copies in the files' type, and transformers' copies of what it converts
            cast = 0 if asked.itemsize == layout.weight_bytes else written
            held = whole * layout.weight_bytes + cast + written
        return Files(whole * self.stored.itemsize, read * self.stored.itemsize, written, held, reason)

    @functools.cached_property
    def _converted(self) -> bool:
        return converts(empty_model(self.shape, replace(self.model, lora=None, freeze=[])))

    def _trace(self, setup: SetUp) -> tuple[Sizes, Round, dict[int, PassTrace]]:
        key = (setup.gradient_checkpointing, setup.lora, setup.micro_batch_size)
        if key not in self._traced:
            config = replace(self.model, gradient_checkpointing=setup.gradient_checkpointing, lora=setup.lora)
            module = empty_model(self.shape, config)
            method = build_method(self.method, self.training.rounds)
            with Meter():
                method.freeze(module)
            micro = {
                stream: micro_batch(
                    self.shape,
                    setup.micro_batch_size,
                    rows.longest,
                    min(int(rows.prompt), rows.longest - 1),
                    [need for need in method.needs if need.stream == stream],
                    module,
                )
                for stream, rows in self.rows.items()
            }
            done = replay(method, module, self.method.optimizers, self.model.precision, micro.__getitem__)
            known: dict[Any, PassTrace] = {}
            traces: dict[int, PassTrace] = {}
            for index, one in enumerate(done.passes):
                precision = "fp32" if one.differenced and config.precision != "bf16" else config.precision
                same = (one.kind, getattr(one.loss, "__func__", one.loss), precision)
                if same not in known:
                    known[same] = trace_pass(module, one.loss, one.batch.micro[0], precision)
                traces[index] = known[same]
            total, trainable = parameter_counts(module)
            counts = [parameter.numel() for parameter in module.parameters()]
            stored = tuple(p.numel() for name, p in module.named_parameters() if ".lora_" not in name)
            small = sum(n for n in counts if n < PERSISTENT_BELOW)
            sizes = Sizes(total, trainable, max(counts), small, stored)
            self._traced[key] = sizes, done, traces
        return self._traced[key]


def link_of(name: str | None, workers: int, per_node: int, device: str) -> tuple[str, Link]:
    """The given link, or the default: nvlink within a node, 400 Gbit/s InfiniBand beyond, loopback on CPUs."""
    if name is None:
        name = "loopback" if device == "cpu" else "nvlink" if workers <= per_node else "infiniband-400g"
    return name, LINKS[name]
