"""Search space of CE-U."""

from ofmu_ray.config.spaces import Space, rate

SPACE = Space((rate("ceu.optimizer.lr"),))
