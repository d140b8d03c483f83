"""`ofmu evaluate`: compare any number of models, with the same code and numbers as at the end of a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from ofmu_ray.commandline.parse import fail, parse
from ofmu_ray.commandline.terminal import Terminal, metrics_table, plain_table, say
from ofmu_ray.config.evaluate import EvaluateConfig
from ofmu_ray.errors import UserError
from ofmu_ray.progress import listening
from ofmu_ray.runs.comparison import compare
from ofmu_ray.storage import join

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
    for label, sentences in comparison.verdicts.items():
        print("\n".join(f"{label}: {sentence}" for sentence in sentences))
    if comparison.peer:
        print(f"\n{peer_table(comparison.peer)}\n")
    say(f"report  {join(comparison.home, 'report.html')}")
    say(f"mlflow  {comparison.mlflow}")
    return 0


def peer_table(models: Mapping[str, Mapping[str, float | None]]) -> str:
    """Metrics under OpenUnlearning's names, model by model; without those that no model has."""
    names = dict.fromkeys(name for values in models.values() for name in values)
    rows = [(name, *(values.get(name) for values in models.values())) for name in names]
    shown = [tuple("" if cell is None else cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row)
             for row in rows if any(cell is not None for cell in row[1:])]  # fmt: skip
    return plain_table([("OpenUnlearning's name", *models), *shown])


if __name__ == "__main__":
    sys.exit(main())
