"""Search space of gradient ascent."""

from tune_spaces.spaces import Space, rate

SPACE = Space((rate("gradient_ascent.optimizer.lr"),))
