"""Sharded checkpoints: one file per rank, and the loop's state as readable JSON.

A checkpoint is a folder with `rank_00000.pt` ... (the rank's fp32 weights and both optimisers' moments; if all ranks
have the same, as at ZeRO stage 0, the others' files contain only the buffers, which may differ), `state.json`
(cursor, method state, cost, reason of the checkpoint), `series.jsonl` (the per-round metrics so far, so a resumed run
has one history) and `manifest.json` (sizes and checksums of all files). It contains no code: the ranks' files are read
as tensors and plain values only.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ofmu_ray.engines.protocol import Engine
from ofmu_ray.engines.reshard import reshard
from ofmu_ray.errors import UserError
from ofmu_ray.methods.protocol import Method
from ofmu_ray.storage import explained, scratch
from ofmu_ray.training import integrity
from ofmu_ray.training.session import Session


@dataclass
class LoopState:
    """State of the loop. Equal on all ranks."""

    config_hash: str
    round: int = 0
    """Rounds done: the cursor of both streams."""
    utility_start: float | None = None
    """Mean answer probability on the monitored retain rows before the first round."""
    utility: float | None = None
    """The same at the last check."""
    status: str = "running"
    """running, finished, stopped (by a scheduler), utility_floor or non_finite."""
    message: str = ""
    """Why the run stopped early."""
    train_seconds: float = 0.0
    """Wall-clock seconds spent in rounds, over all attempts."""
    peak_memory_bytes: int = 0
    """Highest memory of a worker (device memory on CUDA, else resident set)."""
    rollbacks: int = 0
    """How often a non-finite round reset the run to a checkpoint."""
    thrown_away: int = 0
    """Rounds discarded for an earlier checkpoint; pass counts and train_seconds include their cost."""
    learning_rate_factor: float = 1.0
    """Multiplier of all learning rates: stop.shrink once per rollback."""
    notes: list[str] = field(default_factory=list)
    """Messages for the user about problems survived: skipped checkpoints, rollbacks, hung workers."""
    undelivered: bool = False
    """Whether MLflow had not accepted the complete series at the end of the loop."""
    series: list[dict[str, float]] = field(default_factory=list)
    """Per-round metrics, oldest first; stored in series.jsonl."""


def save(state: LoopState, engine: Engine, method: Method, session: Session) -> None:
    """Report a checkpoint to the session. Collective; returns when this rank's files are in storage.

    Raises:
        StorageError: no space, no permission or no response, on this machine or in the storage; older checkpoints stay.
    """
    with scratch() as folder:
        _write(folder, state, engine, method, session)
        integrity.write_manifest(folder, session.rank, session.world)
        # a stopped run ends at an earlier round, whose checkpoint must not be overwritten
        suffix = "" if state.status == "running" else f"_{state.status}"
        session.report(folder, f"round_{state.round:06d}{suffix}", state.round)


def _write(folder: Path, state: LoopState, engine: Engine, method: Method, session: Session) -> None:
    shard = engine.state_dict()
    if session.rank and _replicated(engine):
        shard = {name: shard[name] for name in ("buffers", "account")}
    with explained(folder, "temporary files"):
        with _shard(folder, session.rank).open("wb", buffering=0) as file:  # otherwise torch hides a full disk
            torch.save(shard, file)
        if session.rank == 0:
            readable = asdict(state)
            series = readable.pop("series")
            readable["method"] = method.state_dict()
            readable["account"] = engine.account.state()
            (folder / "state.json").write_text(json.dumps(readable, indent=2) + "\n")
            (folder / "series.jsonl").write_text("".join(json.dumps(row) + "\n" for row in series))


@contextmanager
def newest(session: Session) -> Iterator[tuple[Path | None, list[str]]]:
    """The folder of the newest intact checkpoint (None: there is none), and the reasons for skipped ones. Collective.

    All ranks skip the same checkpoints.
    """
    skipped: list[str] = []
    for name, opened in session.checkpoints():
        with opened as folder:
            reason = integrity.damage(folder, session.rank, session.world)
            if reason is None:
                yield folder, skipped
                return
        skipped.append(f"checkpoint {name} was skipped: {reason}")
    yield None, skipped


def restore(folder: Path, engine: Engine, method: Method, session: Session, config_hash: str | None) -> LoopState:
    """Restore weights, optimisers, method and loop state from an intact checkpoint; `config_hash` None: of any run.

    Another number of workers may have written it: its shards are resharded.

    Raises:
        UserError: the checkpoint belongs to another configuration or ZeRO stage, or one of its files contains anything
            but tensors and plain values.
    """
    state, extra = read_state(folder)
    if config_hash is not None and state.config_hash != config_hash:
        raise UserError(
            f"the run's checkpoint was made with another configuration (hash {state.config_hash}, now "
            f"{config_hash}): choose another --name, or restore the earlier options"
        )
    workers = integrity.read_workers(folder)
    if workers == session.world:
        shard = read_shard(_shard(folder, session.rank))
        if "masters" not in shard:
            shard = {**read_shard(_shard(folder, 0)), **shard}
        engine.load_state_dict(shard)
    else:
        states = [read_shard(_shard(folder, rank)) for rank in range(workers)]
        engine.load_state_dict(reshard(states, engine.layout))
    engine.scale_learning_rates(state.learning_rate_factor)
    method.load_state_dict(extra["method"])
    engine.account.load(extra["account"])
    return state


def read_state(folder: Path) -> tuple[LoopState, dict[str, Any]]:
    """The readable part of a checkpoint folder: loop state, and states of method and pass counts by name."""
    content = json.loads((folder / "state.json").read_text())
    extra = {name: content.pop(name) for name in ("method", "account")}
    series = [json.loads(line) for line in (folder / "series.jsonl").read_text().splitlines()]
    return LoopState(**content, series=series), extra


def read_shard(path: Path) -> dict[str, Any]:
    """One rank's file. Executes nothing in it.

    Raises:
        UserError: it contains anything but tensors and plain values.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(
            f"{path} contains more than tensors and numbers, so this program did not write it; it was not loaded "
            f"({type(error).__name__}): find out where it comes from, or start over with another --name"
        ) from None
    return content


def _replicated(engine: Engine) -> bool:
    """Whether every rank has all weights and moments."""
    return "pieces" not in engine.layout


def _shard(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.pt"
