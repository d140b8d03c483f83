"""The optimiser of one loop, on this rank's shards of the fp32 master weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from ofmu_ray.config import OptimizerConfig
from ofmu_ray.engines.protocol import Vector

_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class LoopOptimizer:
    """torch.optim.SGD or AdamW whose parameters are flat master shards and whose gradient is a vector.

    Both rules are elementwise, so a step on shards is the step on the whole. The moments belong to one loop; with
    `offload` they wait in host memory between steps.
    """

    def __init__(self, masters: Vector, config: OptimizerConfig, *, offload: bool = False) -> None:
        self.config = config
        self.factor = 1.0
        """On the learning rate of every step from now on."""
        self._offload = offload
        # parameters of our own that share the masters' storage: a step writes through
        self._parameters: list[torch.Tensor] = [torch.nn.Parameter(master, requires_grad=True) for master in masters]
        self._optimizer = self._build()

    def _build(self) -> torch.optim.Optimizer:
        config = self.config
        if config.name == "sgd":  # torch's weight_decay for SGD is not decoupled: `step` does it
            return torch.optim.SGD(self._parameters, lr=config.lr, momentum=config.momentum, foreach=True)
        return torch.optim.AdamW(
            self._parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def step(self, vector: Vector, norm: float) -> None:
        """One step down `vector`, whose norm over all ranks is `norm`; clipping scales `vector` itself."""
        clip, nominal = self.config.clip, self.lr
        if clip is not None and norm > clip:
            torch._foreach_mul_(vector, clip / (norm + _CLIP_EPSILON))
        if self.config.name == "sgd" and self.config.weight_decay:
            torch._foreach_mul_(self._parameters, 1 - nominal * self.factor * self.config.weight_decay)
        self._move_moments(to_parameters=True)
        for parameter, gradient in zip(self._parameters, vector, strict=True):
            parameter.grad = gradient
        for group in self._optimizer.param_groups:
            group["lr"] *= self.factor
        self._optimizer.step()
        self.lr = nominal
        self._optimizer.zero_grad(set_to_none=True)
        self._move_moments(to_parameters=False)

    @property
    def lr(self) -> float:
        """Learning rate of the next step, before `factor`."""
        return float(self._optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"learning rate {value!r}: must be finite and 0 or more")
        for group in self._optimizer.param_groups:
            group["lr"] = value

    def _move_moments(self, *, to_parameters: bool) -> None:
        if not self._offload:
            return
        for parameter, state in self._optimizer.state.items():
            device = parameter.device if to_parameters else torch.device("cpu")
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.numel() > 1:  # not the step counter
                    state[name] = value.to(device)

    def first_moment(self) -> Vector | None:
        """AdamW's running mean of the (clipped) gradients, on the parameters' device; None before the first step."""
        states = [self._optimizer.state.get(parameter, {}) for parameter in self._parameters]
        if not all("exp_avg" in state for state in states):
            return None
        return [state["exp_avg"].to(p.device) for state, p in zip(states, self._parameters, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """A copy in host memory."""
        state: dict[str, Any] = _to_host(self._optimizer.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, to the bit."""
        self._optimizer.load_state_dict(copy.deepcopy(state))
        self._move_moments(to_parameters=False)


def _to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_host(item) for item in value)
    return value
