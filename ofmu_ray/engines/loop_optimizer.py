"""The optimiser of one loop, on this rank's shards of the fp32 master weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch

from ofmu_ray.config import OptimizerConfig, SharedBaseConfig
from ofmu_ray.engines.host_moments import HostMoments
from ofmu_ray.engines.protocol import Vector

_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class LoopOptimizer:
    """torch.optim.SGD or AdamW with flat master shards as parameters and a vector as gradient.

    Both rules are elementwise, so stepping on shards equals stepping on the complete vector. The moments belong to one
    loop (those that a SharedBaseConfig shares, to `beside`). With `offload` they stay in host memory between steps.
    `decayed`: views of the parts of the masters that weight decay shrinks; None: all of them.
    """

    def __init__(
        self,
        masters: Vector,
        config: OptimizerConfig,
        *,
        offload: bool = False,
        beside: LoopOptimizer | None = None,
        decayed: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.config = config
        self.factor = 1.0
        """Factor on the learning rate of all further steps."""
        # one for both loops, as a SharedBaseConfig shares moments
        self._host: HostMoments | None = None
        if offload:
            self._host = beside._host if beside else HostMoments(masters[0].device)
        # parameters that share the masters' storage: a step writes through
        self._parameters: list[torch.Tensor] = [torch.nn.Parameter(master, requires_grad=True) for master in masters]
        self._beside = beside
        # torch's decay for SGD is not decoupled, and its AdamW's is for all elements of a master: then `step` decays
        by_torch = decayed is None and config.name == "adamw" and not isinstance(config, SharedBaseConfig)
        self._torch_decay = config.weight_decay if by_torch else 0.0
        self._decayed = self._parameters if decayed is None else list(decayed)
        self._optimizer = self._build()

    def _build(self) -> torch.optim.Optimizer:
        config = self.config
        if isinstance(config, SharedBaseConfig):
            common = self._beside._optimizer if self._beside else None
            return SharedBaseAdamW(self._parameters, config, common)
        if config.name == "sgd":
            return torch.optim.SGD(self._parameters, lr=config.rate, momentum=config.momentum, foreach=True)
        return torch.optim.AdamW(
            self._parameters,
            lr=config.rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=self._torch_decay,
            fused=True,
        )

    @torch.no_grad()
    def step(self, vector: Vector, norm: float) -> None:
        """One step down `vector`, whose norm over all ranks is `norm`; clipping scales `vector` in place."""
        clip, nominal = self.config.clip, self.lr
        if clip is not None and norm > clip:
            torch._foreach_mul_(vector, clip / (norm + _CLIP_EPSILON))
        if self.config.weight_decay and not self._torch_decay and self._decayed:
            torch._foreach_mul_(self._decayed, 1 - nominal * self.factor * self.config.weight_decay)
        if self._host is not None:
            self._host.to_device(self._states())
        for parameter, gradient in zip(self._parameters, vector, strict=True):
            parameter.grad = gradient
        for group in self._optimizer.param_groups:
            group["lr"] *= self.factor
        self._optimizer.step()
        self.lr = nominal
        self._optimizer.zero_grad(set_to_none=True)
        if self._host is not None:
            self._host.to_host(self._states())

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

    def _states(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        states = [*self._optimizer.state.items()]
        if self._beside and isinstance(self.config, SharedBaseConfig):
            states += self._beside._optimizer.state.items()
        return states

    def first_moment(self) -> Vector | None:
        """AdamW's running mean of the (clipped) gradients, on the parameters' device; None before the first step."""
        states = [self._optimizer.state.get(parameter, {}) for parameter in self._parameters]
        if not all("exp_avg" in state for state in states):
            return None
        if self._host is not None:
            self._host.wait()
        return [state["exp_avg"].to(p.device) for state, p in zip(states, self._parameters, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """A copy in host memory."""
        if self._host is not None:
            self._host.wait(host=True)
        state: dict[str, Any] = _to_host(self._optimizer.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit, with this optimiser's options: another run's may differ."""
        options = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self._optimizer.param_groups
        ]
        self._optimizer.load_state_dict(copy.deepcopy(state))
        for group, own in zip(self._optimizer.param_groups, options, strict=True):
            group.update(own)
        if self._host is not None:
            self._host.to_host(self._states())


class SharedBaseAdamW(torch.optim.Optimizer):
    """AdamW of DualOptim+ (Zhong et al. 2026, arXiv 2605.21539; the fp32 step of CityU-MLO/DualOptimPlus).

    b, c: moments of the gradients of both loops; m, v: moments of what this loop's gradients add to them. ^ marks the
    bias correction of a moment that starts at 0; b^ and c^ are taken before the step:

        m <- beta1 m + (1 - beta1) (g - b^)        v <- beta2 v + (1 - beta2) (g^2 - c^)
        theta <- theta - lr (m^ + b^) / (sqrt|v^ + c^| + eps), after `LoopOptimizer` has decayed it
        b <- base_beta1 b + (1 - base_beta1) g     c <- base_beta2 c + (1 - base_beta2) g^2
    """

    def __init__(
        self, parameters: list[torch.Tensor], config: SharedBaseConfig, common: torch.optim.Optimizer | None
    ) -> None:
        super().__init__(parameters, {"lr": config.rate})
        self.config, self._common = config, common or self

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step down the gradients of the parameters."""
        config, (group,), (shared,) = self.config, self.param_groups, self._common.param_groups
        lr = group["lr"]
        for parameter, key in zip(group["params"], shared["params"], strict=True):
            own, base, g = self.state[parameter], self._common.state[key], parameter.grad
            if "b" not in base:
                base.update(base_steps=0, b=torch.zeros_like(g), c=torch.zeros_like(g))
            if "m" not in own:
                own.update(steps=0, m=torch.zeros_like(g), v=torch.zeros_like(g))
            own["steps"] += 1
            b = _corrected(base["b"], config.base_beta1, base["base_steps"])
            c = _corrected(base["c"], config.base_beta2, base["base_steps"])
            own["m"].lerp_(g - b, 1 - config.beta1)
            own["v"].lerp_(g.square() - c, 1 - config.beta2)
            first = _corrected(own["m"], config.beta1, own["steps"]) + b
            second = _corrected(own["v"], config.beta2, own["steps"]) + c
            parameter.addcdiv_(first, second.abs_().sqrt_().add_(config.eps), value=-lr)
            base["base_steps"] += 1
            base["b"].lerp_(g, 1 - config.base_beta1)
            base["c"].lerp_(g.square(), 1 - config.base_beta2)


def _corrected(moment: torch.Tensor, decay: float, steps: int) -> torch.Tensor:
    """A new tensor: the bias-corrected moment."""
    return moment / (1 - decay**steps) if steps else moment.clone()


def _to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_host(item) for item in value)
    return value
