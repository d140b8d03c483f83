"""The engine for many workers: DeepSpeed ZeRO on an initialised torch.distributed process group."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist

from ofmu_ray.config import OptimizerConfig, Precision
from ofmu_ray.engines.compiled import CompiledLayers
from ofmu_ray.engines.protocol import Kind, Loss, Vector
from ofmu_ray.engines.shards import FlatShards, Shards, fill_frozen, trainable_parameters, trains_adapters
from ofmu_ray.engines.vector_engine import VectorEngine
from ofmu_ray.errors import UserError
from ofmu_ray.internals.deepspeed_private import numel_of, share_of
from ofmu_ray.models.stored import share
from ofmu_ray.models.unread import UnreadWeights

PERSISTENT_BELOW = 10_000  # elements: at stage 3, norms and biases stay unsharded, because gathering them costs more


def import_deepspeed() -> Any:
    """Import DeepSpeed without MLflow, which its autotuner imports: saves 1.1 CPU seconds and 116 MB per worker."""
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("deepspeed")
    finally:
        if hidden:
            del sys.modules["mlflow"]


class DeepSpeedEngine(VectorEngine):
    """ZeRO stages 0 to 3 over the ranks of the default process group (gloo on CPU, NCCL on CUDA).

    Stage 0 is plain data parallelism (one flat buffer, one all-reduce). Stages 1 to 3 use DeepSpeed's partitions: no
    rank ever has a complete gradient or fp32 vector. Stages 1 and 2 are identical here: stage 1 would keep complete
    gradients until the optimiser step, but here every pass ends in a sharded vector.

    Precision, `offload`, `loss_fn`, `decay_norms`, `unread` and `compiled` are as in `TorchEngine`; at stage 3 a rank
    reads only its shares of `unread` parameters. A loss calls the module that it is given (DeepSpeed's wrapper), which
    has the model's attributes.

    Raises UserError without a process group, and for operations that need double backward.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        loss_fn: Loss | None = None,
        *,
        inner: OptimizerConfig | None = None,
        outer: OptimizerConfig | None = None,
        zero_stage: Literal[0, 1, 2, 3] = 2,
        precision: Precision = "fp32",
        offload: str = "none",
        decay_norms: bool = True,
        micro_batch_size: int = 1,
        unread: UnreadWeights | None = None,
        compiled: CompiledLayers | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise UserError("the DeepSpeed engine needs torch.distributed: start it in Ray Train, or use engine torch")
        self.zero_stage = zero_stage
        self._autocast_forward = False
        if zero_stage == 0:
            shards: Shards = FlatShards(
                module.to(_device()),
                bf16_weights=precision == "bf16",
                world_size=dist.get_world_size(),
                unread=unread,
            )
        else:
            shards = self._zero_shards(module, zero_stage, precision, micro_batch_size, unread)
            if precision == "bf16_autocast":
                self._autocast_inside(module)
        super().__init__(
            module,
            shards,
            loss_fn=loss_fn,
            inner=inner,
            outer=outer,
            precision=precision,
            offload=offload,
            decay_norms=decay_norms,
            compiled=compiled,
        )

    def _zero_shards(
        self, module: torch.nn.Module, stage: int, precision: str, micro_batch_size: int, unread: UnreadWeights | None
    ) -> Shards:
        device = _device()
        _announce(device)
        deepspeed = import_deepspeed()
        from ofmu_ray.engines.zero_shards import ZeroShards
        from ofmu_ray.internals.deepspeed_private import COMPATIBLE_OPS, unread_weights

        warnings.filterwarnings("ignore", "torch.distributed.*is deprecated", FutureWarning)  # from DeepSpeed
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        COMPATIBLE_OPS.get()["deepspeed_shm_comm"] = (
            False  # otherwise DeepSpeed compiles a C++ op at its first start on a CPU
        )
        parameters = [parameter for _, parameter in trainable_parameters(module)]
        if precision != "bf16":
            module.float()
        elif trains_adapters(module):  # DeepSpeed's bf16 would round them too
            for parameter in module.parameters():
                if not parameter.requires_grad and parameter.is_floating_point():
                    parameter.data = parameter.data.bfloat16()
            precision = "fp32"
        options: dict[str, Any] = {
            "model": module,
            # never stepped: only defines what DeepSpeed partitions
            "optimizer": torch.optim.SGD(parameters, lr=0.0),
            "config": deepspeed_config(stage, precision, micro_batch_size),
        }
        if unread is None:
            engine, *_ = deepspeed.initialize(**options)
            return ZeroShards(engine, stage)
        if stage < 3:
            fill_frozen(module, unread)
        for parameter in module.parameters():  # adapters
            if parameter not in unread:
                dist.broadcast(parameter.data, src=0)
        with unread_weights(unread.__contains__, lambda parameter: _read_share(unread, parameter)):
            engine, *_ = deepspeed.initialize(**options)
        shards = ZeroShards(engine, stage)
        if stage < 3:
            for parameter in parameters:
                if parameter in unread:
                    unread.read(parameter, parameter.detach().view(-1))
            shards.adopt()
        return shards

    def _autocast_inside(self, module: torch.nn.Module) -> None:
        # DeepSpeed's forward disables an outer autocast, so the model's forward enables it
        forward = module.forward

        @functools.wraps(forward)
        def forward_in_autocast(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(_device().type, torch.bfloat16, enabled=self._autocast_forward):
                return forward(*args, **kwargs)

        module.forward = forward_in_autocast  # type: ignore[method-assign]

    @contextmanager
    def _autocast(self, wanted: bool) -> Iterator[None]:
        if self.zero_stage == 0:
            with super()._autocast(wanted):
                yield
            return
        self._autocast_forward = wanted and self.precision == "bf16_autocast"
        try:
            yield
        finally:
            self._autocast_forward = False

    def graph_gradient(
        self, batch: Any, loss: Loss | None = None, *, kind: Kind = "forget"
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Not supported on sharded models: raises UserError."""
        raise _no_double_backward()

    def parameters(self) -> Sequence[torch.Tensor]:
        """Not supported on sharded models: raises UserError."""
        raise _no_double_backward()

    def as_vector(self, tensors: Sequence[torch.Tensor]) -> Vector:
        """Not supported on sharded models: raises UserError."""
        raise _no_double_backward()

    def as_tensors(self, vector: Vector) -> Sequence[torch.Tensor]:
        """Not supported on sharded models: raises UserError."""
        raise _no_double_backward()

    def close(self) -> None:
        """Free DeepSpeed's buffers and hooks; the engine is unusable afterwards."""
        if self.zero_stage:
            self.shards.forward_module.destroy()  # type: ignore[operator]


def _announce(device: torch.device) -> None:
    """Tell DeepSpeed this rank's device, as its launcher would; otherwise it guesses from the machine.

    DeepSpeed takes LOCAL_RANK for the number of the GPU. Ray's is the worker's number on its node, which is another one
    if workers have several GPUs each, or if the node has more than ten, whose numbers Ray sorts as text.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)
    os.environ.setdefault("LOCAL_RANK", "0")


def deepspeed_config(stage: int, precision: str, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: only partitions and gradients, without its optimiser, clipping or autocast."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "zero_allow_untested_optimizer": True,
        # stage 1 would keep complete gradients on every rank; ours are always reduced to shards at once
        "zero_optimization": {"stage": max(stage, 2), "stage3_param_persistence_threshold": PERSISTENT_BELOW},
        "bf16": {"enabled": precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def _read_share(unread: UnreadWeights, parameter: Any) -> None:
    """Fill this rank's part of a parameter that DeepSpeed has cut (stage 3)."""
    first, end = share(numel_of(parameter), dist.get_rank(), dist.get_world_size())
    held = share_of(parameter)
    assert held is not None
    unread.read(parameter, held[: end - first], first)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _no_double_backward() -> UserError:
    return UserError(
        "ofmu.curvature = exact needs double backward, which DeepSpeed does not support: "
        "use --training.engine torch, or --ofmu.curvature finite_difference"
    )
