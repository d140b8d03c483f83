"""Search space of fine-tuning on retain rows."""

from ofmu_ray.config.spaces import Space, rate

SPACE = Space((rate("retain_finetune.optimizer.lr"),))
