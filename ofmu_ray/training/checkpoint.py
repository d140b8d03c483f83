"""Sharded checkpoints: one file per rank, and the loop's state as JSON that a person can read.

A checkpoint is a folder with `rank_00000.pt` ... (this rank's fp32 weights and both optimisers' moments),
`state.json` (cursor, method state, cost, why it was taken) and `series.jsonl` (the per-round figures so far, so that
a resumed run has one history).
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ofmu_ray.engines.protocol import Engine
from ofmu_ray.errors import UserError
from ofmu_ray.methods.protocol import Method
from ofmu_ray.training.session import Session


@dataclass
class LoopState:
    """Where the loop stands. Equal on all ranks."""

    config_hash: str
    round: int = 0
    """Rounds done: the cursor of both streams."""
    utility_start: float | None = None
    """Mean answer probability on the watched retain rows before the first round."""
    utility: float | None = None
    """The same at the last check."""
    status: str = "running"
    """running, finished, utility_floor or non_finite."""
    message: str = ""
    """Why the run stopped early."""
    train_seconds: float = 0.0
    """Wall-clock seconds in rounds so far, over all attempts."""
    peak_memory_bytes: int = 0
    """Highest memory of a worker (device memory on CUDA, else resident set)."""
    series: list[dict[str, float]] = field(default_factory=list)
    """Per-round figures, oldest first; kept in series.jsonl."""


def save(state: LoopState, engine: Engine, method: Method, session: Session) -> None:
    """Report a checkpoint to the session. Collective; returns when this rank's files are in storage."""
    folder = Path(tempfile.mkdtemp(prefix="ofmu_checkpoint_"))
    torch.save(engine.state_dict(), folder / f"rank_{session.rank:05d}.pt")
    if session.rank == 0:
        readable = asdict(state)
        series = readable.pop("series")
        readable["method"] = method.state_dict()
        readable["account"] = engine.account.state()
        (folder / "state.json").write_text(json.dumps(readable, indent=2) + "\n")
        (folder / "series.jsonl").write_text("".join(json.dumps(row) + "\n" for row in series))
    # the end of a stopped run stands at an earlier round, whose checkpoint must not be written over
    suffix = "" if state.status == "running" else f"_{state.status}"
    session.report(folder, f"round_{state.round:06d}{suffix}", state.round)


def restore(folder: Path, engine: Engine, method: Method, rank: int, config_hash: str | None) -> LoopState:
    """Weights, optimisers, method and loop state from a checkpoint's folder; `config_hash` None: of any run.

    Raises:
        UserError: the checkpoint belongs to another configuration, or to other workers or another ZeRO stage.
    """
    state, extra = read_state(folder)
    if config_hash is not None and state.config_hash != config_hash:
        raise UserError(
            f"the run's checkpoint was made with another configuration (hash {state.config_hash}, now "
            f"{config_hash}): choose another --name, or restore the earlier options"
        )
    shard = folder / f"rank_{rank:05d}.pt"
    if not shard.exists():
        raise UserError(f"the run's checkpoint has no shard for rank {rank}: resume with the same training.workers")
    engine.load_state_dict(torch.load(shard, map_location="cpu", weights_only=False))
    method.load_state_dict(extra["method"])
    engine.account.load(extra["account"])
    return state


def read_state(folder: Path) -> tuple[LoopState, dict[str, Any]]:
    """The readable part of a checkpoint folder: loop state, and method and account states by name."""
    content = json.loads((folder / "state.json").read_text())
    extra = {name: content.pop(name) for name in ("method", "account")}
    series = [json.loads(line) for line in (folder / "series.jsonl").read_text().splitlines()]
    return LoopState(**content, series=series), extra
