"""`ofmu sweep`: Ray Tune tunes a method's options over unlearning runs, by an explicit rule."""

from __future__ import annotations

import sys

from ofmu_ray.commandline.parse import fail, parse
from ofmu_ray.commandline.terminal import Terminal, say
from ofmu_ray.config import SweepConfig
from ofmu_ray.errors import UserError
from ofmu_ray.progress import listening
from ofmu_ray.search.run_sweep import sweep

PROG = "ofmu sweep"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, 2 for a user's mistake, 1 if no trial meets the floor or the sweep was stopped."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        with listening(Terminal()):
            outcome = sweep(parse(SweepConfig, words, PROG), [*PROG.split(), *words])
    except (UserError, KeyboardInterrupt) as error:
        return fail(error, PROG)
    print(outcome.summary)
    for path in outcome.files:
        say(f"written {path}")
    say(f"mlflow  {outcome.mlflow}")
    if not outcome.complete:
        say("stopped before all trials finished; the same command resumes")
    return 0 if outcome.complete and outcome.chosen is not None else 1


if __name__ == "__main__":
    sys.exit(main())
