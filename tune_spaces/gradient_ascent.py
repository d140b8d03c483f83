"""Search space of gradient ascent."""

from ofmu_ray.config.spaces import Space, rate

SPACE = Space((rate("gradient_ascent.optimizer.lr"),))
