"""`ofmu evaluate`: compare any number of models, with the same code and numbers as at the end of a run."""

from __future__ import annotations

import sys

from ofmu_ray.config.evaluate import EvaluateConfig
from ofmu_ray.errors import UserError
from ofmu_ray.progress import listening
from ofmu_ray.runs.comparison import compare
from ofmu_ray.storage import join
from pipelines.parse import fail, parse
from pipelines.terminal import Terminal, metrics_table, say

PROG = "ofmu evaluate"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, 2 for a user's mistake."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        with listening(Terminal()):
            comparison = compare(parse(EvaluateConfig, words, PROG), [*PROG.split(), *words])
    except (UserError, KeyboardInterrupt) as error:
        return fail(error, PROG)
    print(metrics_table(comparison.metrics, list(comparison.metrics)))
    say(f"report  {join(comparison.home, 'report.html')}")
    say(f"mlflow  {comparison.mlflow}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
