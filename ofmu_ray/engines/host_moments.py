"""Optimiser moments in host memory between steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

States = Iterable[tuple[torch.Tensor, dict[str, Any]]]
"""(parameter, its state) as in `torch.optim.Optimizer.state`."""


class HostMoments:
    """Moves moments between pinned host memory and a CUDA device, on a stream of its own.

    Copies to the host run while the next passes compute. On a CPU nothing moves.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned: dict[tuple[int, str], torch.Tensor] = {}

    def to_device(self, states: States) -> None:
        """Before a step."""
        if self._stream is None:
            return
        with torch.cuda.stream(self._stream):  # so it comes after the copies to the host
            moved = [
                (state, name, value.to(self._device, non_blocking=True)) for _, state, name, value in _moments(states)
            ]
        self.wait()
        for state, name, value in moved:
            value.record_stream(torch.cuda.current_stream(self._device))
            state[name] = value

    def to_host(self, states: States) -> None:
        """After a step, or after moments were loaded."""
        if self._stream is None:
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for parameter, state, name, value in _moments(states):
                if value.is_cuda:
                    kept = self._buffer(parameter, name, value)
                    kept.copy_(value, non_blocking=True)
                    value.record_stream(self._stream)  # the copy reads it after its last reference is gone
                    state[name] = kept

    def _buffer(self, parameter: torch.Tensor, name: str, value: torch.Tensor) -> torch.Tensor:
        key = id(parameter), name
        if key not in self._pinned:
            self._pinned[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return self._pinned[key]

    def wait(self, *, host: bool = False) -> None:
        """The current stream waits for all copies; `host`: so does this thread, which may then read the moments."""
        if self._stream is None:
            return
        if host:
            self._stream.synchronize()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def _moments(states: States) -> list[tuple[torch.Tensor, dict[str, Any], str, torch.Tensor]]:
    """All tensors but the step counters."""
    return [
        (parameter, state, name, value)
        for parameter, state in states
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    ]
