"""The imports of ranks, for the process that they are forked from."""

from engine_models import tiny_model

import ofmu_ray.engines
import ofmu_ray.methods
import ofmu_ray.training.start  # noqa: F401
from ofmu_ray.engines.deepspeed_engine import import_deepspeed

import_deepspeed()
for kind in ("llama", "qwen2", "gpt_neox"):
    tiny_model(kind)
