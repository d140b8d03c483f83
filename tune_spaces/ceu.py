"""Search space of CE-U."""

from tune_spaces.spaces import Space, rate

SPACE = Space((rate("ceu.optimizer.lr"),))
