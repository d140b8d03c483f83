"""Search space of fine-tuning on retain rows."""

from tune_spaces.spaces import Space, rate

SPACE = Space((rate("retain_finetune.optimizer.lr"),))
