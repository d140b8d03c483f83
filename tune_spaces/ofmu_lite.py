"""Search space of OFMU with the preset lite: the penalty at the last inner iterate only."""

from tune_spaces import ofmu

SPACE = ofmu.SPACE
