"""`ofmu evaluate`: any number of models side by side, by the same code and with the same numbers as a run's end."""

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
            found = compare(parse(EvaluateConfig, words, PROG), [*PROG.split(), *words])
    except UserError as error:
        return fail(error, PROG)
    print(metrics_table(found.metrics, list(found.metrics)))
    say(f"report  {join(found.home, 'report.html')}")
    say(f"mlflow  {found.mlflow}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
