"""`ofmu benchmark`: methods x splits x seeds at equal compute, with equal tuning, reported on fresh seeds."""

from __future__ import annotations

import sys

from ofmu_ray.commandline.parse import fail, parse
from ofmu_ray.commandline.terminal import Terminal, say
from ofmu_ray.config import BenchmarkConfig
from ofmu_ray.errors import UserError
from ofmu_ray.progress import listening
from ofmu_ray.search.run_benchmark import benchmark

PROG = "ofmu benchmark"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, 2 for a user's mistake, 1 if a method has no reported run."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        with listening(Terminal()):
            outcome = benchmark(parse(BenchmarkConfig, words, PROG), [*PROG.split(), *words])
    except (UserError, KeyboardInterrupt) as error:
        return fail(error, PROG)
    print(outcome.table)
    for path in outcome.files:
        say(f"written {path}")
    say(f"mlflow  {outcome.mlflow}")
    return 0 if outcome.complete else 1


if __name__ == "__main__":
    sys.exit(main())
