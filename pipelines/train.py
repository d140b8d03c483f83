"""`ofmu train`: fit a target or a retrained model on a data set, with the same code as unlearning."""

from __future__ import annotations

import sys

from ofmu_ray.commandline.parse import fail, parse
from ofmu_ray.commandline.terminal import Terminal, say
from ofmu_ray.config import TrainConfig
from ofmu_ray.errors import UserError
from ofmu_ray.runs.run import run

PROG = "ofmu train"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, 2 for a user's mistake, 1 if the fit failed."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        outcome = run(parse(TrainConfig, words, PROG), Terminal(), [*PROG.split(), *words])
    except (UserError, KeyboardInterrupt) as error:
        return fail(error, PROG)
    if outcome.hub:
        say(f"hub     {outcome.hub}")
    if outcome.reused:
        say(f"{outcome.name} is finished; model: {outcome.model}")
        return 0
    loss = "" if outcome.loss is None else f"loss {outcome.loss:.4f} after "
    say(f"fit     {loss}{outcome.rounds} steps, {outcome.cost['seconds']['training']:.0f} s; {outcome.status}")
    say(f"model   {outcome.model}")
    return 0 if outcome.finished else 1


if __name__ == "__main__":
    sys.exit(main())
