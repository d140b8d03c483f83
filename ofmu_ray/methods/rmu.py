"""RMU: the activations of forget answers towards a random vector (Li et al. 2024, arXiv 2403.03218)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, RETAIN_WEIGHT, OneLoopConfig, Ranges
from ofmu_ray.config.ranges import not_negative, positive
from ofmu_ray.data.batch import IGNORED
from ofmu_ray.errors import UserError
from ofmu_ray.features.builtin import Activations
from ofmu_ray.features.protocol import Need
from ofmu_ray.methods.one_loop import OneLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts
    from ofmu_ray.engines.protocol import Engine


@dataclass(frozen=True, kw_only=True)
class RMUConfig(OneLoopConfig):
    """Representation misdirection (Li et al. 2024, arXiv 2403.03218): a layer towards a random vector."""

    forget_weight: float = 1.0
    """gamma, weight of the forget loss."""
    retain_weight: float = 1.0
    """alpha, weight of the distance to the reference model's activations on retain answers."""
    layer: int | None = None
    """Layer whose output is steered, from 0; null: 7 (OpenUnlearning), or the middle layer of a model with fewer."""
    steering: float = 2.0
    """c, norm of the random target vector."""
    train_layers: int | None = None
    """Train the last n layers up to `layer` only (the authors use 3); null: all weights up to it (OpenUnlearning)."""

    def check(self, section: str) -> None:
        super().check(section)
        not_negative(section, self, "forget_weight", "retain_weight", "layer")
        positive(section, self, "steering", "train_layers")


class RMU(OneLoop[RMUConfig]):
    """Minimises gamma |h - u|^2 on forget answers + alpha |h - h_ref|^2 on retain answers, h the output of one layer.

    u = c r / |r|, r uniform in [0, 1) per coordinate, drawn from the run's seed. Forward passes end at the layer; what
    lies above it is frozen. h is taken at the answer's own tokens (the label mask unshifted, as the authors and
    OpenUnlearning take it), and h_ref is stored: no second model.
    """

    name = "rmu"
    options = RMUConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "steering": (
            "loguniform(1, 100)",
            "2 in OpenUnlearning, 20 and more for the authors' 7 B models (arXiv 2403.03218)",
        ),
        "retain_weight": RETAIN_WEIGHT,
    }

    def __init__(self, config: RMUConfig, rounds: int | None = None):
        import torch

        super().__init__(config, rounds)
        self.forget_weight, self.retain_weight = config.forget_weight, config.retain_weight
        self.layer, self.width = 0, 0
        self.target = torch.empty(0)

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({"texts"})

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("retain", Activations(self.config.layer)),) if self.retain_weight > 0 else ()

    def freeze(self, module: torch.nn.Module) -> None:
        """All that `layer_output` does not use; with train_layers, all but the last n layers up to the steered one.

        Raises UserError when the model has no such layer, or not so many below it.
        """
        from ofmu_ray.engines.layers import chosen_layer, decoder_layers, parameters_up_to

        layers = decoder_layers(module)
        self.layer = chosen_layer(self.config.layer, len(layers))
        self.width = module.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
        used = parameters_up_to(module, self.layer)
        self.work = sum(p.numel() for p in used) / sum(p.numel() for p in module.parameters())
        if self.config.train_layers is not None:
            first = self.layer + 1 - self.config.train_layers
            if first < 0:
                raise UserError(
                    f"rmu.train_layers = {self.config.train_layers}: there are {self.layer + 1} layers up to layer "
                    f"{self.layer}, which is steered"
                )
            used = [p for layer in list(layers)[first : self.layer + 1] for p in layer.parameters()]
        kept = {id(parameter) for parameter in used}
        for parameter in module.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)

    def start(self, engine: Engine) -> None:
        """Draw u: the worker has seeded torch with the run's seed, on every rank alike."""
        import torch

        drawn = torch.rand(self.width, generator=torch.Generator().manual_seed(torch.initial_seed()))
        self.target = self.config.steering * drawn / drawn.norm()

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return self._distance(module, micro, self.target)

    def retain_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return self._distance(module, micro, micro["reference_activations"])

    def _distance(self, module: torch.nn.Module, micro: Mapping[str, Any], target: torch.Tensor) -> LossParts:
        import torch

        from ofmu_ray.algorithm.reference_losses import misdirection
        from ofmu_ray.engines.layers import layer_output

        labelled = micro["labels"] != IGNORED
        hidden_td = layer_output(module, micro, self.layer)[labelled]
        hidden_td = hidden_td.float() if hidden_td.dtype in (torch.bfloat16, torch.float16) else hidden_td
        target = target.to(hidden_td.device)
        return misdirection(hidden_td, target, labelled.nonzero()[:, 0], len(labelled))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "target": self.target.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        import torch

        super().load_state_dict(state)
        self.target = torch.tensor(state["target"])
